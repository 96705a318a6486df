//! emptyDir: the pod's own, on a disk of its own or in memory.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    host::{Host, command, text},
    node::{Node, node, node_with, outcome},
    run,
    volumes::{Mounted, fails, file_servers, kubelet_volume, mount, sh, sleeper, sub_path, wait_for},
};

use crate::probe_image;

#[test]
fn an_empty_dir_is_the_pod_s_own_and_outlives_its_containers() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "empty");
        let disk = kubelet_volume(&host, "empty", "empty-dir", "disk")?;
        chown(&disk, Some(0), Some(7000))?;
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o2777))?;
        let memory = Mounted(kubelet_volume(&host, "empty", "empty-dir", "memory")?);
        command(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=8m,mode=1777", "none"])
                .arg(&memory.0),
        )?;
        // kubelet makes the directory of a subPath in the host's directory, and binds it.
        let part = host
            .dir()
            .join("kubelet/pods/uid-empty/volume-subpaths/disk/two/0");
        fs::create_dir_all(&part)?;
        fs::create_dir(disk.join("sub"))?;
        command(
            Command::new("mount")
                .arg("--bind")
                .arg(disk.join("sub"))
                .arg(&part),
        )?;
        let _part = Mounted(part.clone());

        let pod_id = cri.run_pod(&config).await?;
        let mounts = [mount(&disk, "/disk"), mount(&memory.0, "/memory")];
        let one = cri
            .run(&pod_id, &sleeper("one", &image, &mounts), &config)
            .await?;
        let script = "set -e; stat -c '%g %a' /disk; ls -A /disk; grep -E ' /(disk|memory) ' /proc/mounts | cut -d' ' -f2,3; \
            mkdir /disk/sub; echo kept > /disk/sub/file; dd if=/dev/zero of=/disk/big bs=1M count=8 2>/dev/null; sync; \
            df -m /memory | tail -1 | grep -q ' 8 '; echo m > /memory/m";
        let out = sh(&mut cri, &one, script).await?;
        ensure!(out == "7000 2777\n/disk ext4\n/memory tmpfs\n", "{out}");
        // On the host it is inside the volume's directory, where `du` sees it.
        let used = text(Command::new("du").arg("-sm").arg(&disk))?;
        let used: u64 = used.split_whitespace().next().context("no number")?.parse()?;
        ensure!((8..100).contains(&used), "{used} MiB are used");
        ensure!(file_servers(&host).is_empty());

        // Shared with a container that comes later, whose subPath is what the first one made.
        let mut mounts = mounts.to_vec();
        mounts.push(mount(&part, "/part"));
        mounts[0].readonly = true;
        let two = cri
            .run(&pod_id, &sleeper("two", &image, &mounts), &config)
            .await?;
        ensure!(
            sh(
                &mut cri,
                &two,
                "cat /part/file /memory/m; echo more >> /part/file"
            )
            .await?
                == "kept\nm\n"
        );
        fails(&mut cri, &two, "touch /disk/x", "Read-only file system").await?;
        ensure!(sh(&mut cri, &one, "cat /disk/sub/file").await? == "kept\nmore\n");
        cri.stop(&one, 0).await?;
        cri.remove(&one).await?;
        ensure!(sh(&mut cri, &two, "cat /disk/sub/file").await? == "kept\nmore\n");

        // A sandbox that has to be made anew finds the disk as it was.
        sh(&mut cri, &two, "sync").await?;
        cri.stop_pod(&pod_id).await?;
        let mut again = config.clone();
        again.metadata.get_or_insert_default().attempt = 1;
        let next_id = cri.run_pod(&again).await?;
        let three = cri
            .run(
                &next_id,
                &sleeper("three", &image, &[mount(&disk, "/disk")]),
                &again,
            )
            .await?;
        ensure!(sh(&mut cri, &three, "cat /disk/sub/file").await? == "kept\nmore\n");
        cri.remove_pod(&next_id).await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn what_an_init_container_has_written_is_what_a_sub_path_shows() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/probe", &probe_image(&host)?).await?;
        let config = pod(&host, "parts");
        let disk = kubelet_volume(&host, "parts", "empty-dir", "disk")?;
        let memory = Mounted::tmpfs(kubelet_volume(&host, "parts", "empty-dir", "memory")?)?;
        let pod_id = cri.run_pod(&config).await?;
        let whole = [mount(&disk, "/disk"), mount(&memory.0, "/memory")];
        let mut init = container(
            "init",
            &image,
            &[
                "sh",
                "-c",
                "for v in /disk /memory; do echo made > $v/file; mkdir $v/dir; echo in > $v/dir/f; ln -s /etc $v/out; done",
            ],
        );
        init.mounts = whole.to_vec();
        let (status, said) = outcome(&mut cri, &host, &pod_id, &config, &init).await?;
        ensure!(status.exit_code == 0, "{said}");

        // kubelet, which does not see into the guest, makes each a directory of the host's, and binds it.
        let part = |volume: &Path, name: &str, number: &str| -> Result<Mounted> {
            let own = volume.join(name);
            fs::create_dir(&own)?;
            let volume = volume
                .file_name()
                .and_then(|name| name.to_str())
                .context("no name")?;
            Mounted::bind(&own, sub_path(&host, "parts", volume, number))
        };
        let parts = [
            part(&disk, "file", "a")?,
            part(&disk, "dir", "b")?,
            part(&memory.0, "file", "c")?,
            part(&memory.0, "dir", "d")?,
            part(&disk, "nothing", "e")?,
        ];
        let places = [
            "/disk-file",
            "/disk-dir",
            "/memory-file",
            "/memory-dir",
            "/nothing",
        ];
        let mounts: Vec<_> = parts
            .iter()
            .zip(places)
            .map(|(part, place)| mount(&part.0, place))
            .collect();
        let id = cri
            .run(&pod_id, &sleeper("main", &image, &mounts), &config)
            .await?;
        let script = "cat /disk-file /memory-file /disk-dir/f /memory-dir/f; echo more >> /disk-file; ls -A /nothing | wc -l";
        let out = sh(&mut cri, &id, script).await?;
        ensure!(out == "made\nmade\nin\nin\n0\n", "{out}");

        // A link that leads out of the volume leads to what the volume has of that name: nothing, and so a directory.
        let out_of_it = part(&disk, "out", "f")?;
        let mounts = [mount(&out_of_it.0, "/out")];
        let out = cri
            .run(&pod_id, &sleeper("out", &image, &mounts), &config)
            .await?;
        ensure!(sh(&mut cri, &out, "ls -A /out | wc -l").await? == "0\n");

        // Containers of the pod meet at a socket in the volume.
        let mut server = container("server", &image, &["/probe", "listen", "/disk/socket"]);
        server.mounts = whole.to_vec();
        let server = cri.run(&pod_id, &server, &config).await?;
        let client = cri
            .run(&pod_id, &sleeper("client", &image, &whole), &config)
            .await?;
        wait_for(&mut cri, &client, "the socket", "test -S /disk/socket").await?;
        let out = sh(
            &mut cri,
            &client,
            "cat /disk/file; /probe connect /disk/socket hello",
        )
        .await?;
        ensure!(out == "made\nmore\nhello\n", "{out}");
        ensure!(cri.exited(&server).await?.exit_code == 0);
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
