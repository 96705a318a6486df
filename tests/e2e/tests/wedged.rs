//! Guests that hang, agents that are not heard, VMs that die, with every kind of call under way: stop and remove end all the same, and so
//! does whatever was under way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    host::Host,
    node::{Node, node},
    run,
};
use k8s_cri::v1 as cri;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A hang has no end; whatever ends, ends long before this on any machine. The containers' own times are far longer.
const BOUND: Duration = Duration::from_secs(60);

/// Grace period and sleeps of containers, in seconds.
const LONG: i64 = 100_000;

/// What runs the guest.
const VMM: [&str; 2] = ["qemu-system", "caisson-vmm"];
/// What carries the agent's words out of it.
const VSOCK: [&str; 2] = ["vhost-vsock", "caisson-vmm"];

/// Sends `signal` to the processes of the only VM whose program is one of these, whichever the driver has.
fn strike(host: &Host, programs: [&str; 2], signal: Signal) -> Result<()> {
    let processes = host.leftovers()?.processes;
    let struck: Vec<_> = processes
        .iter()
        .filter(|process| programs.iter().any(|program| process.contains(program)))
        .collect();
    ensure!(!struck.is_empty(), "none of {programs:?} among {processes:?}");
    for process in struck {
        let pid = process.split(' ').next().context("no pid")?.parse()?;
        kill(Pid::from_raw(pid), signal)?;
    }
    Ok(())
}

/// Strikes a pod with an exec, a stop and a wait under way, tries a creation and a list, and takes the pod down.
fn everything_ends(programs: [&str; 2], signal: Signal) -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "struck");
        let pod_id = cri.run_pod(&config).await?;
        let stubborn = ["sh", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"];
        let one = cri
            .run(&pod_id, &container("one", &image, &stubborn), &config)
            .await?;
        let two = cri
            .run(&pod_id, &container("two", &image, &stubborn), &config)
            .await?;
        let mut asker = cri.clone();
        let exec_id = two.clone();
        let exec = tokio::spawn(async move {
            let words = ["sh", "-c", "echo begun >/begun; sleep 100000"];
            asker.exec_within(&exec_id, &words, LONG).await.map(drop)
        });
        // The command runs: it can be seen.
        caisson_e2e::eventually("the command's file", BOUND, async || {
            let (code, ..) = cri.exec(&two, &["test", "-e", "/begun"]).await.ok()?;
            (code == 0).then_some(())
        })
        .await?;
        let (mut asker, stop_id) = (cri.clone(), one.clone());
        let stop = tokio::spawn(async move { asker.stop(&stop_id, LONG).await });

        strike(&host, programs, signal)?;
        let mut asker = cri.clone();
        let (late, late_pod, sandbox) = (
            container("late", &image, &stubborn),
            config.clone(),
            pod_id.clone(),
        );
        let create = tokio::spawn(async move { asker.create(&sandbox, &late, &late_pod).await.map(drop) });
        // A list is not held up by one guest.
        let request = cri::ListContainerStatsRequest::default();
        tokio::time::timeout(BOUND, cri.runtime.list_container_stats(request))
            .await
            .context("a list of statistics hangs")??;
        ensure!(tokio::time::timeout(BOUND, cri.pods()).await??.len() == 1);

        tokio::time::timeout(BOUND, cri.stop_pod(&pod_id))
            .await
            .context("StopPodSandbox hangs")??;
        for (what, call) in [("exec", exec), ("stop", stop), ("creation", create)] {
            // Failed or not: each has an answer.
            let _answer = tokio::time::timeout(BOUND, call)
                .await
                .with_context(|| format!("the {what} that was under way hangs"))??
                .is_ok();
        }
        for id in [&one, &two] {
            let status = cri.status(id).await?;
            ensure!(
                status.state() == cri::ContainerState::ContainerExited,
                "{status:?}"
            );
        }
        tokio::time::timeout(BOUND, cri.remove_pod(&pod_id))
            .await
            .context("RemovePodSandbox hangs")??;
        ensure!(cri.pods().await?.is_empty());
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn a_guest_that_hangs_holds_up_neither_stop_nor_what_was_under_way() -> Result<()> {
    everything_ends(VMM, Signal::SIGSTOP)
}

#[test]
fn an_agent_that_cannot_be_heard_holds_up_neither_stop_nor_what_was_under_way() -> Result<()> {
    everything_ends(VSOCK, Signal::SIGSTOP)
}

#[test]
fn a_vm_that_dies_holds_up_neither_stop_nor_what_was_under_way() -> Result<()> {
    everything_ends(VMM, Signal::SIGKILL)
}

#[test]
fn an_agent_that_dies_takes_its_vm_along_and_the_pod_is_not_ready() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        // A pod that sees the guest's processes as a node's, and whose root may end them.
        let options = cri::NamespaceOption {
            pid: cri::NamespaceMode::Node.into(),
            ..Default::default()
        };
        let mut config = pod(&host, "headless");
        config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options.clone()),
            ..Default::default()
        });
        let pod_id = cri.run_pod(&config).await?;
        let mut killer = container("killer", &image, &["sleep", "100000"]);
        caisson_e2e::cri::security(&mut killer).namespace_options = Some(options);
        let id = cri.run(&pod_id, &killer, &config).await?;
        let (_, processes, _) = cri.exec(&id, &["ps"]).await?;
        let agent = processes
            .lines()
            .find(|line| line.contains("caisson-agent agent"))
            .and_then(|line| line.split_whitespace().next())
            .context("no agent among the guest's processes")?;
        // Its answer, if any, was the agent's to give.
        let answer = tokio::time::timeout(BOUND, cri.exec(&id, &["kill", "-KILL", agent]))
            .await
            .context("the command that killed the agent hangs")?;
        ensure!(answer.is_err(), "{answer:?}");

        // Without an agent nobody learns how containers end: init switches the VM off, and the pod is seen to be gone.
        caisson_e2e::eventually("the pod's end", BOUND, async || {
            let (status, _) = cri.pod_status(&pod_id).await.ok()?;
            (status.state() == cri::PodSandboxState::SandboxNotready).then_some(())
        })
        .await?;
        caisson_e2e::eventually("the end of the VM's processes", BOUND, async || {
            let left = host.leftovers().ok()?.processes;
            left.is_subset(&before.processes).then_some(())
        })
        .await?;
        let status = cri.status(&id).await?;
        ensure!(
            status.state() == cri::ContainerState::ContainerExited && status.exit_code != 0,
            "{status:?}"
        );
        let refused = cri.exec(&id, &["true"]).await;
        ensure!(refused.is_err(), "a command ran without an agent: {refused:?}");
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn a_pod_whose_guest_hangs_over_a_restart_of_the_daemon_is_ready_again_when_it_wakes() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "asleep");
        let pod_id = cri.run_pod(&config).await?;
        let id = cri
            .run(&pod_id, &container("c", &image, &["sleep", "100000"]), &config)
            .await?;
        let started_at = cri.status(&id).await?.started_at;
        daemon.kill()?;
        strike(&host, VMM, Signal::SIGSTOP)?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        let (status, info) = cri.pod_status(&pod_id).await?;
        ensure!(
            status.state() == cri::PodSandboxState::SandboxNotready,
            "{info:?}"
        );
        ensure!(cri.status(&id).await?.state() == cri::ContainerState::ContainerUnknown);
        strike(&host, VMM, Signal::SIGCONT)?;
        caisson_e2e::eventually("the pod's return", BOUND * 2, async || {
            let (status, _) = cri.pod_status(&pod_id).await.ok()?;
            (status.state() == cri::PodSandboxState::SandboxReady).then_some(())
        })
        .await?;
        let status = cri.status(&id).await?;
        ensure!(status.state() == cri::ContainerState::ContainerRunning && status.started_at == started_at);
        ensure!(cri.exec(&id, &["true"]).await?.0 == 0);
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}
