//! What a container must not reach: the agent's vsock ports, from inside, however privileged; and what is left to the processes of a VM
//! that it has broken out of.

use std::{collections::BTreeSet, fs, process::Command};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod, security},
    daemon::{Daemon, Product},
    host::{Host, command},
    image::{self, Image, Layer},
    node::{Node, node},
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;
use serde_json::json;

/// Tries to make a vsock socket and to connect it to every CID that could be the agent or the host; prints what happened.
const PROBE: &str = r#"
#include <stdio.h>
#include <string.h>
#include <errno.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/vm_sockets.h>
int main(int argc, char **argv) {
    unsigned cids[] = {1, 2, 3, 0xffffffff};
    unsigned ports[] = {1021, 1022};
    for (int c = 0; c < 4; c++) for (int p = 0; p < 2; p++) {
        int s = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (s < 0) { printf("socket: %s\n", strerror(errno)); continue; }
        struct sockaddr_vm a = { .svm_family = AF_VSOCK, .svm_cid = cids[c], .svm_port = ports[p] };
        if (connect(s, (struct sockaddr *)&a, sizeof a) == 0) printf("CONNECTED cid %u port %u\n", cids[c], ports[p]);
        else printf("connect: %s\n", strerror(errno));
        close(s);
    }
    return 0;
}
"#;

#[test]
fn no_container_reaches_anything_by_vsock_whether_privileged_or_not() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let source = host.dir().join("probe.c");
        let binary = host.dir().join("probe");
        fs::write(&source, PROBE)?;
        command(
            Command::new("gcc")
                .args(["-O1", "-static", "-o"])
                .arg(&binary)
                .arg(&source),
        )?;
        let probe = Layer::default()
            .file("probe", 0o755, &fs::read(&binary)?)?
            .gzip()?;
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push(
            "test/probe",
            "1",
            &Image::new(vec![image::busybox_layer()?, probe], &json!({})),
        )?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        cri.pull(&image).await?;
        let mut config = pod(&host, "isolation");
        config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        });
        let pod_id = cri.run_pod(&config).await?;
        let confined = cri::SecurityProfile::default();
        for (name, privileged, user, seccomp) in [
            ("unprivileged", false, 65534, None),
            ("root", false, 0, None),
            ("privileged", true, 0, None),
            ("confined", false, 0, Some(confined)),
        ] {
            let mut probe = container(name, &image, &["/probe"]);
            probe.linux.get_or_insert_default().security_context = Some(cri::LinuxContainerSecurityContext {
                privileged,
                run_as_user: Some(cri::Int64Value { value: user }),
                seccomp: seccomp.clone(),
                ..Default::default()
            });
            let id = cri.run(&pod_id, &probe, &config).await?;
            let status = cri.exited(&id).await?;
            let log = fs::read_to_string(host.log_dir("isolation")?.join(format!("{name}.log")))?;
            ensure!(status.exit_code == 0, "{status:?} {log}");
            ensure!(!log.contains("CONNECTED"), "{name}: {log}");
            // A profile keeps the socket away, the default one of AppArmor if no filter does; without either there is a socket, and
            // nobody at its other end.
            let refused = if privileged { "connect: " } else { "socket: " };
            ensure!(
                log.lines().count() == 8 && log.lines().all(|line| line.contains(refused)),
                "{name}: {log}"
            );
        }
        Ok(())
    })
}

/// Every file below `dir`, and what is in it.
fn contents(dir: &std::path::Path) -> Result<std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>> {
    let mut found = std::collections::BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.append(&mut contents(&path)?);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "metadata" || extension == "layer")
        {
            let content = fs::read(&path)?;
            found.insert(path, content);
        }
    }
    Ok(found)
}

#[test]
fn a_privileged_container_cannot_change_the_image_it_runs_from() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let images = host.dir().join("root/images");
        let before = contents(&images)?;
        ensure!(!before.is_empty(), "no image below {}", images.display());
        let mut config = pod(&host, "vandal");
        config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        });
        let pod_id = cri.run_pod(&config).await?;
        let mut vandal = container("vandal", &image, &["sleep", "100000"]);
        security(&mut vandal).privileged = true;
        let id = cri.run(&pod_id, &vandal, &config).await?;
        // Every disk that says it is read-only, made writable as far as the guest's kernel lets one, and written.
        let script = r#"
            tried=0
            for disk in /sys/block/vd*; do
                [ "$(cat $disk/ro)" = 1 ] || continue
                tried=$((tried + 1))
                numbers=$(cat $disk/dev)
                mknod /tmp/disk$tried b ${numbers%:*} ${numbers#*:} || exit 3
                blockdev --setrw /tmp/disk$tried 2>/dev/null
                dd if=/dev/zero of=/tmp/disk$tried bs=4096 count=1 conv=fsync 2>&1 && exit 4
            done
            echo tried $tried
            [ $tried -gt 0 ]
        "#;
        let (code, said, error) = cri.exec(&id, &["sh", "-c", script]).await?;
        ensure!(code == 0, "{code}: {said}{error}");
        ensure!(contents(&images)? == before, "an image changed: {said}");
        Ok(())
    })
}

/// The user of a VM's process that is confined as every one must be.
fn confined_user(pid: &str, network_of_daemon: &std::path::Path) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for line in [
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        ensure!(status.contains(line), "{pid}: {line:?} is not in {status}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let cores = limits.lines().find(|line| line.starts_with("Max core file size"));
    ensure!(
        cores.is_some_and(|line| line.split_whitespace().skip(4).take(2).all(|limit| limit == "0")),
        "process {pid} may leave its memory in a file: {cores:?}"
    );
    ensure!(
        fs::read_link(format!("/proc/{pid}/ns/net"))? != network_of_daemon,
        "process {pid} is in the daemon's network namespace"
    );
    let mut users = BTreeSet::new();
    for name in ["Uid:", "Gid:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        for id in line.context("no ids")?.split_ascii_whitespace() {
            users.insert(id.parse()?);
        }
    }
    ensure!(
        users.len() == 1,
        "process {pid} has several identities: {users:?}"
    );
    users.pop_first().context("no user")
}

#[test]
fn a_vm_runs_as_a_user_of_its_own_without_capabilities() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let before = host.leftovers()?.processes;
        let mut daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let network = fs::read_link(format!("/proc/{}/ns/net", daemon.pid()))?;
        let mut cri = daemon.cri().await?;
        let mut users = BTreeSet::new();
        let mut known = before.clone();
        for name in ["first", "second"] {
            cri.run_pod(&pod(&host, name)).await?;
            let now = host.leftovers()?.processes;
            let new: Vec<_> = now.difference(&known).collect();
            // QEMU's socket device is a process of its own; the built-in VMM has it inside.
            let builtin = new.iter().any(|process| process.contains("caisson-vmm"));
            ensure!(
                new.len() == if builtin { 1 } else { 2 },
                "a VM's processes: {new:?}"
            );
            let pids = new.iter().filter_map(|process| process.split(' ').next());
            let mut of_pod = BTreeSet::new();
            for pid in pids {
                of_pod.insert(confined_user(pid, &network)?);
            }
            ensure!(of_pod.len() == 1, "one VM, several users: {of_pod:?}");
            ensure!(
                of_pod.first().is_some_and(|user| *user >= 65_536),
                "a user that the node knows: {of_pod:?}"
            );
            ensure!(users.is_disjoint(&of_pod), "two VMs, one user: {of_pod:?}");
            users.append(&mut of_pod);
            known = now;
        }

        // A later daemon takes over what it could not have started as itself, and ends it.
        daemon.kill()?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        ensure!(host.leftovers()?.processes == known, "the VMs did not survive");
        for pod in cri.pods().await? {
            ensure!(pod.state == cri::PodSandboxState::SandboxReady as i32, "{pod:?}");
            cri.stop_pod(&pod.id).await?;
            cri.remove_pod(&pod.id).await?;
        }
        ensure!(host.leftovers()?.processes == before, "VMs are left");
        Ok(())
    })
}
