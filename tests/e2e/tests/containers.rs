//! Life of containers in a pod, as kubelet drives it: what they are given, how they end, and who sees whom.

use std::{collections::HashMap, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod, security},
    eventually,
    host::Host,
    node::{Node, node, outcome},
    run,
};
use k8s_cri::v1 as cri;

#[test]
fn containers_have_the_semantics_that_kubelet_relies_on() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let mut pod_config = pod(&host, "semantics");
        pod_config.linux.get_or_insert_default().sysctls =
            HashMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "1".into())]);
        let pod_id = cri.run_pod(&pod_config).await?;
        let sh = |name: &str, script: &str| container(name, &image, &["sh", "-c", script]);
        macro_rules! check {
            ($config:expr) => {
                outcome(&mut cri, &host, &pod_id, &pod_config, &$config).await?
            };
        }

        // Exit codes, signals, environment, working directory, arguments.
        let (status, _) = check!(sh("exit", "exit 7"));
        ensure!(status.exit_code == 7 && status.reason == "Error", "{status:?}");
        let (status, _) = check!(sh("ok", "true"));
        ensure!(
            status.exit_code == 0 && status.reason == "Completed",
            "{status:?}"
        );
        let (status, _) = check!(sh("signal", "kill -KILL $$"));
        ensure!(status.exit_code == 137 || status.exit_code == 0, "{status:?}");
        let mut config = sh(
            "environment",
            "echo $GREETING from $PWD on $(hostname); echo $0 $1",
        );
        config.envs = vec![cri::KeyValue {
            key: "GREETING".into(),
            value: "hello".into(),
        }];
        config.working_dir = "/www/deeper".into();
        config.args = vec!["zero".into(), "one".into()];
        let (_, log) = check!(config);
        ensure!(
            log == "hello from /www/deeper on semantics\nzero one\n",
            "{log:?}"
        );

        // Users by number and by name, with groups of the image and of the request.
        let mut config = sh("by-name", "id -u; id -g; id -G");
        security(&mut config).run_as_username = "www-data".into();
        security(&mut config).supplemental_groups = vec![4242];
        let (status, log) = check!(config);
        ensure!(
            log == "33\n33\n33 29 4242\n" || log == "33\n33\n33 4242 29\n",
            "{log:?}"
        );
        let user = status
            .user
            .and_then(|user| user.linux)
            .context("no user in the status")?;
        ensure!(user.uid == 33 && user.gid == 33, "{user:?}");
        let mut config = sh("by-number", "id -u; id -g");
        security(&mut config).run_as_user = Some(cri::Int64Value { value: 1000 });
        security(&mut config).run_as_group = Some(cri::Int64Value { value: 3000 });
        ensure!(check!(config).1 == "1000\n3000\n");

        // Capabilities: the usual set, none, one more; no new privileges.
        let caps = |log: &str, line: &str| {
            log.lines()
                .find(|l| l.starts_with(line))
                .map(|l| l.split_whitespace().last().unwrap_or("").to_owned())
        };
        let (_, log) = check!(sh("caps", "cat /proc/self/status"));
        ensure!(
            caps(&log, "CapEff").as_deref() == Some("00000000a80425fb"),
            "{log}"
        );
        ensure!(caps(&log, "NoNewPrivs").as_deref() == Some("0"), "{log}");
        let mut config = sh("no-caps", "cat /proc/self/status");
        security(&mut config).capabilities = Some(cri::Capability {
            drop_capabilities: vec!["ALL".into()],
            ..Default::default()
        });
        security(&mut config).no_new_privs = true;
        let (_, log) = check!(config);
        ensure!(
            caps(&log, "CapBnd").as_deref() == Some("0000000000000000"),
            "{log}"
        );
        ensure!(caps(&log, "NoNewPrivs").as_deref() == Some("1"), "{log}");
        let mut config = sh(
            "net-admin",
            "ip link add name other0 type dummy 2>/dev/null; cat /proc/self/status",
        );
        security(&mut config).capabilities = Some(cri::Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            ..Default::default()
        });
        let (_, log) = check!(config);
        ensure!(
            caps(&log, "CapEff").as_deref() == Some("00000000a80435fb"),
            "{log}"
        );

        // File systems: read-only root, masked and read-only paths, /dev, /dev/shm, /proc of the container's own.
        let mut config = sh(
            "read-only",
            "touch /x 2>&1; touch /dev/shm/y && echo shm; ps | wc -l",
        );
        security(&mut config).readonly_rootfs = true;
        let (_, log) = check!(config);
        ensure!(
            log.contains("Read-only file system") && log.contains("shm\n"),
            "{log}"
        );
        let mut config = sh(
            "masked",
            "cat /proc/timer_list | wc -c; echo 1 > /proc/sys/kernel/pid_max; ls /proc/acpi | wc -l; cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        );
        security(&mut config).masked_paths = vec!["/proc/timer_list".into(), "/proc/acpi".into()];
        security(&mut config).readonly_paths = vec!["/proc/sys".into()];
        let (_, log) = check!(config);
        ensure!(
            log.starts_with("0\n") && log.contains("Read-only file system") && log.ends_with("0\n1\n"),
            "{log}"
        );
        let (_, log) = check!(sh(
            "devices",
            "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; ls -d /dev/pts /dev/mqueue; echo x > /dev/null && dd if=/dev/zero bs=1 count=3 2>/dev/null | wc -c"
        ));
        ensure!(log == "/dev/mqueue\n/dev/pts\n3\n", "{log}");

        // What users see when they mistype.
        let id = cri
            .create(
                &pod_id,
                &container("typo", &image, &["no-such-program"]),
                &pod_config,
            )
            .await?;
        let error = cri
            .start(&id)
            .await
            .err()
            .context("a program that does not exist was started")?;
        ensure!(
            error
                .message()
                .contains("exec: \"no-such-program\": executable file not found in $PATH"),
            "{error}"
        );
        let status = cri.status(&id).await?;
        ensure!(
            status.state() == cri::ContainerState::ContainerExited
                && status.exit_code == 128
                && status.reason == "StartError",
            "{status:?}"
        );
        cri.remove(&id).await?;
        let id = cri
            .create(
                &pod_id,
                &container("path-typo", &image, &["/no/such"]),
                &pod_config,
            )
            .await?;
        let error = cri
            .start(&id)
            .await
            .err()
            .context("a program that does not exist was started")?;
        ensure!(error.message().contains("no such file or directory"), "{error}");
        cri.remove(&id).await?;

        // A terminal: one stream, carriage returns.
        let mut config = sh(
            "terminal",
            "test -t 0 && test -t 1 && echo terminal; stty size >/dev/null && echo sized",
        );
        config.tty = true;
        let (_, log) = check!(config);
        ensure!(log.contains("terminal"), "{log:?}");

        // Memory limit: the kernel kills, and it is called by its name.
        // tail keeps a line that never ends.
        let mut config = container("oom", &image, &["tail", "-n", "1", "/dev/zero"]);
        config.linux.get_or_insert_default().resources = Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            ..Default::default()
        });
        let (status, _) = check!(config);
        ensure!(
            status.reason == "OOMKilled" && status.exit_code == 137,
            "{status:?}"
        );

        // ExecSync: output apart, exit code, deadline, no such program.
        let sleeper = cri
            .run(&pod_id, &sh("sleeper", "sleep 1000"), &pod_config)
            .await?;
        let (code, stdout, stderr) = cri
            .exec(&sleeper, &["sh", "-c", "echo out; echo err >&2; exit 3"])
            .await?;
        ensure!(
            (code, stdout.as_str(), stderr.as_str()) == (3, "out\n", "err\n"),
            "{code} {stdout:?} {stderr:?}"
        );
        let error = cri
            .exec_within(&sleeper, &["sh", "-c", "sleep 777; true"], 1)
            .await
            .err()
            .context("sleep 777 ended within a second")?;
        ensure!(error.code() == tonic::Code::DeadlineExceeded, "{error}");
        let mut watcher = cri.clone();
        eventually(
            "the end of the command and its child",
            Duration::from_secs(20),
            async || {
                let (_, processes, _) = watcher.exec(&sleeper, &["ps"]).await.ok()?;
                (!processes.contains("sleep 777")).then_some(())
            },
        )
        .await?;
        ensure!(cri.exec(&sleeper, &["no-such-program"]).await.is_err());
        let big = cri
            .exec(&sleeper, &["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"])
            .await?;
        ensure!(
            big.1.len() == 3_000_000,
            "{} of 3000000 bytes arrived",
            big.1.len()
        );

        // A process that ignores SIGTERM is killed after its grace.
        let config = sh(
            "stubborn",
            "trap '' TERM; echo ready; while true; do sleep 1; done",
        );
        let stubborn = cri.run(&pod_id, &config, &pod_config).await?;
        let log = host.log_dir("semantics")?.join("stubborn.log");
        eventually("the trap", Duration::from_secs(20), async || {
            fs::read_to_string(&log).ok().filter(|log| log.contains("ready"))
        })
        .await?;
        cri.stop(&stubborn, 1).await?;
        let status = cri.status(&stubborn).await?;
        ensure!(status.exit_code == 137, "{status:?}");

        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn mounts_that_kubelet_always_passes_work() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let pod_config = pod(&host, "mounts");
        let pod_id = cri.run_pod(&pod_config).await?;

        // As kubelet lays them out: a hosts file, a projected volume with its ..data link, a termination file.
        let files = host.dir().join("kubelet");
        let volume = files.join("token");
        fs::create_dir_all(volume.join("..2026_11_21"))?;
        fs::write(volume.join("..2026_11_21/token"), "secret")?;
        std::os::unix::fs::symlink("..2026_11_21", volume.join("..data"))?;
        std::os::unix::fs::symlink("..data/token", volume.join("token"))?;
        fs::write(files.join("etc-hosts"), "127.0.0.1 localhost\n10.1.2.3 friend\n")?;
        let termination = files.join("termination");
        fs::write(&termination, "")?;
        let mount = |host_path: &std::path::Path, container_path: &str, readonly| cri::Mount {
            host_path: host_path.display().to_string(),
            container_path: container_path.into(),
            readonly,
            ..Default::default()
        };
        let script = "cat /etc/hosts /var/run/secrets/token/token; echo; readlink /var/run/secrets/token/token; \
                      touch /var/run/secrets/token/x 2>&1; cat /etc/resolv.conf; echo farewell > /dev/termination-log";
        let mut config = container("mounts", &image, &["sh", "-c", script]);
        config.mounts = vec![
            mount(&files.join("etc-hosts"), "/etc/hosts", false),
            mount(&volume, "/var/run/secrets/token", true),
            mount(&termination, "/dev/termination-log", false),
        ];
        config.annotations = HashMap::from([(
            "io.kubernetes.container.terminationMessagePath".into(),
            "/dev/termination-log".into(),
        )]);
        let id = cri.run(&pod_id, &config, &pod_config).await?;
        let status = cri.exited(&id).await?;
        // Visible as soon as the exit is.
        ensure!(
            fs::read_to_string(&termination)? == "farewell\n",
            "{:?}",
            fs::read_to_string(&termination)
        );
        ensure!(status.mounts.len() == 3, "{status:?}");
        let log = fs::read_to_string(host.log_dir("mounts")?.join("mounts.log"))?;
        for expected in [
            "10.1.2.3 friend",
            "secret",
            "..data/token",
            "Read-only file system",
            "nameserver 10.96.0.10",
            "search default.svc",
        ] {
            ensure!(log.contains(expected), "no {expected:?} in {log}");
        }

        // What does not work yet is refused by the name of its field, never ignored.
        let mut missing = container("missing", &image, &["true"]);
        missing.mounts = vec![mount(&files.join("nowhere"), "/data", true)];
        let error = cri
            .create(&pod_id, &missing, &pod_config)
            .await
            .err()
            .context("a missing hostPath was accepted")?;
        ensure!(error.message().contains("nowhere"), "{error}");
        let mut device = container("device", &image, &["true"]);
        device.devices = vec![cri::Device {
            container_path: "/dev/terminals".into(),
            host_path: "/dev/ptmx".into(),
            permissions: "rw".into(),
        }];
        let error = cri
            .create(&pod_id, &device, &pod_config)
            .await
            .err()
            .context("a device was accepted")?;
        ensure!(error.message().contains("devices"), "{error}");
        Ok(())
    })
}

#[test]
fn containers_share_a_pid_namespace_when_asked_and_never_see_the_agent() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let options = cri::NamespaceOption {
            pid: cri::NamespaceMode::Pod.into(),
            ..Default::default()
        };
        let mut pod_config = pod(&host, "shared");
        pod_config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options.clone()),
            ..Default::default()
        });
        let pod_id = cri.run_pod(&pod_config).await?;
        let mut first = container("first", &image, &["sleep", "4321"]);
        security(&mut first).namespace_options = Some(options.clone());
        cri.run(&pod_id, &first, &pod_config).await?;
        let mut second = container("second", &image, &["sleep", "1234"]);
        security(&mut second).namespace_options = Some(options);
        let second = cri.run(&pod_id, &second, &pod_config).await?;
        let (_, processes, _) = cri.exec(&second, &["ps"]).await?;
        ensure!(
            processes.contains("sleep 4321") && processes.contains("sleep 1234"),
            "{processes}"
        );
        let mut apart = container("apart", &image, &["sleep", "99"]);
        security(&mut apart).namespace_options = Some(cri::NamespaceOption {
            pid: cri::NamespaceMode::Container.into(),
            ..Default::default()
        });
        let apart = cri.run(&pod_id, &apart, &pod_config).await?;
        let (_, processes, _) = cri.exec(&apart, &["ps"]).await?;
        ensure!(!processes.contains("sleep 4321"), "{processes}");
        for id in [&second, &apart] {
            let (_, names, _) = cri
                .exec(id, &["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"])
                .await?;
            ensure!(
                !names.contains("caisson-agent agent") && !names.contains("/init agent"),
                "a container sees the agent: {names}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_command_whose_caller_has_gone_is_killed() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "gone");
        let pod_id = cri.run_pod(&config).await?;
        let id = cri
            .run(&pod_id, &container("c", &image, &["sleep", "1000"]), &config)
            .await?;
        let mut caller = cri.clone();
        let container_id = id.clone();
        let call = tokio::spawn(async move { caller.exec_within(&container_id, &["sleep", "777"], 0).await });
        let processes = async |cri: &mut Cri| -> Option<usize> {
            let (_, listed, _) = cri.exec(&id, &["ps"]).await.ok()?;
            Some(listed.lines().filter(|line| line.contains("sleep 777")).count())
        };
        let mut watcher = cri.clone();
        eventually("the command's start", Duration::from_secs(20), async || {
            processes(&mut watcher).await.filter(|count| *count > 0)
        })
        .await?;
        call.abort();
        eventually("the command's end", Duration::from_secs(20), async || {
            processes(&mut watcher).await.filter(|count| *count == 0)
        })
        .await?;
        Ok(())
    })
}

#[test]
fn the_guest_stands_in_for_the_host_whose_processes_a_pod_asks_to_see() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let options = cri::NamespaceOption {
            pid: cri::NamespaceMode::Node.into(),
            ..Default::default()
        };
        let mut pod_config = pod(&host, "node-pids");
        pod_config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options.clone()),
            ..Default::default()
        });
        let pod_id = cri.run_pod(&pod_config).await?;
        let (status, _) = cri.pod_status(&pod_id).await?;
        let shown = status.linux.and_then(|linux| linux.namespaces?.options);
        ensure!(
            shown.as_ref().map(|options| options.pid) == Some(options.pid),
            "{shown:?}"
        );
        let mut first = container("first", &image, &["sleep", "4321"]);
        security(&mut first).namespace_options = Some(options.clone());
        let first = cri.run(&pod_id, &first, &pod_config).await?;
        let mut second = container("second", &image, &["sleep", "1234"]);
        security(&mut second).namespace_options = Some(options);
        let second = cri.run(&pod_id, &second, &pod_config).await?;
        let (_, processes, _) = cri.exec(&second, &["ps"]).await?;
        for name in ["sleep 4321", "sleep 1234", "caisson-agent agent", "[kthreadd]"] {
            ensure!(processes.contains(name), "no {name} in {processes}");
        }
        // Seen, and no more: neither init nor agent can be looked into.
        let agent = processes
            .lines()
            .find(|line| line.contains("caisson-agent agent"))
            .and_then(|line| line.split_whitespace().next())
            .context("no agent")?;
        for pid in ["1", agent] {
            for look in [
                format!("cat /proc/{pid}/environ"),
                format!("head -c 1 /proc/{pid}/mem"),
                format!("ls /proc/{pid}/root/"),
                format!("readlink /proc/{pid}/exe"),
                format!("readlink /proc/{pid}/fd/0"),
            ] {
                let (code, seen, _) = cri.exec(&second, &["sh", "-c", &look]).await?;
                ensure!(code != 0, "{look}: {seen}");
            }
        }
        // What a container leaves behind ends with it, though nothing else ends.
        cri.exec(&first, &["sh", "-c", "setsid sleep 999 >/dev/null 2>&1 &"])
            .await?;
        cri.stop(&first, 0).await?;
        let mut watcher = cri.clone();
        eventually("the end of what was left", Duration::from_secs(20), async || {
            let (_, processes, _) = watcher.exec(&second, &["ps"]).await.ok()?;
            (!processes.contains("sleep 999") && !processes.contains("sleep 4321")).then_some(())
        })
        .await
    })
}
