//! Plugins of the Node Resource Interface: a real one, on the interface's own library, beside real pods. What critest's NRI specs check is
//! checked here, and what becomes of adjustments in the guest.

use std::{collections::HashMap, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{STATE_LIMIT, container, pod},
    daemon::{Daemon, Product},
    eventually,
    host::Host,
    image,
    node::Node,
    nri_plugin::NriPlugin,
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;

const SLEEP: [&str; 2] = ["sleep", "100000"];

/// A node whose plugins may take their time, since tests let them wait while they look around.
async fn node(host: &Host, settings: &str) -> Result<Node> {
    let registry = Registry::start(&host.dir().join("registry")).await?;
    let image = registry.push("test/busybox", "1", &image::busybox()?)?;
    let config = host.dir().join("config.toml");
    let times = "registration_timeout_seconds = 60\nrequest_timeout_seconds = 25";
    fs::write(&config, format!("[nri]\n{times}\n{settings}\n"))?;
    let config = config.display().to_string();
    let daemon = Daemon::start(host, &Product::find()?, &["--config", &config]).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(&image).await?;
    Ok(Node {
        daemon,
        cri,
        image,
        registry,
    })
}

#[test]
fn a_plugin_hears_of_pods_and_containers_in_their_strict_order() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon,
            registry: _registry,
        } = node(&host, "").await?;
        let mut plugin = NriPlugin::start(&daemon.nri_socket(), "00", "order").await?;

        // While its hook goes on, a pod is not listed and takes no containers.
        plugin.obey("hold RunPodSandbox").await?;
        let config = pod(&host, "order");
        let (mut runner, wanted) = (cri.clone(), config.clone());
        let running = tokio::spawn(async move { runner.run_pod(&wanted).await });
        let told = plugin.event("RunPodSandbox").await?;
        let pod_id = told["Pod"].as_str().context("no pod")?.to_owned();
        ensure!(
            told["PodName"] == "order" && told["Namespace"] == "default" && told["Uid"] == "uid-order",
            "{told}"
        );
        ensure!(cri.pods().await?.is_empty(), "the pod is listed under its hook");
        let early = container("early", &image, &SLEEP);
        ensure!(
            cri.create(&pod_id, &early, &config).await.is_err(),
            "a container was made in a pod under its hook"
        );
        plugin.obey("release").await?;
        ensure!(running.await?? == pod_id);

        // A container that is stopped, and one that ends by itself.
        let main = container("main", &image, &SLEEP);
        let main = cri.run(&pod_id, &main, &config).await?;
        let failing = container("failing", &image, &["sh", "-c", "exit 1"]);
        let failing = cri.run(&pod_id, &failing, &config).await?;
        ensure!(cri.exited(&failing).await?.exit_code == 1);
        let made = [
            "CreateContainer",
            "PostCreateContainer",
            "StartContainer",
            "PostStartContainer",
            "StopContainer",
        ];
        eventually("the end of the container that failed", STATE_LIMIT, async || {
            (plugin.events(&failing) == made).then_some(())
        })
        .await
        .with_context(|| format!("{:?}", plugin.events(&failing)))?;
        cri.remove(&failing).await?;
        let whole = [&made[..], &["RemoveContainer"]].concat();
        ensure!(plugin.events(&failing) == whole, "{:?}", plugin.events(&failing));
        cri.stop(&main, 1).await?;
        ensure!(plugin.events(&main) == made, "{:?}", plugin.events(&main));

        // When the pod's stop is told, nothing runs in it any more, and it is still there.
        let other = container("other", &image, &SLEEP);
        let other = cri.run(&pod_id, &other, &config).await?;
        plugin.obey("hold StopPodSandbox").await?;
        let (mut stopper, id) = (cri.clone(), pod_id.clone());
        let stopping = tokio::spawn(async move { stopper.stop_pod(&id).await });
        plugin.event("StopPodSandbox").await?;
        ensure!(plugin.events(&other) == made, "{:?}", plugin.events(&other));
        ensure!(cri.status(&other).await?.state() == cri::ContainerState::ContainerExited);
        cri.pod_status(&pod_id).await?;
        plugin.obey("release").await?;
        stopping.await??;

        // A second stop is no event, and neither is a container that a stopped pod does not take.
        cri.stop_pod(&pod_id).await?;
        let late = container("late", &image, &SLEEP);
        ensure!(cri.create(&pod_id, &late, &config).await.is_err());
        ensure!(plugin.events(&pod_id) == ["RunPodSandbox", "StopPodSandbox"]);
        cri.remove_pod(&pod_id).await?;
        ensure!(plugin.events(&pod_id) == ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]);
        ensure!(plugin.events(&main) == whole && plugin.events(&other) == whole);
        let late = plugin.told().iter().any(|told| told["Name"] == "late");
        ensure!(!late, "a container that was refused was told");
        Ok(())
    })
}

#[test]
fn a_hook_that_fails_fails_the_call_and_leaves_nothing_and_a_retry_goes_through() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host, "").await?;
        let mut plugin = NriPlugin::start(&daemon.nri_socket(), "00", "fails").await?;
        let config = pod(&host, "fails");
        plugin.obey("fail RunPodSandbox").await?;
        let error = cri.run_pod(&config).await.err().context("the hook was ignored")?;
        ensure!(
            error
                .message()
                .contains("NRI plugin 00-fails failed RunPodSandbox: told to fail RunPodSandbox"),
            "{error}"
        );
        ensure!(cri.pods().await?.is_empty());
        let told = plugin.event("RunPodSandbox").await?;
        let failed = told["Pod"].as_str().context("no pod")?;
        ensure!(
            plugin.events(failed) == ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"],
            "{:?}",
            plugin.events(failed)
        );
        let pod_id = cri.run_pod(&config).await?;

        // The same for a container, which nobody sees while its hook goes on.
        let wanted = container("c", &image, &SLEEP);
        plugin.obey("fail CreateContainer").await?;
        let error = cri
            .create(&pod_id, &wanted, &config)
            .await
            .err()
            .context("the hook was ignored")?;
        ensure!(
            error.message().contains("told to fail CreateContainer"),
            "{error}"
        );
        let list = cri::ListContainersRequest::default();
        let listed = cri
            .runtime
            .list_containers(list.clone())
            .await?
            .into_inner()
            .containers;
        ensure!(listed.is_empty(), "{listed:?}");
        plugin.obey("hold CreateContainer").await?;
        let (mut creator, again, id, pod_config) =
            (cri.clone(), wanted.clone(), pod_id.clone(), config.clone());
        let creating = tokio::spawn(async move { creator.create(&id, &again, &pod_config).await });
        eventually("the second creation", STATE_LIMIT, async || {
            let told = plugin.told();
            let creations = told.iter().filter(|told| told["Event"] == "CreateContainer");
            (creations.count() == 2).then_some(())
        })
        .await?;
        let listed = cri.runtime.list_containers(list).await?.into_inner().containers;
        ensure!(
            listed.is_empty(),
            "a container is listed under its hook: {listed:?}"
        );
        plugin.obey("release").await?;
        let id = creating.await??;
        plugin.obey("fail StartContainer").await?;
        let error = cri.start(&id).await.err().context("the hook was ignored")?;
        ensure!(error.message().contains("told to fail StartContainer"), "{error}");
        cri.remove(&id).await?;
        let id = cri.run(&pod_id, &wanted, &config).await?;

        // A plugin that does not answer is disconnected, and the call goes on.
        plugin.obey("mute StopContainer").await?;
        cri.stop(&id, 1).await?;
        plugin
            .heard("the end of its connection", |told| told["Type"] == "closed")
            .await?;
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        daemon.terminate().await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn what_plugins_want_of_a_container_is_what_runs_in_the_guest() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon,
            registry: _registry,
        } = node(&host, "").await?;
        let mut plugin = NriPlugin::start(&daemon.nri_socket(), "10", "wants").await?;
        let config = pod(&host, "wants");
        let pod_id = cri.run_pod(&config).await?;
        let given = host.dir().join("given");
        fs::create_dir(&given)?;
        fs::write(given.join("word"), "from a plugin")?;
        let wishes = serde_json::json!({
            "Env": {"ADDED": "1", "-GONE": "", "KEPT": "changed"},
            "Args": ["sleep", "4711"],
            "Annotations": {"plugin.example/note": "seen"},
            "Mounts": [
                {"destination": "/given", "type": "bind", "source": given, "options": ["rbind", "ro"]},
                {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
            ],
            "Rlimit": {"type": "RLIMIT_CORE", "hard": 17, "soft": 5},
            "Memory": 48 << 20,
            "OomScoreAdj": 321,
        });
        plugin.obey(&format!("adjust {wishes}")).await?;
        let mut wanted = container("c", &image, &SLEEP);
        wanted.envs = ["GONE", "KEPT"]
            .map(|key| cri::KeyValue {
                key: key.into(),
                value: "old".into(),
            })
            .into();
        let id = cri.run(&pod_id, &wanted, &config).await?;
        for (command, expected) in [
            (
                "tr '\\0' ' ' </proc/1/cmdline || true; cat /proc/[0-9]*/cmdline | tr '\\0' ' '",
                "sleep 4711",
            ),
            ("echo $ADDED-$KEPT-$GONE.", "1-changed-."),
            ("cat /given/word", "from a plugin"),
            ("touch /given/x 2>&1 || true", "Read-only"),
            ("grep ' /scratch ' /proc/mounts", "size=1024k"),
            ("grep 'core file' /proc/self/limits", "5                    17"),
            ("cat /proc/self/oom_score_adj", "321"),
        ] {
            let (_, out, err) = cri.exec(&id, &["sh", "-c", command]).await?;
            ensure!(out.contains(expected), "{command}: {out}{err}");
        }
        let status = cri.status(&id).await?;
        ensure!(status.annotations["plugin.example/note"] == "seen");
        let limit = |status: &cri::ContainerStatus| {
            let linux = status.resources.as_ref().and_then(|all| all.linux.clone());
            linux.unwrap_or_default().memory_limit_in_bytes
        };
        ensure!(limit(&status) == 48 << 20, "{status:?}");

        // Updates: a client's, as the plugin wants it, and one of the plugin's own.
        plugin
            .obey(&format!("adjust {}", serde_json::json!({"Memory": 56 << 20})))
            .await?;
        let update = cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 52 << 20,
                ..Default::default()
            }),
            windows: None,
            annotations: HashMap::new(),
        };
        cri.runtime.update_container_resources(update).await?;
        plugin.event("PostUpdateContainer").await?;
        ensure!(limit(&cri.status(&id).await?) == 56 << 20);
        plugin.obey(&format!("update {id} {}", 60 << 20)).await?;
        ensure!(limit(&cri.status(&id).await?) == 60 << 20);
        ensure!(
            plugin.obey(&format!("update 0123 {}", 60 << 20)).await.is_err(),
            "an update of no container went well"
        );

        // What a VM cannot do is refused by its name.
        let impossible = serde_json::json!({"Hook": "/bin/true", "Sysctl": {"net.core.somaxconn": "1"}});
        plugin.obey(&format!("adjust {impossible}")).await?;
        let refused = container("refused", &image, &SLEEP);
        let error = cri
            .create(&pod_id, &refused, &config)
            .await
            .err()
            .context("wishes were ignored")?;
        for field in ["adjust.hooks", "adjust.linux.sysctl"] {
            ensure!(error.message().contains(field), "{error}");
        }

        // Two plugins that want one thing.
        let both = serde_json::json!({"Args": ["true"]});
        let mut second = NriPlugin::start(&daemon.nri_socket(), "20", "second").await?;
        plugin.obey(&format!("adjust {both}")).await?;
        second.obey(&format!("adjust {both}")).await?;
        let error = cri
            .create(&pod_id, &refused, &config)
            .await
            .err()
            .context("a conflict was ignored")?;
        ensure!(
            error
                .message()
                .contains("NRI plugins 10-wants and 20-second both change args"),
            "{error}"
        );
        second.quit()?;
        cri.run(&pod_id, &refused, &config).await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn a_plugin_that_comes_late_or_after_a_restart_is_told_of_everything() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        // One more, which the daemon starts itself.
        let (plugins, conf) = (host.dir().join("plugins"), host.dir().join("plugins.conf"));
        fs::create_dir(&plugins)?;
        fs::create_dir(&conf)?;
        fs::copy(NriPlugin::program()?, plugins.join("30-installed"))?;
        let heard = host.dir().join("installed.log");
        fs::write(conf.join("installed.conf"), heard.display().to_string())?;
        let settings = format!(
            "plugin_dir = {:?}\nplugin_config_dir = {:?}",
            plugins.display().to_string(),
            conf.display().to_string()
        );
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host, &settings).await?;
        let config = pod(&host, "sync");
        let pod_id = cri.run_pod(&config).await?;
        let installed = || fs::read_to_string(&heard).unwrap_or_default();
        ensure!(
            installed().contains("\"Event\":\"RunPodSandbox\""),
            "the installed plugin has heard {:?}",
            installed()
        );
        let first = cri
            .run(&pod_id, &container("first", &image, &SLEEP), &config)
            .await?;

        // A container that is made while a plugin is synchronized is not lost.
        let mut late = NriPlugin::spawn(&daemon.nri_socket(), "00", "late", &["-hold-synchronize"])?;
        let told = late
            .heard("synchronization", |told| told["Type"] == "synchronized")
            .await?;
        ensure!(told["Pods"] == serde_json::json!([pod_id]), "{told}");
        ensure!(told["Containers"] == serde_json::json!([first]), "{told}");
        let (mut creator, wanted, id, pod_config) = (
            cri.clone(),
            container("second", &image, &SLEEP),
            pod_id.clone(),
            config.clone(),
        );
        let creating = tokio::spawn(async move { creator.run(&id, &wanted, &pod_config).await });
        // It comes to nothing before the synchronization has ended.
        let early = tokio::time::timeout(Duration::from_millis(500), late.event("CreateContainer")).await;
        ensure!(early.is_err(), "an event came before the synchronization ended");
        late.obey("release").await?;
        let second = creating.await??;
        ensure!(
            late.events(&second)
                .first()
                .is_some_and(|event| event == "CreateContainer"),
            "{:?}",
            late.events(&second)
        );

        // A daemon that is killed: whoever comes back is told what is true. (When their library notices the end is plugins' own affair.)
        daemon.kill()?;
        drop(late);
        daemon.start_again().await?;
        let again = NriPlugin::start(&daemon.nri_socket(), "00", "again").await?;
        let told = again
            .heard("synchronization", |told| told["Type"] == "synchronized")
            .await?;
        let mut containers: Vec<_> = told["Containers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect();
        containers.sort();
        let mut expected = vec![first.clone(), second.clone()];
        expected.sort();
        ensure!(containers == expected, "{told}");
        let mut cri = daemon.cri().await?;
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        ensure!(again.events(&pod_id) == ["StopPodSandbox", "RemovePodSandbox"]);
        ensure!(again.events(&first) == ["StopContainer", "RemoveContainer"]);

        // An orderly end is told, and the installed plugin ends with the daemon.
        daemon.terminate().await?;
        again
            .heard("the daemon's end", |told| told["Type"] == "shutdown")
            .await?;
        ensure!(installed().contains("\"Type\":\"shutdown\""), "{:?}", installed());
        Ok(())
    })
}
