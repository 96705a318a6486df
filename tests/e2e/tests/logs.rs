//! Container logs: format, order, completeness, rotation, and what a restart of the daemon does to them: nothing.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod, records},
    daemon::{Daemon, Product},
    eventually,
    host::Host,
    image,
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;

#[test]
fn logs_are_complete_in_order_and_tagged_as_the_cri_says() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("test/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        cri.pull(&image).await?;
        let config = pod(&host, "logs");
        let pod_id = cri.run_pod(&config).await?;
        let sh = |name: &str, script: &str| container(name, &image, &["sh", "-c", script]);
        let log = |name: &str| -> Result<Vec<(String, String, String)>> {
            records(&fs::read_to_string(
                host.log_dir("logs")?.join(format!("{name}.log")),
            )?)
        };

        // Streams, an unfinished last line, and a line longer than a record: P for its parts, F for its end.
        let id = cri
            .run(
                &pod_id,
                &sh(
                    "streams",
                    "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf end",
                ),
                &config,
            )
            .await?;
        cri.exited(&id).await?;
        let all = log("streams")?;
        let of = |stream: &str| {
            all.iter()
                .filter(|r| r.0 == stream)
                .map(|r| (r.1.as_str(), r.2.as_str()))
                .collect::<Vec<_>>()
        };
        ensure!(of("stderr") == [("F", "err")], "{:?}", of("stderr"));
        let stdout = of("stdout");
        ensure!(
            stdout.first() == Some(&("F", "out")) && stdout.last().is_some_and(|last| last.1 == "end"),
            "{stdout:?}"
        );
        let long: Vec<_> = stdout[1..stdout.len() - 1].to_vec();
        ensure!(
            long.len() > 1
                && long[..long.len() - 1].iter().all(|part| part.0 == "P")
                && long[long.len() - 1].0 == "F"
        );
        ensure!(
            long.iter().map(|part| part.1.len()).sum::<usize>() == 40000,
            "bytes of the long line were lost"
        );

        // Complete at the moment at which the exit is visible, though a grandchild holds the pipe.
        let id = cri
            .run(&pod_id, &sh("grandchild", "sleep 1000 & seq 1 20000"), &config)
            .await?;
        cri.exited(&id).await?;
        let numbers: Vec<String> = log("grandchild")?.into_iter().map(|r| r.2).collect();
        ensure!(
            numbers == (1..=20000).map(|n| n.to_string()).collect::<Vec<_>>(),
            "{} of 20000 lines",
            numbers.len()
        );

        // Rotation: kubelet renames the file and asks for a new one.
        let id = cri
            .run(
                &pod_id,
                &sh(
                    "rotated",
                    "n=0; while true; do echo $n; n=$((n+1)); usleep 2000; done",
                ),
                &config,
            )
            .await?;
        let path = host.log_dir("logs")?.join("rotated.log");
        let lines = async |at_least: usize| {
            eventually("log lines", Duration::from_secs(30), async || {
                fs::read_to_string(&path)
                    .ok()
                    .filter(|text| text.lines().count() >= at_least)
            })
            .await
        };
        lines(20).await?;
        let old = path.with_extension("log.1");
        fs::rename(&path, &old)?;
        cri.runtime
            .reopen_container_log(cri::ReopenContainerLogRequest {
                container_id: id.clone(),
            })
            .await?;
        lines(20).await?;
        cri.stop(&id, 0).await?;
        let count: Vec<String> = records(&(fs::read_to_string(&old)? + &fs::read_to_string(&path)?))?
            .into_iter()
            .map(|r| r.2)
            .collect();
        ensure!(
            count == (0..count.len()).map(|n| n.to_string()).collect::<Vec<_>>(),
            "lines were lost or repeated by rotation"
        );
        let error = cri
            .runtime
            .reopen_container_log(cri::ReopenContainerLogRequest { container_id: id })
            .await
            .err()
            .context("the log of an exited container was reopened")?;
        ensure!(!error.message().is_empty());
        Ok(())
    })
}

/// Counts without a gap: each line once.
fn consecutive(text: &str) -> Result<usize> {
    let numbers: Vec<String> = records(text)?.into_iter().map(|r| r.2).collect();
    for (expected, number) in numbers.iter().enumerate() {
        ensure!(
            *number == expected.to_string(),
            "expected line {expected}, found {number}: lost or repeated"
        );
    }
    Ok(numbers.len())
}

#[test]
fn a_restarted_daemon_finds_its_pods_and_loses_no_line() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("test/busybox", "1", &image::busybox()?)?;
        let mut daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        cri.pull(&image).await?;
        let config = pod(&host, "restart");
        let pod_id = cri.run_pod(&config).await?;
        let ips = cri.pod_ips(&pod_id).await?;
        let counter = container(
            "counter",
            &image,
            &[
                "sh",
                "-c",
                "n=0; while true; do echo $n; n=$((n+1)); usleep 5000; done",
            ],
        );
        let id = cri.run(&pod_id, &counter, &config).await?;
        let ends = cri
            .run(
                &pod_id,
                &container("ends", &image, &["sh", "-c", "sleep 1; echo bye; exit 5"]),
                &config,
            )
            .await?;
        let vm = host.leftovers()?.processes;
        let path = host.log_dir("restart")?.join("counter.log");
        let lines = async |at_least: usize| {
            eventually("log lines", Duration::from_secs(30), async || {
                fs::read_to_string(&path)
                    .ok()
                    .map(|text| text.lines().count())
                    .filter(|count| *count >= at_least)
            })
            .await
        };

        for round in 0..2 {
            let written = lines(50).await?;
            // Once politely, once not.
            if round == 0 {
                daemon.terminate().await?
            } else {
                daemon.kill()?
            }
            daemon.start_again().await?;
            cri = daemon.cri().await?;
            let (status, _) = cri.pod_status(&pod_id).await?;
            ensure!(
                status.state() == cri::PodSandboxState::SandboxReady,
                "the pod was lost: {status:?}\n{}",
                daemon.log()
            );
            ensure!(cri.pod_ips(&pod_id).await? == ips, "the pod's addresses changed");
            ensure!(
                host.leftovers()?.processes == vm,
                "the VM's processes are not those of before"
            );
            ensure!(cri.status(&id).await?.state() == cri::ContainerState::ContainerRunning);
            lines(written + 50).await?;
        }
        // An exit that happened while nobody looked, or right after, keeps its code and its output.
        let status = cri.exited(&ends).await?;
        ensure!(status.exit_code == 5, "{status:?}");
        ensure!(
            records(&fs::read_to_string(host.log_dir("restart")?.join("ends.log"))?)?
                .iter()
                .any(|r| r.2 == "bye")
        );
        let (code, stdout, _) = cri.exec(&id, &["echo", "still here"]).await?;
        ensure!(code == 0 && stdout == "still here\n");
        cri.stop(&id, 0).await?;
        let count = consecutive(&fs::read_to_string(&path)?)?;
        ensure!(count >= 150, "only {count} lines");
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}
