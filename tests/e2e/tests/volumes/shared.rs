//! Volumes that stay on the host and are served by a process: what containers see, change and share, and what they cannot.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    eventually,
    host::{Host, text},
    node::{Node, node, node_with},
    run,
    volumes::{Mounted, SEEN_LIMIT, fails, file_servers, kill, mount, readonly, sh, sleeper, wait_for},
};
use k8s_cri::v1 as cri;

use crate::probe_image;

#[test]
fn a_directory_of_the_host_is_read_and_written_in_place() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("from-host"), "hello\n")?;
        chown(data.join("from-host"), Some(1234), Some(4321))?;
        fs::set_permissions(data.join("from-host"), fs::Permissions::from_mode(0o640))?;
        symlink("from-host", data.join("link"))?;
        let config = pod(&host, "hostpath");
        let pod_id = cri.run_pod(&config).await?;
        let one = sleeper("one", &image, &[mount(&data, "/data")]);
        let one = cri.run(&pod_id, &one, &config).await?;

        // Content, links, owners and modes, both ways.
        let out = sh(
            &mut cri,
            &one,
            "cat /data/link; stat -c '%u %g %a' /data/from-host",
        )
        .await?;
        ensure!(out == "hello\n1234 4321 640\n", "{out}");
        sh(&mut cri, &one, "set -e; cd /data; mkdir -p a/b; echo deep > a/b/c; chmod 4751 a/b/c; chown 7:8 a/b/c; \
            ln a/b/c hard; ln -s a/b/c soft; mkfifo pipe; dd if=/dev/zero of=big bs=1M count=5 2>/dev/null; mv big bigger; \
            truncate -s 3 a/b/c; touch -d @1000000000 bigger").await?;
        let file = data.join("a/b/c").metadata()?;
        ensure!(fs::read(data.join("a/b/c"))? == b"dee" && (file.uid(), file.gid()) == (7, 8));
        ensure!(
            file.nlink() == 2 && file.mode() & 0o777 == 0o751,
            "{:o}",
            file.mode()
        );
        let bigger = data.join("bigger").metadata()?;
        ensure!(bigger.len() == 5 << 20 && bigger.mtime() == 1_000_000_000);
        ensure!(fs::read_link(data.join("soft"))? == Path::new("a/b/c"));

        // What the host changes is seen.
        fs::write(data.join("from-host"), "changed, and longer than before\n")?;
        fs::write(data.join("new"), "new\n")?;
        fs::remove_file(data.join("link"))?;
        wait_for(
            &mut cri,
            &one,
            "the host's changes",
            "grep -q longer /data/from-host && grep -q new /data/new && ! test -e /data/link",
        )
        .await?;

        // Another container of the pod shares files, locks, memory maps and sockets, and one that comes later as well.
        let two = sleeper("two", &image, &[mount(&data, "/elsewhere")]);
        let two = cri.run(&pod_id, &two, &config).await?;
        sh(&mut cri, &one, "echo shared > /data/shared").await?;
        let out = sh(
            &mut cri,
            &two,
            "cat /elsewhere/shared; ls /elsewhere | sort | head -3",
        )
        .await?;
        ensure!(out == "shared\na\nbigger\nfrom-host\n", "{out}");
        sh(
            &mut cri,
            &one,
            "(flock -x 9; touch /data/held; while test -e /data/held; do sleep 0.1; done) 9>/data/lock >/dev/null 2>&1 & \
            while ! test -e /data/held; do sleep 0.1; done",
        )
        .await?;
        fails(
            &mut cri,
            &two,
            "flock -n -x /elsewhere/lock true || { echo taken >&2; false; }",
            "taken",
        )
        .await?;
        fs::remove_file(data.join("held"))?;

        // A user of the pod who may write only by a supplementary group (fsGroup) can.
        let group = data.join("group");
        fs::create_dir(&group)?;
        chown(&group, Some(0), Some(5555))?;
        fs::set_permissions(&group, fs::Permissions::from_mode(0o2775))?;
        let mut member = sleeper("member", &image, &[mount(&data, "/data")]);
        let linux = member.linux.get_or_insert_default();
        linux.security_context = Some(cri::LinuxContainerSecurityContext {
            run_as_user: Some(cri::Int64Value { value: 1000 }),
            supplemental_groups: vec![5555],
            ..Default::default()
        });
        let member = cri.run(&pod_id, &member, &config).await?;
        sh(
            &mut cri,
            &member,
            "mkdir /data/group/d && echo x > /data/group/d/f && ln -s f /data/group/d/l",
        )
        .await?;
        let made = group.join("d/f").metadata()?;
        ensure!(
            (made.uid(), made.gid()) == (1000, 5555),
            "{} {}",
            made.uid(),
            made.gid()
        );
        fails(&mut cri, &member, "echo x > /data/a/no", "Permission denied").await?;

        cri.remove_pod(&pod_id).await?;
        drop(daemon);
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn read_only_means_what_was_asked_for() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir_all(data.join("plain"))?;
        fs::write(data.join("file"), "text\n")?;
        let inner = Mounted::tmpfs(data.join("inner"))?;
        fs::write(inner.0.join("seen"), "inner\n")?;
        let config = pod(&host, "readonly");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            readonly(&data, "/top"),
            cri::Mount {
                recursive_read_only: true,
                ..readonly(&data, "/all")
            },
            readonly(&data.join("plain"), "/plain"),
            readonly(&data.join("file"), "/file"),
            mount(&data.join("file"), "/writable-file"),
        ];
        let id = cri.run(&pod_id, &sleeper("ro", &image, &mounts), &config).await?;
        let out = sh(&mut cri, &id, "cat /top/inner/seen /all/inner/seen /file; touch /top/inner/written; echo more >> /writable-file").await?;
        ensure!(out == "inner\ninner\ntext\n", "{out}");
        ensure!(inner.0.join("written").exists());
        ensure!(fs::read_to_string(data.join("file"))? == "text\nmore\n");
        for script in [
            "touch /top/x",
            "echo x >> /top/file",
            "rm /top/file",
            "touch /all/x",
            "touch /all/inner/x",
            "touch /plain/x",
            "echo x >> /file",
        ] {
            fails(&mut cri, &id, script, "Read-only file system").await?;
        }
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn later_mounts_of_the_host_appear_only_where_asked_for() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = Mounted::shared(host.dir().join("data"))?;
        let config = pod(&host, "propagation");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            mount(&data.0, "/private"),
            cri::Mount {
                propagation: cri::MountPropagation::PropagationHostToContainer.into(),
                ..mount(&data.0, "/slave")
            },
        ];
        let id = cri
            .run(&pod_id, &sleeper("late", &image, &mounts), &config)
            .await?;
        sh(&mut cri, &id, "ls /private /slave").await?;
        let late = Mounted::tmpfs(data.0.join("late"))?;
        fs::write(late.0.join("file"), "late\n")?;
        wait_for(
            &mut cri,
            &id,
            "the host's later mount",
            "grep -q late /slave/late/file",
        )
        .await?;
        sh(
            &mut cri,
            &id,
            "test -d /private/late && ! test -e /private/late/file",
        )
        .await?;
        let mut shared = sleeper("shared", &image, &mounts);
        shared.mounts[0].propagation = cri::MountPropagation::PropagationBidirectional.into();
        let error = cri
            .create(&pod_id, &shared, &config)
            .await
            .err()
            .context("a mount that cannot travel to the host was accepted")?;
        ensure!(error.message().contains("Bidirectional"), "{error}");
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn the_file_server_sees_its_volumes_and_nothing_else() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("file"), "here\n")?;
        let config = pod(&host, "confined");
        let pod_id = cri.run_pod(&config).await?;
        let plain = cri.run(&pod_id, &sleeper("plain", &image, &[]), &config).await?;
        ensure!(
            file_servers(&host).is_empty(),
            "a file server runs for a pod that has no such volume"
        );
        cri.remove(&plain).await?;
        let id = cri
            .run(
                &pod_id,
                &sleeper("one", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        sh(&mut cri, &id, "cat /data/file").await?;
        let [pid] = file_servers(&host)[..] else {
            anyhow::bail!("there are {:?}", file_servers(&host));
        };
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let mut names: Vec<_> = fs::read_dir(&root)?
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        names.sort();
        ensure!(names == ["proc", "volumes"], "{names:?}");
        ensure!(fs::read_dir(root.join("volumes"))?.count() == 1);
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
        let kept = [0u32, 1, 2, 3, 4, 6, 7, 27, 31]
            .iter()
            .fold(0u64, |set, bit| set | 1 << bit);
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            ensure!(
                line(set) == Some(format!("{kept:016x}").as_str()),
                "{set} {:?}",
                line(set)
            );
        }
        ensure!(
            (line("NoNewPrivs:"), line("Seccomp:")) == (Some("1"), Some("2")),
            "{status}"
        );
        let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        ensure!(
            interfaces
                .lines()
                .skip(2)
                .all(|line| line.trim_start().starts_with("lo:")),
            "{interfaces}"
        );
        cri.remove_pod(&pod_id).await?;
        eventually("the file server's end", SEEN_LIMIT, async || {
            file_servers(&host).is_empty().then_some(())
        })
        .await
    })
}

#[test]
fn a_dead_file_server_gives_errors_and_a_restarted_daemon_finds_the_living() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("file"), "here\n")?;
        let config = pod(&host, "server");
        let pod_id = cri.run_pod(&config).await?;
        let one = cri
            .run(
                &pod_id,
                &sleeper("one", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        let [pid] = file_servers(&host)[..] else {
            anyhow::bail!("there are {:?}", file_servers(&host));
        };

        // No daemon, and the volume works; a new daemon, and the same server serves a new container.
        daemon.kill()?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        ensure!(sh(&mut cri, &one, "cat /data/file; echo still > /data/still").await? == "here\n");
        ensure!(fs::read(data.join("still"))? == b"still\n");
        let two = cri
            .run(
                &pod_id,
                &sleeper("two", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        ensure!(sh(&mut cri, &two, "cat /data/still").await? == "still\n");
        ensure!(
            file_servers(&host) == [pid],
            "{:?} and not {pid}",
            file_servers(&host)
        );

        // Its end is an I/O error in the pod, at once and for good; what comes later is served again.
        kill(pid)?;
        eventually("the file server's end", SEEN_LIMIT, async || {
            file_servers(&host).is_empty().then_some(())
        })
        .await?;
        fails(&mut cri, &one, "cat /data/file", "Input/output error").await?;
        fails(&mut cri, &two, "ls /data/", "Input/output error").await?;
        let three = cri
            .run(
                &pod_id,
                &sleeper("three", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        ensure!(sh(&mut cri, &three, "cat /data/file").await? == "here\n");
        fails(&mut cri, &one, "cat /data/file", "Input/output error").await?;
        cri.stop(&one, 1).await?;
        cri.remove(&one).await?;
        cri.remove_pod(&pod_id).await?;
        drop(daemon);
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn memory_maps_attributes_and_sockets_are_shared_by_the_containers_of_a_pod() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/probe", &probe_image(&host)?).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("file"), "x")?;
        let config = pod(&host, "probes");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [mount(&data, "/data")];
        let one = cri
            .run(&pod_id, &sleeper("one", &image, &mounts), &config)
            .await?;
        let two = cri
            .run(&pod_id, &sleeper("two", &image, &mounts), &config)
            .await?;

        sh(&mut cri, &one, "/probe map /data/map written").await?;
        ensure!(sh(&mut cri, &two, "/probe mapped /data/map").await? == "written written\n");
        let mapped = fs::read(data.join("map"))?;
        ensure!(
            mapped.len() == 12288
                && mapped.starts_with(b"written")
                && mapped.get(8192..8199) == Some(b"written")
        );

        let out = sh(&mut cri, &one, "/probe xattr /data/file user.colour green").await?;
        ensure!(out == "green user.colour\n", "{out}");
        let seen = text(
            Command::new("python3")
                .args([
                    "-c",
                    "import os, sys; print(os.getxattr(sys.argv[1], 'user.colour').decode())",
                ])
                .arg(data.join("file")),
        )?;
        ensure!(seen == "green\n", "{seen}");

        let mut server = container("server", &image, &["/probe", "listen", "/data/socket"]);
        server.mounts = mounts.to_vec();
        let server = cri.run(&pod_id, &server, &config).await?;
        wait_for(&mut cri, &two, "the socket", "test -S /data/socket").await?;
        ensure!(sh(&mut cri, &two, "/probe connect /data/socket hello").await? == "hello\n");
        ensure!(cri.exited(&server).await?.exit_code == 0);
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
