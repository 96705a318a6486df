//! Plugins that fail, hang or lie, and networks that are half gone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod node;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use caisson_net::{NetError, NetErrorKind, PodNetworkSpec, PortMapping};
use node::{Node, on_a_node, on_a_node_with, run, until};
use serde_json::json;

const SHORT: Duration = Duration::from_millis(700);

async fn refused(node: &Node, behaviour: &str, kind: NetErrorKind, words: &[&str]) {
    let before = node.inventory();
    drop(fs::remove_file(node.root.join("calls")));
    node.write_conflist(
        "1.0.0",
        &[
            node.bridge(),
            node.fake(json!({ "ADD": behaviour })),
            node.fake(json!({})),
        ],
    );
    let start = Instant::now();
    let error = node
        .network
        .setup("pod", &PodNetworkSpec::default())
        .await
        .unwrap_err();
    assert!(start.elapsed() < node::PATIENCE, "{behaviour}");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for word in [r#"CNI plugin "fake-cni", ADD for network "pods""#]
        .iter()
        .chain(words)
    {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    // The failing plugin and the one after it, which was never added.
    assert_eq!(node.commands(), ["ADD", "DEL", "DEL"], "{behaviour}");
    assert_eq!(node.inventory(), before, "{behaviour}");
}

#[test]
fn a_failing_add_is_undone_with_del_for_all_plugins_and_leaves_nothing() {
    on_a_node(async |node| {
        node.write_conflist("1.0.0", &[node.bridge()]);
        node.warm_up(&PodNetworkSpec::default()).await;
        refused(
            &node,
            "refuse",
            NetErrorKind::Plugin,
            &["no more addresses (code 101: tried all)"],
        )
        .await;
        refused(
            &node,
            "garbage",
            NetErrorKind::Plugin,
            &["no CNI result", "this is no JSON"],
        )
        .await;
        refused(&node, "nothing", NetErrorKind::Plugin, &["no CNI result"]).await;
        refused(&node, "crash", NetErrorKind::Plugin, &["signal: 6"]).await;
        refused(&node, "flood", NetErrorKind::Plugin, &["more than 1048576 bytes"]).await;
        let node = node.with_deadline(SHORT);
        refused(
            &node,
            "hang",
            NetErrorKind::Deadline,
            &["no answer within 700ms, killed"],
        )
        .await;
        let child = node.calls()[0]["child"].as_u64().unwrap();
        until("the plugin's child is killed", || !is_running(child)).await;
    });
}

fn is_running(pid: u64) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !state.is_empty() && !state.contains(") Z ")
}

#[test]
fn a_result_with_an_interface_that_is_not_there_is_undone() {
    on_a_node(async |node| {
        node.write_conflist("1.0.0", &[node.bridge()]);
        node.warm_up(&PodNetworkSpec::default()).await;
        let before = node.inventory();
        let mut liar = node.fake(json!({}));
        liar["result"] =
            json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "net7", "sandbox": "/n" }] });
        node.write_conflist("1.0.0", &[node.bridge(), liar.clone()]);
        let error = node
            .network
            .setup("pod", &PodNetworkSpec::default())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("\"net7\""), "{error}");
        assert_eq!(node.inventory(), before);

        liar["result"] = json!({ "cniVersion": "1.0.0", "ips": [{ "address": "nonsense" }] });
        node.write_conflist("1.0.0", &[node.bridge(), liar]);
        let error = node
            .network
            .setup("pod", &PodNetworkSpec::default())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), NetErrorKind::Plugin);
        assert!(error.to_string().contains("nonsense"), "{error}");
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn a_dropped_setup_kills_the_plugin_and_teardown_undoes_the_rest() {
    on_a_node(async |node| {
        node.write_conflist("1.0.0", &[node.bridge()]);
        node.warm_up(&PodNetworkSpec::default()).await;
        let before = node.inventory();
        node.write_conflist("1.0.0", &[node.bridge(), node.fake(json!({ "ADD": "hang" }))]);
        let spec = PodNetworkSpec::default();
        let network = node.network.clone();
        let setup =
            tokio::spawn(async move { network.setup("pod", &PodNetworkSpec::default()).await.map(drop) });
        until("the plugin hangs", || !node.calls().is_empty()).await;
        setup.abort();
        assert!(setup.await.unwrap_err().is_cancelled());
        let child = node.calls()[0]["child"].as_u64().unwrap();
        until("the plugin's child is killed", || !is_running(child)).await;
        // The configuration of ADD is used, not the node's present one.
        node.write_conflist("1.0.0", &[json!({ "type": "absent" })]);
        node.network.teardown("pod", &spec).await.unwrap();
        assert_eq!(node.commands(), ["ADD", "DEL"]);
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn plugins_get_what_cni_says_and_nothing_of_the_daemons_environment() {
    on_a_node(async |node| {
        node.write_conflist("1.0.0", &[node.bridge(), node.fake(json!({}))]);
        let spec = PodNetworkSpec {
            port_mappings: vec![PortMapping {
                host_port: 80,
                container_port: 8080,
                protocol: "TCP".into(),
                host_ip: None,
            }],
            ingress_rate: Some(1_000_000),
            args: [("K8S_POD_NAME".to_owned(), "web".to_owned())].into(),
            ..PodNetworkSpec::default()
        };
        drop(node.network.setup("pod", &spec).await.unwrap());
        let cached = fs::read_to_string(node.config.cache_dir.join("results/pods-pod-eth0")).unwrap();
        let cached: serde_json::Value = serde_json::from_str(&cached).unwrap();
        assert_eq!(cached["kind"], "cniCacheV1");
        assert_eq!(
            cached["cniArgs"],
            json!([["IgnoreUnknown", "1"], ["K8S_POD_NAME", "web"]])
        );
        // A restarted daemon knows the id and may have lost the rest.
        node.network
            .teardown("pod", &PodNetworkSpec::default())
            .await
            .unwrap();

        let calls = node.calls();
        assert_eq!(node.commands(), ["ADD", "DEL"]);
        for call in &calls {
            let environment = call["environment"].as_object().unwrap();
            let names: Vec<_> = environment.keys().map(String::as_str).collect();
            let expected = [
                "CNI_ARGS",
                "CNI_COMMAND",
                "CNI_CONTAINERID",
                "CNI_IFNAME",
                "CNI_NETNS",
                "CNI_PATH",
                "PATH",
            ];
            assert_eq!(names, expected);
            assert_eq!(environment["CNI_ARGS"], "IgnoreUnknown=1;K8S_POD_NAME=web");
            assert_eq!(
                environment["CNI_NETNS"],
                node.config.netns_dir.join("pod").to_str().unwrap()
            );
            let ports = json!([{ "hostPort": 80, "containerPort": 8080, "protocol": "tcp" }]);
            assert_eq!(call["config"]["runtimeConfig"], json!({ "portMappings": ports }));
            assert_eq!(call["config"]["name"], "pods");
            assert_eq!(call["config"]["prevResult"], cached["result"]);
        }
    });
}

#[test]
fn teardown_is_idempotent_and_works_when_namespace_or_cache_are_gone() {
    on_a_node_with("shared", async |node| {
        node.write_conflist("1.0.0", &[node.bridge(), node.fake(json!({}))]);
        node.warm_up(&PodNetworkSpec::default()).await;
        let before = node.inventory();
        let spec = PodNetworkSpec::default();
        let netns = node.config.netns_dir.join("pod");
        let setup = async || drop(node.network.setup("pod", &spec).await.unwrap());

        setup().await;
        node.network.teardown("pod", &spec).await.unwrap();
        node.network.teardown("pod", &spec).await.unwrap();
        node.network.teardown("never-was", &spec).await.unwrap();
        assert_eq!(node.inventory(), before);

        setup().await;
        fs::remove_dir_all(&node.config.cache_dir).unwrap();
        node.network.teardown("pod", &spec).await.unwrap();
        assert!(!netns.exists());
        assert_eq!(node.inventory()["leases"], before["leases"]);
        assert_eq!(node.inventory()["iptables-save"], before["iptables-save"]);

        setup().await;
        run("umount", &[netns.to_str().unwrap()]);
        node.network.teardown("pod", &spec).await.unwrap();
        assert_eq!(node.calls().last().unwrap()["environment"]["CNI_NETNS"], "");
        assert!(!netns.exists());
        until("the interface is gone", || {
            node.inventory()["links"] == before["links"]
        })
        .await;
        for part in ["leases", "cache", "mounts"] {
            assert_eq!(node.inventory()[part], before[part]);
        }
    });
}

#[test]
fn teardown_goes_on_after_failures_tells_all_of_them_and_can_be_repeated() {
    on_a_node(async |node| {
        let node = node.with_deadline(SHORT.saturating_mul(3));
        node.write_conflist("1.0.0", &[node.bridge()]);
        node.warm_up(&PodNetworkSpec::default()).await;
        let before = node.inventory();
        let plugins = [
            node.bridge(),
            node.fake(json!({ "DEL": "refuse" })),
            node.fake(json!({ "DEL": "hang" })),
        ];
        node.write_conflist("1.0.0", &plugins);
        let spec = PodNetworkSpec::default();
        drop(node.network.setup("pod", &spec).await.unwrap());
        let error = node.network.teardown("pod", &spec).await.unwrap_err();
        let NetError::Teardown(all) = &error else {
            panic!("{error}")
        };
        assert_eq!(
            all.iter().map(NetError::kind).collect::<Vec<_>>(),
            [NetErrorKind::Deadline, NetErrorKind::Plugin]
        );
        let after = node.inventory();
        for part in [
            "links",
            "namespaces",
            "mounts",
            "iptables-save",
            "ip6tables-save",
            "leases",
        ] {
            assert_eq!(after[part], before[part]);
        }
        // What has failed is tried again with the same configuration.
        assert_eq!(after["cache"], ["pods-pod-eth0".to_owned()].into());
        assert!(node.network.teardown("pod", &spec).await.is_err());
        assert_eq!(node.commands(), ["ADD", "ADD", "DEL", "DEL", "DEL", "DEL"]);
    });
}

#[test]
fn a_namespace_that_was_there_before_is_not_touched() {
    on_a_node(async |node| {
        node.write_conflist("1.0.0", &[node.bridge()]);
        let spec = PodNetworkSpec::default();
        let first = node.network.setup("pod", &spec).await.unwrap();
        let error = node.network.setup("pod", &spec).await.unwrap_err();
        assert!(
            error.to_string().contains("make the network namespace"),
            "{error}"
        );
        assert!(node::run_in(&first.netns, &["ip", "link", "show", "tap0"]).contains("tap0"));
        drop(first);
        node.network.teardown("pod", &spec).await.unwrap();
    });
}

#[test]
fn status_tells_why_a_node_has_no_network() {
    on_a_node(async |node| {
        let error = async || node.network.status().await.unwrap_err();
        assert!(
            error()
                .await
                .to_string()
                .contains("no CNI network configuration in")
        );
        fs::write(node.config.conf_dir.join("05-broken.conflist"), "{").unwrap();
        let broken = error().await;
        assert_eq!(broken.kind(), NetErrorKind::NotReady);
        assert!(broken.to_string().contains("05-broken.conflist"), "{broken}");
        node.write_conflist("1.0.0", &[node.bridge(), json!({ "type": "absent" })]);
        let missing = error().await;
        assert_eq!(missing.kind(), NetErrorKind::NotReady);
        assert!(missing.to_string().contains("\"absent\""), "{missing}");
        assert_eq!(
            node.network
                .setup("pod", &PodNetworkSpec::default())
                .await
                .unwrap_err()
                .kind(),
            NetErrorKind::NotReady
        );
        assert!(!Path::new(&node.config.netns_dir).join("pod").exists());
        node.write_conflist("1.1.0", &[node.fake(json!({ "STATUS": "refuse" }))]);
        let refused = error().await;
        assert!(
            refused
                .to_string()
                .contains("STATUS for network \"pods\": no more addresses"),
            "{refused}"
        );
        node.write_conflist("1.1.0", &[node.fake(json!({}))]);
        node.network.status().await.unwrap();
    });
}
