//! AppArmor in the guest: profiles of the host's files, the default one, and what cannot be had. The host of these tests need not have
//! AppArmor; the profiles that a host's kernel has are critest's business, in the node VM.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod, security},
    daemon::{Daemon, Product},
    eventually,
    host::Host,
    image,
    node::{Node, node, outcome},
    registry::Registry,
    run,
};
use k8s_cri::v1::{self as cri, security_profile::ProfileType};

/// In a file of another name, with an include that the compiler has to find, and child and signal rules as profiles in the wild have.
const FILE: &str = "
#include <tunables/global>
profile deny-tmp flags=(attach_disconnected) {
  #include <abstractions/base>
  file,
  network,
  capability,
  deny /tmp/** w,
}
profile kind flags=(attach_disconnected, complain) {
  file,
}
";

const CURRENT: &str = "cat /proc/self/attr/current";

/// A node with a directory of profiles of its own, and these lines in its configuration.
async fn node_with_profiles(host: &Host, lines: &str) -> Result<Node> {
    let registry = Registry::start(&host.dir().join("registry")).await?;
    let image = registry.push("test/busybox", "1", &image::busybox()?)?;
    let profiles = host.dir().join("profiles");
    fs::create_dir(&profiles)?;
    fs::write(profiles.join("of-the-team"), FILE)?;
    let config = host.dir().join("config.toml");
    fs::write(
        &config,
        format!("[apparmor]\nprofile_dir = {profiles:?}\n{lines}\n"),
    )?;
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

fn with(name: &str, image: &str, kind: Option<(ProfileType, &str)>, command: &str) -> cri::ContainerConfig {
    let mut config = container(name, image, &["sh", "-c", command]);
    security(&mut config).apparmor = kind.map(|(kind, profile)| cri::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: profile.into(),
    });
    config
}

async fn sh(cri: &mut Cri, id: &str, script: &str) -> Result<(i32, String)> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    Ok((code, out + &err))
}

async fn refused(
    cri: &mut Cri,
    pod_id: &str,
    config: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
) -> Result<tonic::Status> {
    cri.create(pod_id, config, pod).await.err().context("accepted")
}

#[test]
fn a_profile_in_a_file_of_the_host_confines_a_container_and_its_sessions_and_no_other() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node_with_profiles(&host, "").await?;
        let config = pod(&host, "apparmor");
        let pod_id = cri.run_pod(&config).await?;
        let localhost = |profile| Some((ProfileType::Localhost, profile));
        let sleep = format!("{CURRENT}; touch /tmp/x || echo denied; exec sleep 100000");

        // Named as kubelet names it, and in the older field.
        let new = with("new", &image, localhost("deny-tmp"), &sleep);
        let new = cri.run(&pod_id, &new, &config).await?;
        #[expect(deprecated, reason = "the field under test")]
        let old = {
            let mut old = with("old", &image, None, &sleep);
            security(&mut old).apparmor_profile = "localhost/deny-tmp".into();
            cri.run(&pod_id, &old, &config).await?
        };
        for (name, id) in [("new", &new), ("old", &old)] {
            let log = host.log_dir("apparmor")?.join(format!("{name}.log"));
            let denied = async || fs::read_to_string(&log).ok().filter(|log| log.contains("denied"));
            let log = eventually("a denied write", Duration::from_secs(60), denied).await?;
            ensure!(log.contains("deny-tmp (enforce)"), "{log}");
            let (_, told) = sh(&mut cri, id, CURRENT).await?;
            ensure!(told.trim() == "deny-tmp (enforce)", "{told}");
            let (code, told) = sh(&mut cri, id, "touch /tmp/x").await?;
            ensure!(code != 0 && told.contains("Permission denied"), "{told}");
            let (code, told) = sh(&mut cri, id, "touch /x && echo out >/dev/stdout").await?;
            ensure!(code == 0 && told == "out\n", "{told}");
        }
        // A stop is the agent's signal: the profile lets it in, and SIGKILL needs nobody's leave.
        cri.stop(&new, 0).await?;
        cri.remove(&new).await?;

        // The same profile binds a privileged container, another profile of the file is what it says, and none is none.
        let mut privileged = with("privileged", &image, localhost("deny-tmp"), "touch /tmp/x");
        security(&mut privileged).privileged = true;
        let (status, _) = outcome(&mut cri, &host, &pod_id, &config, &privileged).await?;
        ensure!(status.exit_code != 0, "{status:?}");
        for (name, kind, expected) in [
            ("kind", localhost("kind"), "kind (complain)"),
            ("unconfined", Some((ProfileType::Unconfined, "")), "unconfined"),
        ] {
            let free = with(name, &image, kind, &format!("{CURRENT} && touch /tmp/x"));
            let (status, log) = outcome(&mut cri, &host, &pod_id, &config, &free).await?;
            ensure!(
                status.exit_code == 0 && log.trim() == expected,
                "{name}: {status:?} {log}"
            );
        }

        // What nobody has written.
        for (profile, words) in [
            ("nobodys", "no AppArmor profile \"nobodys\""),
            ("../of-the-team", "no AppArmor profile"),
            ("", "without a name"),
        ] {
            let config_of = with("x", &image, localhost(profile), "true");
            let error = refused(&mut cri, &pod_id, &config_of, &config).await?;
            ensure!(
                error.code() == tonic::Code::InvalidArgument && error.message().contains(words),
                "{profile}: {error}"
            );
        }
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn the_default_profile_keeps_containers_from_the_guest_s_kernel() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "default");
        let pod_id = cri.run_pod(&config).await?;
        let kinds = [
            ("unset", None),
            ("default", Some((ProfileType::RuntimeDefault, ""))),
        ];
        for (name, kind) in kinds {
            // Free of masks, read-only paths and capability bounds, so that the profile is what is in the way.
            let patient = "trap 'exit 3' TERM; while true; do sleep 1; done";
            let mut wanted = with(name, &image, kind, patient);
            let context = security(&mut wanted);
            context.masked_paths = Vec::new();
            context.readonly_paths = Vec::new();
            context.capabilities = Some(cri::Capability {
                add_capabilities: vec!["ALL".into()],
                ..Default::default()
            });
            let id = cri.run(&pod_id, &wanted, &config).await?;
            let (_, told) = sh(&mut cri, &id, CURRENT).await?;
            ensure!(told.trim() == "caisson-default (enforce)", "{name}: {told}");
            for forbidden in [
                "echo 1 >/proc/sys/vm/drop_caches",
                "echo 1 >/proc/sys/kernel/panic",
                "ls /sys/firmware/acpi",
            ] {
                let (code, told) = sh(&mut cri, &id, forbidden).await?;
                ensure!(
                    code != 0 && told.contains("ermission denied"),
                    "{name}: {forbidden}: {told}"
                );
            }
            for allowed in [
                "echo x >/etc/x && chown 1:1 /etc/x && rm /etc/x",
                "echo 500 >/proc/self/oom_score_adj",
                "sleep 1000 & kill $! && wait $! || true",
                "ls /proc/self/fd >/dev/null && cat /proc/meminfo >/dev/null",
                "mkdir -p /sys/fs/cgroup",
                "mount -t tmpfs none /tmp && umount /tmp",
            ] {
                let (code, told) = sh(&mut cri, &id, allowed).await?;
                ensure!(code == 0, "{name}: {allowed}: {told}");
            }
            // SIGTERM of the agent's gets in.
            cri.stop(&id, 30).await?;
            ensure!(
                cri.status(&id).await?.exit_code == 3,
                "{name}: it did not hear SIGTERM"
            );
        }
        let mut privileged = with("privileged", &image, None, CURRENT);
        security(&mut privileged).privileged = true;
        let (_, log) = outcome(&mut cri, &host, &pod_id, &config, &privileged).await?;
        ensure!(log.trim() == "unconfined", "{log}");
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn in_a_guest_without_apparmor_only_who_asks_for_a_profile_is_refused() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node_with_profiles(&host, "[guest]\ncmdline = [\"apparmor=0\"]").await?;
        let config = pod(&host, "without");
        let pod_id = cri.run_pod(&config).await?;
        let unset = with("unset", &image, None, "exec sleep 100000");
        cri.run(&pod_id, &unset, &config).await?;
        for kind in [
            (ProfileType::RuntimeDefault, ""),
            (ProfileType::Localhost, "deny-tmp"),
        ] {
            let wanted = with("asked", &image, Some(kind), "true");
            let error = refused(&mut cri, &pod_id, &wanted, &config).await?;
            ensure!(
                error.message().contains("is absent or switched off"),
                "{kind:?}: {error}"
            );
        }
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
