//! What a container may do to its own guest: seccomp profiles.

use std::fs;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod, security},
    host::Host,
    node::{Node, node, outcome},
    run,
};
use k8s_cri::v1::{self as cri, security_profile::ProfileType};

fn profile(kind: ProfileType, path: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: path.into(),
    })
}

/// The value of a line of /proc/PID/status.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().last())
}

#[test]
fn seccomp_profiles_hold_for_containers_and_for_commands_run_in_them() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let pod_config = pod(&host, "seccomp");
        let pod_id = cri.run_pod(&pod_config).await?;
        let sh = |name: &str, script: &str| container(name, &image, &["sh", "-c", script]);
        macro_rules! check {
            ($config:expr) => {
                outcome(&mut cri, &host, &pod_id, &pod_config, &$config).await?
            };
        }

        // None unless asked for; a privileged container is free of it.
        for (name, kind, privileged, mode) in [
            ("silent", None, false, "0"),
            ("unconfined", Some(ProfileType::Unconfined), false, "0"),
            ("privileged", Some(ProfileType::RuntimeDefault), true, "0"),
            ("default", Some(ProfileType::RuntimeDefault), false, "2"),
        ] {
            let mut config = sh(name, "cat /proc/self/status; unshare -U true && echo unshared");
            security(&mut config).seccomp = kind.and_then(|kind| profile(kind, ""));
            security(&mut config).privileged = privileged;
            let (_, log) = check!(config);
            ensure!(field(&log, "Seccomp:") == Some(mode), "{name}: {log}");
            ensure!(log.contains("unshared") == (mode == "0"), "{name}: {log}");
            // What the filter took to be installed is given back.
            let usual = if privileged {
                "000001ffffffffff"
            } else {
                "00000000a80425fb"
            };
            for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
                ensure!(field(&log, set) == Some(usual), "{name} {set}: {log}");
            }
        }

        // A user who is not root, and one who gains nothing by programs.
        let mut config = sh(
            "user",
            "cat /proc/self/status; unshare -U true && echo unshared; true",
        );
        security(&mut config).seccomp = profile(ProfileType::RuntimeDefault, "");
        security(&mut config).run_as_user = Some(cri::Int64Value { value: 1000 });
        security(&mut config).no_new_privs = true;
        let (status, log) = check!(config);
        ensure!(status.exit_code == 0, "{status:?} {log}");
        ensure!(
            field(&log, "Seccomp:") == Some("2")
                && field(&log, "CapEff:") == Some("0000000000000000")
                && field(&log, "CapPrm:") == Some("0000000000000000")
                && field(&log, "NoNewPrivs:") == Some("1")
                && !log.contains("unshared"),
            "{log}"
        );

        // Profiles of the host's: what one denies is denied to commands, too, and with every capability.
        let file = host.dir().join("profile.json");
        fs::write(
            &file,
            r#"{"defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [
                    {"names": ["chmod", "fchmodat", "sethostname"], "action": "SCMP_ACT_ERRNO"},
                    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                    {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 3,
                     "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}]}"#,
        )?;
        let mut config = sh("localhost", "sleep 1000");
        security(&mut config).seccomp = profile(ProfileType::Localhost, &file.display().to_string());
        security(&mut config).capabilities = Some(cri::Capability {
            add_capabilities: vec!["SYS_ADMIN".into()],
            ..Default::default()
        });
        let id = cri.run(&pod_id, &config, &pod_config).await?;
        for (command, code, words) in [
            (vec!["chmod", "400", "/"], 1, "Operation not permitted"),
            (vec!["hostname", "another"], 1, "Operation not permitted"),
            (vec!["mkdir", "/x"], 1, "No space left on device"),
            (vec!["kill", "-USR1", "1"], 1, "No such process"),
            (vec!["kill", "-CONT", "1"], 0, ""),
        ] {
            let (got, _, stderr) = cri.exec(&id, &command).await?;
            ensure!(
                got == code && stderr.contains(words),
                "{command:?}: {got} {stderr:?}"
            );
        }

        // The container does not start with less than it was promised.
        fs::write(&file, r#"{"defaultAction": "SCMP_ACT_ALOW"}"#)?;
        let mut config = sh("unusable", "true");
        security(&mut config).seccomp = profile(ProfileType::Localhost, &file.display().to_string());
        let error = cri
            .create(&pod_id, &config, &pod_config)
            .await
            .err()
            .context("an unusable profile was accepted")?;
        ensure!(
            error.code() == tonic::Code::InvalidArgument && error.message().contains("SCMP_ACT_ALOW"),
            "{error}"
        );
        Ok(())
    })
}

#[test]
fn a_user_namespace_makes_root_of_the_pod_nobody_in_the_guest() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let line = cri::IdMapping {
            container_id: 0,
            host_id: 1000,
            length: 100_000,
        };
        let mut pod_config = pod(&host, "users");
        pod_config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                userns_options: Some(cri::UserNamespace {
                    mode: cri::NamespaceMode::Pod.into(),
                    uids: vec![line],
                    gids: vec![line],
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let pod_id = cri.run_pod(&pod_config).await?;
        let hosts = host.dir().join("hosts");
        fs::write(&hosts, "127.0.0.1 hush\n")?;
        let sh = |name: &str, script: &str| container(name, &image, &["sh", "-c", script]);
        macro_rules! check {
            ($config:expr) => {
                outcome(&mut cri, &host, &pod_id, &pod_config, &$config).await?
            };
        }

        // Everybody is who they are inside: the image, what is written, what is mounted, the terminal.
        let mut config = sh(
            "root",
            "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; stat -c '%u %g' / /etc/passwd /www /dev /etc/hosts; \
             touch /made && chown 33:33 /made && stat -c '%u %g' /made; echo >>/etc/passwd && echo changed; \
             cat /etc/hosts; chown 200000 /made 2>/dev/null || echo no such user; \
             httpd -p 80 && echo listening; chmod 700 /etc && stat -c %u /etc; touch /dev/shm/x && stat -c %u /dev/shm/x",
        );
        config.mounts = vec![cri::Mount {
            host_path: hosts.display().to_string(),
            container_path: "/etc/hosts".into(),
            ..Default::default()
        }];
        let (_, log) = check!(config);
        ensure!(
            log == " 0 1000 100000\n 0 1000 100000\n0\n0 0\n0 0\n0 0\n0 0\n0 0\n33 33\nchanged\n127.0.0.1 hush\nno such user\nlistening\n0\n0\n",
            "{log}"
        );
        let mut config = sh(
            "user",
            "id -u; id -G; touch /tmp/x && stat -c '%u %g' /tmp/x; tty",
        );
        security(&mut config).run_as_user = Some(cri::Int64Value { value: 1234 });
        security(&mut config).supplemental_groups = vec![4321];
        config.tty = true;
        let (_, log) = check!(config);
        ensure!(
            log.replace('\r', "") == "1234\n0 4321\n1234 0\n/dev/pts/0\n",
            "{log:?}"
        );

        // Its capabilities are over the namespace: it may mount, and uncovers nothing that is masked.
        let mut config = sh(
            "admin",
            "cat /proc/self/status; mkdir /m && mount -t tmpfs none /m && echo mounted; umount /proc/timer_list || echo still masked; \
             echo 1 >/proc/sys/kernel/sysrq || echo no sysctl; mknod /tmp/disk b 254 0 || echo no nodes",
        );
        security(&mut config).capabilities = Some(cri::Capability {
            add_capabilities: vec!["SYS_ADMIN".into()],
            ..Default::default()
        });
        security(&mut config).masked_paths = vec!["/proc/timer_list".into()];
        security(&mut config).seccomp = profile(ProfileType::RuntimeDefault, "");
        let (_, log) = check!(config);
        for expected in ["mounted\n", "still masked\n", "no sysctl\n", "no nodes\n"] {
            ensure!(log.contains(expected), "no {expected:?} in {log}");
        }
        ensure!(field(&log, "CapEff:") == Some("00000000a82425fb"), "{log}");

        // A command is in the same namespace; an id that it has not cannot be used.
        let id = cri
            .run(&pod_id, &sh("sleeper", "sleep 1000"), &pod_config)
            .await?;
        let (code, stdout, stderr) = cri
            .exec(
                &id,
                &[
                    "sh",
                    "-c",
                    "id -u; cat /proc/self/uid_map | tr -s ' '; touch /there && stat -c %u /there",
                ],
            )
            .await?;
        ensure!(
            (code, stdout.as_str()) == (0, "0\n 0 1000 100000\n0\n"),
            "{code} {stdout:?} {stderr:?}"
        );
        let mut config = sh("beyond", "true");
        security(&mut config).run_as_user = Some(cri::Int64Value { value: 100_000 });
        let beyond = cri.create(&pod_id, &config, &pod_config).await?;
        let error = cri
            .start(&beyond)
            .await
            .err()
            .context("a user who is not mapped was started")?;
        ensure!(error.message().contains("user 100000 is not mapped"), "{error}");
        Ok(())
    })
}
