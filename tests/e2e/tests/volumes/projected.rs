//! Volumes that kubelet writes: copied into the guest, and followed.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod, security},
    eventually,
    host::{Host, command},
    image::digest,
    node::{Node, node, node_with},
    run,
    volumes::{
        Mounted, SEEN_LIMIT, fails, file_servers, kubelet_volume, readonly, sh, sleeper, swap, wait_for,
    },
};
use k8s_cri::v1 as cri;

use crate::probe_image;

const MANY: usize = 3000;
const FS_GROUP: u32 = 5555;

#[test]
fn a_config_map_is_kept_up_to_date_and_its_parts_are_not() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/probe", &probe_image(&host)?).await?;
        let config = pod(&host, "config");
        let volume = kubelet_volume(&host, "config", "configmap", "settings")?;
        let optional = kubelet_volume(&host, "config", "configmap", "later")?;
        swap(&volume, "..1", &[("key", "one"), ("other", "same")])?;
        swap(&optional, "..1", &[])?;
        // A subPath: a bind mount of what the key was when the container was made.
        let part = host
            .dir()
            .join("kubelet/pods/uid-config/volume-subpaths/settings/reader/0");
        fs::create_dir_all(part.parent().context("no parent")?)?;
        fs::write(&part, "")?;
        command(
            Command::new("mount")
                .arg("--bind")
                .arg(volume.join("..1/key"))
                .arg(&part),
        )?;
        let _part = Mounted(part.clone());
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            readonly(&volume, "/settings"),
            readonly(&optional, "/later"),
            readonly(&part, "/key"),
        ];
        let id = cri
            .run(&pod_id, &sleeper("reader", &image, &mounts), &config)
            .await?;
        ensure!(
            sh(&mut cri, &id, "cat /settings/key /key; readlink /settings/key").await?
                == "oneone..data/key\n"
        );
        fails(&mut cri, &id, "touch /settings/x", "Read-only file system").await?;
        ensure!(
            file_servers(&host).is_empty(),
            "a file server runs for volumes that are copied"
        );

        // inotify in a container sees the swap.
        let mut listener = container("listener", &image, &["/probe", "watch", "/settings", "..data"]);
        listener.mounts = mounts.to_vec();
        let listener = cri.run(&pod_id, &listener, &config).await?;
        let log = host.log_dir("config")?.join("listener.log");
        eventually("the listener's watch", SEEN_LIMIT, async || {
            fs::read_to_string(&log)
                .ok()
                .filter(|log| log.contains("watching"))
                .map(drop)
        })
        .await?;
        let began = std::time::Instant::now();
        swap(&volume, "..2", &[("key", "two"), ("other", "same"), ("new", "x")])?;
        swap(&optional, "..2", &[("key", "here now")])?;
        wait_for(
            &mut cri,
            &id,
            "the new content",
            "grep -q two /settings/key && test -e /settings/new && grep -q here /later/key",
        )
        .await?;
        eprintln!(
            "a change of a configMap was seen after {:?}, a command's time included",
            began.elapsed()
        );
        ensure!(cri.exited(&listener).await?.exit_code == 0);
        ensure!(sh(&mut cri, &id, "cat /key").await? == "one");

        // What changes while there is no daemon arrives with the next one; then it follows again.
        daemon.kill()?;
        swap(
            &volume,
            "..3",
            &[("key", "three"), ("other", "same"), ("new", "x")],
        )?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        wait_for(
            &mut cri,
            &id,
            "the change from before the daemon",
            "grep -q three /settings/key",
        )
        .await?;
        swap(&volume, "..4", &[("key", "four"), ("other", "same")])?;
        wait_for(&mut cri, &id, "the change after", "grep -q four /settings/key").await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn many_files_and_large_ones_are_there_whole_and_for_whom_they_are() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "large");
        // A ConfigMap holds 1 MiB, which thousands of short values fit.
        let many = kubelet_volume(&host, "large", "configmap", "many")?;
        let names: Vec<String> = (0..MANY).map(|number| format!("key-{number}")).collect();
        let files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
        swap(&many, "..1", &files)?;
        // A Secret of the largest size, with the group and the modes that fsGroup gives it.
        let secret = kubelet_volume(&host, "large", "secret", "key")?;
        let content = "0123456789abcdef".repeat(1 << 16);
        swap(&secret, "..1", &[("blob", &content)])?;
        for path in [secret.clone(), secret.join("..1"), secret.join("..1/blob")] {
            chown(&path, Some(0), Some(FS_GROUP))?;
        }
        fs::set_permissions(secret.join("..1/blob"), fs::Permissions::from_mode(0o440))?;

        let pod_id = cri.run_pod(&config).await?;
        let mounts = [readonly(&many, "/many"), readonly(&secret, "/secret")];
        let mut reader = sleeper("reader", &image, &mounts);
        let context = security(&mut reader);
        context.run_as_user = Some(cri::Int64Value { value: 1000 });
        context.supplemental_groups = vec![i64::from(FS_GROUP)];
        let reader = cri.run(&pod_id, &reader, &config).await?;
        let script = "ls /many | wc -l; cat /many/key-0 /many/key-2999; echo; wc -c < /secret/blob; \
            sha256sum < /secret/blob | cut -c 1-64; stat -L -c '%u %g %a' /secret/blob";
        let out = sh(&mut cri, &reader, script).await?;
        let sum = digest(content.as_bytes());
        let sum = sum.trim_start_matches("sha256:");
        ensure!(
            out == format!("{MANY}\nkey-0key-2999\n1048576\n{sum}\n0 {FS_GROUP} 440\n"),
            "{out}"
        );
        let mut stranger = sleeper("stranger", &image, &mounts);
        security(&mut stranger).run_as_user = Some(cri::Int64Value { value: 1000 });
        let stranger = cri.run(&pod_id, &stranger, &config).await?;
        fails(&mut cri, &stranger, "cat /secret/blob", "Permission denied").await?;

        // All of them change at once.
        let files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "new")).collect();
        swap(&many, "..2", &files)?;
        let script = format!("test $(cat /many/key-* | tr -d '\\n' | sed 's/new/x/g' | wc -c) = {MANY}");
        wait_for(&mut cri, &reader, "the new content", &script).await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
