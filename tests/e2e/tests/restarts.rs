//! A daemon that is killed at awkward moments: what it was doing is undone, what went on without it is not lost.

use std::{
    collections::HashMap,
    fs,
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod, records},
    daemon::{Daemon, Product},
    eventually,
    host::{Host, Leftovers},
    image::{self, Image, Layer},
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;
use serde_json::json;

/// How long the moment to kill at may take to come.
const MOMENT_LIMIT: Duration = Duration::from_secs(30);

/// Tells from what is on the host whether a moment has come.
type Sign = fn(&Leftovers) -> bool;

#[test]
fn a_boot_that_a_killed_daemon_left_half_done_is_rolled_back_and_can_be_tried_again() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let mut daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        // The signs of how far a boot is, each later than the one above it.
        let moments: [(&str, Sign); 4] = [
            ("its record is written", |now| !now.files.is_empty()),
            ("a CNI plugin has taken an address", |now| {
                now.files.iter().any(|file| file.contains("/cni/leases/"))
            }),
            ("its tap is there or its namespace pinned", |now| {
                now.mounts.iter().any(|mount| mount.contains("caisson-e2e-"))
                    && now.links.iter().any(|link| link.starts_with("veth"))
            }),
            ("a process of its VM runs", |now| !now.processes.is_empty()),
        ];
        for (what, reached) in moments {
            let config = pod(&host, "half");
            let mut cri = daemon.cri().await?;
            let request = config.clone();
            let call = tokio::spawn(async move { cri.run_pod(&request).await });
            eventually(what, MOMENT_LIMIT, async || host.leftovers().ok().filter(reached)).await?;
            ensure!(
                !call.is_finished(),
                "the pod ran before the daemon was killed ({what})"
            );
            daemon.kill()?;
            ensure!(call.await?.is_err(), "a killed daemon answered ({what})");

            daemon.start_again().await?;
            let mut cri = daemon.cri().await?;
            ensure!(cri.pods().await?.is_empty(), "half a pod is listed ({what})");
            // A plugin that the daemon had started may end after it.
            let gone = eventually("an empty host", MOMENT_LIMIT, async || {
                host.leftovers().ok()?.nothing_new_since(&before).ok()
            });
            if let Err(error) = gone.await {
                let left = host.leftovers()?.nothing_new_since(&before);
                return Err(error.context(format!("killed when {what}: {left:?}\n{}", daemon.log())));
            }
            // A bridge that has lost its only port has no address until it has another. Of such a bridge (its plugin was killed between
            // the port and the bridge's own addresses) the plugin refuses one ADD for each address it gives it; kubelet tries again.
            let mut again = cri.run_pod(&config).await;
            for _family in ["IPv4", "IPv6"] {
                match again {
                    Err(refused) if refused.message().contains("could not set bridge's mac") => {
                        host.leftovers()?.nothing_new_since(&before)?;
                        again = cri.run_pod(&config).await;
                    }
                    tried => again = tried,
                }
            }
            let pod_id = again.with_context(|| format!("again, after: {what}"))?;
            cri.stop_pod(&pod_id).await?;
            cri.remove_pod(&pod_id).await?;
            host.leftovers()?.nothing_new_since(&before)?;
        }
        Ok(())
    })
}

#[test]
fn a_cni_plugin_that_outlives_a_killed_daemon_does_not_outlive_the_next_start() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let bin = host.dir().join("cni/bin");
        fs::create_dir_all(&bin)?;
        let (plugin, started) = (bin.join("slow"), bin.join("started"));
        fs::write(
            &plugin,
            format!(
                "#!/bin/sh\nif [ $CNI_COMMAND = ADD ]; then echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000; fi",
                started.display()
            ),
        )?;
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;
        let conflist = host.cni_conf_dir().join("10-pods.conflist");
        let mut slow: serde_json::Value = serde_json::from_str(&fs::read_to_string(&conflist)?)?;
        slow["plugins"]
            .as_array_mut()
            .context("no plugins")?
            .push(json!({ "type": "slow" }));
        fs::write(&conflist, slow.to_string())?;

        let more = ["--cni-bin-dir", &bin.display().to_string()];
        let mut daemon = Daemon::start(&host, &Product::find()?, &more).await?;
        let mut cri = daemon.cri().await?;
        let config = pod(&host, "slow");
        let call = tokio::spawn(async move { cri.run_pod(&config).await });
        let pid = eventually("the plugin's start", MOMENT_LIMIT, async || {
            fs::read_to_string(&started).ok()
        })
        .await?;
        daemon.kill()?;
        ensure!(call.await?.is_err(), "a killed daemon answered");
        let process = PathBuf::from("/proc").join(pid.trim());
        ensure!(process.exists(), "the plugin ended with the daemon");
        daemon.start_again().await?;
        ensure!(
            fs::read(process.join("cmdline")).unwrap_or_default().is_empty(),
            "the plugin runs on, beside its DEL"
        );
        host.leftovers()?.nothing_new_since(&before)
    })
}

/// Bytes that don't compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn a_pull_that_a_killed_daemon_left_half_done_leaves_nothing_and_can_be_tried_again() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let layer = Layer::default().file("noise", 0o644, &noise(48 << 20))?.gzip()?;
        let image = registry.push("test/large", "1", &Image::new(vec![layer], &json!({})))?;
        let mut daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let stored = |dir: &str| -> Vec<PathBuf> {
            let entries = fs::read_dir(host.dir().join("root/images").join(dir));
            entries
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect()
        };
        let mut cri = daemon.cri().await?;
        let reference = image.clone();
        let call = tokio::spawn(async move { cri.pull(&reference).await });
        eventually("the first file of the pull", MOMENT_LIMIT, async || {
            (!stored("tmp").is_empty()).then_some(())
        })
        .await?;
        ensure!(
            !call.is_finished(),
            "the pull was over before the daemon was killed"
        );
        daemon.kill()?;
        ensure!(call.await?.is_err(), "a killed daemon answered");

        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        ensure!(
            stored("tmp").is_empty() && stored("images").is_empty(),
            "left: {:?} {:?}",
            stored("tmp"),
            stored("images")
        );
        ensure!(cri.image(&image).await?.is_none(), "half an image is listed");
        cri.pull(&image).await?;
        ensure!(cri.image(&image).await?.is_some());
        ensure!(stored("tmp").is_empty(), "{:?}", stored("tmp"));
        Ok(())
    })
}

/// Connects, and waits until the other side closes.
async fn knock(address: &str) -> Result<()> {
    let address: SocketAddr = address.parse()?;
    eventually(&format!("a door at {address}"), MOMENT_LIMIT, async || {
        TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()
    })
    .await
    .map(drop)
}

#[test]
fn an_exit_while_the_daemon_is_down_keeps_its_code_its_message_and_its_output() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("test/busybox", "1", &image::busybox()?)?;
        let mut daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        cri.pull(&image).await?;
        let pod_config = pod(&host, "alone");
        let pod_id = cri.run_pod(&pod_config).await?;
        let ip = cri.pod_ips(&pod_id).await?.swap_remove(0);

        let termination = host.dir().join("termination");
        fs::write(&termination, "")?;
        let script = "echo up; nc -l -p 9000 < /dev/null; n=0; while [ $n -lt 500 ]; do echo line $n; n=$((n+1)); done; \
                      echo alone > /dev/termination-log; exit 42";
        let mut config = container("ends", &image, &["sh", "-c", script]);
        config.mounts = vec![cri::Mount {
            host_path: termination.display().to_string(),
            container_path: "/dev/termination-log".into(),
            ..Default::default()
        }];
        config.annotations = HashMap::from([(
            "io.kubernetes.container.terminationMessagePath".into(),
            "/dev/termination-log".into(),
        )]);
        let id = cri.run(&pod_id, &config, &pod_config).await?;
        // Answers as long as the container above runs: they share the pod's process namespace, not more.
        let witness = container(
            "witness",
            &image,
            &["sh", "-c", "nc -l -p 9001 < /dev/null; sleep 1000"],
        );
        let witness_id = cri.run(&pod_id, &witness, &pod_config).await?;

        daemon.kill()?;
        knock(&format!("{ip}:9000")).await?;
        knock(&format!("{ip}:9001")).await?;
        // The shell prints 500 lines and ends; nothing outside of the guest tells when.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let restarted = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        let status = cri.exited(&id).await?;
        ensure!(status.exit_code == 42 && status.reason == "Error", "{status:?}");
        ensure!(
            status.finished_at >= status.started_at
                && u128::try_from(status.finished_at)? < restarted.as_nanos(),
            "it did not end while the daemon was down: {status:?}"
        );
        ensure!(
            fs::read_to_string(&termination)? == "alone\n",
            "{:?}",
            fs::read_to_string(&termination)
        );
        let log = records(&fs::read_to_string(host.log_dir("alone")?.join("ends.log"))?)?;
        let expected: Vec<_> = std::iter::once("up".to_owned())
            .chain((0..500).map(|n| format!("line {n}")))
            .collect();
        let found: Vec<_> = log.into_iter().map(|(_, _, text)| text).collect();
        ensure!(found == expected, "the log is not what was printed: {found:?}");
        ensure!(cri.status(&witness_id).await?.state() == cri::ContainerState::ContainerRunning);
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}
