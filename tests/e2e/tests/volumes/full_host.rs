//! A host whose disk is full: what containers write waits and is not lost, everybody is told, and nothing else waits for it.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, STATE_LIMIT, pod},
    eventually,
    host::{Host, command, text},
    node::{Node, node},
    run,
    volumes::{Mounted, kubelet_volume, mount, sh, sleeper},
};

/// Of the disk that holds the daemon's state and kubelet's.
const DISK_BYTES: u64 = 256 << 20;
/// What is left of it, MiB, when it is "full": less than a container writes.
const LEFT_MIB: u64 = 6;
const WRITTEN_MIB: u64 = 32;

/// A small disk below the daemon's state and kubelet's directory.
struct SmallDisk {
    // Unmounted in this order.
    _root: Mounted,
    _kubelet: Mounted,
    disk: Mounted,
}

impl SmallDisk {
    fn new(host: &Host) -> Result<Self> {
        let disk = Mounted::ext4(
            &host.dir().join("small.img"),
            DISK_BYTES,
            host.dir().join("small"),
        )?;
        let part = |name: &str| -> Result<Mounted> {
            fs::create_dir(disk.0.join(name))?;
            Mounted::bind(&disk.0.join(name), host.dir().join(name))
        };
        Ok(Self {
            _root: part("root")?,
            _kubelet: part("kubelet")?,
            disk,
        })
    }

    fn filler(&self) -> PathBuf {
        self.disk.0.join("filler")
    }

    fn left_mib(&self) -> Result<u64> {
        let said = text(
            Command::new("df")
                .args(["--output=avail", "-BM"])
                .arg(&self.disk.0),
        )?;
        let number = said.lines().nth(1).context("df says nothing")?.trim();
        Ok(number.trim_end_matches('M').parse()?)
    }

    fn fill(&self) -> Result<()> {
        let bytes = self.left_mib()?.saturating_sub(LEFT_MIB) << 20;
        command(
            Command::new("fallocate")
                .args(["-l", &bytes.to_string()])
                .arg(self.filler()),
        )
    }

    fn make_space(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }
}

/// Disks of the pod that wait, as its status says.
async fn waiting(cri: &mut Cri, pod_id: &str) -> Result<Vec<String>> {
    let (_, info) = cri.pod_status(pod_id).await?;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
    let disks = info["disksWaitingForSpace"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    Ok(disks
        .iter()
        .filter_map(|disk| disk.as_str().map(str::to_owned))
        .collect())
}

async fn begins_to_wait(cri: &mut Cri, pod_id: &str) -> Result<Vec<String>> {
    eventually("the word that the pod waits for space", STATE_LIMIT, async || {
        waiting(cri, pod_id).await.ok().filter(|disks| !disks.is_empty())
    })
    .await
}

/// Writes into the volume, and leaves what it wrote and its sum there; in the background.
fn writer() -> String {
    format!(
        "(set -e; dd if=/dev/urandom of=/data/big bs=1M count={WRITTEN_MIB} conv=fsync; sha256sum < /data/big > /data/sum; sync; \
         touch /data/done) >/data/said 2>&1 &"
    )
}

#[test]
fn what_finds_no_space_waits_is_told_of_and_goes_on_when_there_is_some() -> Result<()> {
    let host = Host::enter()?;
    let small = SmallDisk::new(&host)?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "full");
        let volume = kubelet_volume(&host, "full", "empty-dir", "data")?;
        let pod_id = cri.run_pod(&config).await?;
        let id = cri
            .run(
                &pod_id,
                &sleeper("one", &image, &[mount(&volume, "/data")]),
                &config,
            )
            .await?;
        small.fill()?;
        sh(&mut cri, &id, &writer()).await?;
        let disks = begins_to_wait(&mut cri, &pod_id).await?;
        ensure!(disks.iter().all(|disk| disk.starts_with("vol-")), "{disks:?}");
        ensure!(
            daemon
                .log()
                .contains("the host has no space for what the pod writes"),
            "{}",
            daemon.log()
        );
        let (status, _) = cri.pod_status(&pod_id).await?;
        ensure!(status.state == 0, "the pod is not ready any more");

        // A daemon that is started meanwhile knows it too.
        daemon.kill()?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        begins_to_wait(&mut cri, &pod_id).await?;

        small.make_space()?;
        eventually("the end of the wait", STATE_LIMIT, async || {
            waiting(&mut cri, &pod_id)
                .await
                .ok()
                .filter(Vec::is_empty)
                .map(drop)
        })
        .await?;
        eventually("the end of the write", STATE_LIMIT, async || {
            let done = cri.exec(&id, &["test", "-e", "/data/done"]).await.ok()?;
            (done.0 == 0).then_some(())
        })
        .await?;
        let sums = sh(&mut cri, &id, "sha256sum < /data/big; cat /data/sum").await?;
        let sums: Vec<&str> = sums.lines().collect();
        ensure!(matches!(sums[..], [one, other] if one == other), "{sums:?}");
        // The guest's clock, which stood, is right again.
        eventually("the time of day", STATE_LIMIT, async || {
            let guest: u64 = sh(&mut cri, &id, "date +%s").await.ok()?.trim().parse().ok()?;
            let here = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .ok()?
                .as_secs();
            (guest.abs_diff(here) <= 1).then_some(())
        })
        .await?;
        cri.remove_pod(&pod_id).await?;

        // What is on the disk is what was written, in a file system without a fault.
        let file = volume.join(".caisson-volume.img");
        let replay = Command::new("e2fsck").arg("-p").arg(&file).status()?;
        ensure!(matches!(replay.code(), Some(0 | 1)), "e2fsck -p: {replay}");
        command(Command::new("e2fsck").arg("-fn").arg(&file))?;
        Ok(())
    })
}

#[test]
fn a_pod_that_waits_for_space_is_stopped_at_once_and_what_needs_space_says_so() -> Result<()> {
    let host = Host::enter()?;
    let small = SmallDisk::new(&host)?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "stopped");
        let other = pod(&host, "bystander");
        let data = kubelet_volume(&host, "stopped", "empty-dir", "data")?;
        let volume = kubelet_volume(&host, "bystander", "empty-dir", "late")?;
        let pod_id = cri.run_pod(&config).await?;
        let other_id = cri.run_pod(&other).await?;
        let bystander = cri
            .run(&other_id, &sleeper("bystander", &image, &[]), &other)
            .await?;
        let id = cri
            .run(
                &pod_id,
                &sleeper("one", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        small.fill()?;
        sh(&mut cri, &id, &writer()).await?;
        begins_to_wait(&mut cri, &pod_id).await?;

        // Who writes nothing does not wait; what has to write says what it lacks, and leaves nothing.
        ensure!(sh(&mut cri, &bystander, "echo here").await? == "here\n");
        let late = sleeper("late", &image, &[mount(&volume, "/late")]);
        let error = cri
            .create(&other_id, &late, &other)
            .await
            .err()
            .context("a container was made without space for its volume")?;
        ensure!(error.message().contains("No space left on device"), "{error}");
        ensure!(fs::read_dir(&volume)?.next().is_none(), "{volume:?} is not empty");
        let refused = cri.run_pod(&pod(&host, "third")).await;
        ensure!(
            refused
                .as_ref()
                .is_err_and(|error| error.message().contains("No space left on device")),
            "{refused:?}"
        );

        // Nothing in the guest is asked, since it cannot answer.
        tokio::time::timeout(Duration::from_secs(20), cri.stop_pod(&pod_id))
            .await
            .context("StopPodSandbox waits for space")??;
        small.make_space()?;
        let id = cri.run(&other_id, &late, &other).await?;
        sh(&mut cri, &id, "echo x > /late/x && sync").await?;
        cri.remove_pod(&pod_id).await?;
        cri.remove_pod(&other_id).await?;
        drop(daemon);
        host.leftovers()?.nothing_new_since(&before)
    })
}
