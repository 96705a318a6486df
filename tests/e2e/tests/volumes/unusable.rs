//! Volumes that cannot be had: the error says which and why, and nothing of them is left.

use std::{
    fs,
    os::{fd::AsRawFd, unix::fs::symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::pod,
    eventually,
    host::{Host, command},
    node::{Node, node},
    run,
    volumes::{Loop, Mounted, SEEN_LIMIT, fails, file_servers, mount, sh, sleeper},
};
use k8s_cri::v1 as cri;

#[test]
fn a_volume_that_cannot_be_had_is_named_and_nothing_is_left() -> Result<()> {
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
        symlink("nowhere", data.join("dangling"))?;
        symlink("loop", data.join("loop"))?;
        let config = pod(&host, "bad");
        let pod_id = cri.run_pod(&config).await?;
        for name in ["absent", "dangling", "loop"] {
            let bad = sleeper(
                name,
                &image,
                &[mount(&data, "/good"), mount(&data.join(name), "/bad")],
            );
            let error = cri
                .create(&pod_id, &bad, &config)
                .await
                .err()
                .with_context(|| format!("{name} was accepted"))?;
            ensure!(
                ["mounts[1]", name, "/bad"]
                    .iter()
                    .all(|word| error.message().contains(word)),
                "{error}"
            );
        }
        ensure!(file_servers(&host).is_empty());
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// A file system whose server never answers: FUSE, with the server's end in this process. Gone when it is dropped.
struct Silent {
    mounted: Mounted,
    _server: fs::File,
}

impl Silent {
    fn new(at: PathBuf) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let server = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        nix::mount::mount(
            Some("silent"),
            &at,
            Some("fuse"),
            nix::mount::MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(Self {
            mounted: Mounted(at),
            _server: server,
        })
    }
}

#[test]
fn a_host_path_that_does_not_answer_is_named_and_holds_up_nothing_else() -> Result<()> {
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
        let silent = Silent::new(host.dir().join("silent"))?;
        let config = pod(&host, "silent");
        let pod_id = cri.run_pod(&config).await?;
        let stuck = sleeper(
            "stuck",
            &image,
            &[
                mount(&data, "/good"),
                mount(&silent.mounted.0.join("below"), "/bad"),
            ],
        );
        let mut other = cri.clone();
        let (error, fine) = tokio::join!(cri.create(&pod_id, &stuck, &config), async {
            let id = other
                .run(
                    &pod_id,
                    &sleeper("fine", &image, &[mount(&data, "/data")]),
                    &config,
                )
                .await?;
            sh(&mut other, &id, "touch /data/x").await
        });
        fine?;
        let error = error.err().context("a volume was had that does not answer")?;
        ensure!(
            ["mounts[1]", "silent/below", "/bad", "did not finish within"]
                .iter()
                .all(|word| error.message().contains(word)),
            "{error}"
        );
        drop(silent);
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// Whether a process of this host's VMs has this device open.
fn is_open(host: &Host, device: &Path) -> Result<bool> {
    let processes = host.leftovers()?.processes;
    let pids = processes.iter().filter_map(|process| process.split(' ').next());
    Ok(pids
        .flat_map(|pid| {
            fs::read_dir(format!("/proc/{pid}/fd"))
                .into_iter()
                .flatten()
                .flatten()
        })
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|open| open == device)))
}

#[test]
fn what_a_failed_container_had_attached_is_given_back() -> Result<()> {
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
        let disk = Loop::new(&host.dir().join("disk"), 16 << 20)?;
        let config = pod(&host, "half");
        let pod_id = cri.run_pod(&config).await?;
        // A node without a device: that is only found when it is opened, and then the first is attached already.
        let dead = host.dir().join("dead");
        command(Command::new("mknod").arg(&dead).args(["b", "120", "99"]))?;
        let device = |path: &Path, inside: &str| cri::Device {
            host_path: path.display().to_string(),
            container_path: inside.into(),
            permissions: "rwm".into(),
        };
        let mut half = sleeper("half", &image, &[mount(&data, "/data")]);
        half.devices = vec![device(&disk.0, "/dev/one"), device(&dead, "/dev/two")];
        let before = host.leftovers()?;
        for attempt in 0..3 {
            half.metadata.get_or_insert_default().attempt = attempt;
            let error = cri
                .create(&pod_id, &half, &config)
                .await
                .err()
                .context("a node without a device was taken for a disk")?;
            ensure!(
                ["dead", "/dev/two", "No such device or address"]
                    .iter()
                    .all(|word| error.message().contains(word)),
                "{error}"
            );
            eventually("the disk's release", SEEN_LIMIT, async || {
                is_open(&host, &disk.0).is_ok_and(|open| !open).then_some(())
            })
            .await?;
        }
        ensure!(host.leftovers()?.mounts == before.mounts);
        let listed = cri
            .runtime
            .list_containers(cri::ListContainersRequest { filter: None })
            .await?;
        ensure!(listed.get_ref().containers.is_empty(), "{listed:?}");
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn a_read_only_host_is_read_and_what_would_write_to_it_says_so() -> Result<()> {
    let host = Host::enter()?;
    let disk = Mounted::ext4(&host.dir().join("disk.img"), 64 << 20, host.dir().join("disk"))?;
    fs::create_dir(disk.0.join("data"))?;
    fs::write(disk.0.join("data/file"), "text\n")?;
    let volumes = "pods/uid-frozen/volumes/kubernetes.io~empty-dir/cache";
    fs::create_dir_all(disk.0.join(volumes))?;
    disk.make_read_only()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "frozen");
        let pod_id = cri.run_pod(&config).await?;
        let one = sleeper("one", &image, &[mount(&disk.0.join("data"), "/data")]);
        let one = cri.run(&pod_id, &one, &config).await?;
        ensure!(sh(&mut cri, &one, "cat /data/file").await? == "text\n");
        for script in ["echo x > /data/file", "mkdir /data/dir", "chmod 777 /data"] {
            fails(&mut cri, &one, script, "Read-only file system").await?;
        }
        let empty = sleeper("empty", &image, &[mount(&disk.0.join(volumes), "/cache")]);
        let error = cri
            .create(&pod_id, &empty, &config)
            .await
            .err()
            .context("an emptyDir was made on a read-only file system")?;
        ensure!(
            ["cache", "/cache", "Read-only file system"]
                .iter()
                .all(|word| error.message().contains(word)),
            "{error}"
        );
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
