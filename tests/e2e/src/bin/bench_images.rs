//! `make bench-images`: what pulling and converting an image of many layers costs, against Debian's containerd on the same image from the same
//! registry in the same run, unpacking (overlayfs) and converting (its erofs snapshotter, where the host has EROFS); and how long a
//! container of that image takes to start, next to one of a small image.
//!
//! Prints Markdown for docs/performance.md. CPU time is that of the server and the children it has waited for; memory is the largest sum of
//! proportional set sizes that was seen of both; disk is what the file system gave.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cache,
    containerd::Containerd,
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    eventually, figures,
    host::Host,
    image::{self, Image, Layer, debian_package},
    registry::Registry,
    run,
};
use nix::mount::{MntFlags, umount2};
use serde_json::json;

/// A layer for each; together about 300 MB when unpacked. Some are large files, some are thousands of small ones.
const PACKAGES: [&str; 18] = [
    "libc6",
    "coreutils",
    "perl-base",
    "perl-modules-5.36",
    "libpython3.11-stdlib",
    "libpython3.11-minimal",
    "python3.11-minimal",
    "libicu72",
    "cpp-12",
    "binutils-x86-64-linux-gnu",
    "libstdc++-12-dev",
    "libc6-dev",
    "linux-libc-dev",
    "git",
    "vim-runtime",
    "locales",
    "tzdata",
    "manpages",
];
const RUNS: usize = 3;
/// Containers of each image that are started.
const STARTS: usize = 7;

fn main() -> Result<()> {
    // While there is a network.
    Containerd::fetch()?;
    image::fetch_packages()?;
    for name in PACKAGES {
        debian_package(name)?;
    }
    run(bench())
}

/// What one pull cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
    peak_kib: u64,
    disk_bytes: u64,
}

async fn bench() -> Result<()> {
    let host = Host::enter()?;
    let layers = PACKAGES
        .iter()
        .map(|name| Layer::default().package(&debian_package(name)?, |_| true)?.gzip())
        .collect::<Result<Vec<_>>>()?;
    let compressed: usize = layers.iter().map(|layer| layer.bytes.len()).sum();
    let count = layers.len();
    let registry = Registry::start(&host.dir().join("registry")).await?;
    let image = registry.push("bench", "1", &Image::new(layers, &json!({ "Cmd": ["sh"] })))?;
    println!(
        "{count} layers, {:.1} MB compressed; the better of {RUNS} runs, each into an empty store.\n",
        mb(compressed as u64)
    );
    println!("| | wall s | CPU s | peak memory MiB | disk MB |\n|---|---:|---:|---:|---:|");
    let mut costs = Vec::new();
    for number in 0..RUNS {
        costs.push(caisson(&host, &image, number).await?);
    }
    row("caissond", &costs);
    let versions = Containerd::versions()?;
    let (version, _) = versions.split_once('+').unwrap_or((&versions, ""));
    for snapshotter in ["overlayfs", "erofs"] {
        let mut costs = Vec::new();
        for number in 0..RUNS {
            let root = host.dir().join(format!("containerd-{snapshotter}-{number}"));
            match containerd_pull(&root, snapshotter, &image).await {
                Ok(cost) => costs.push(cost),
                Err(error) => {
                    println!("\n- containerd with {snapshotter} is left out: {error:#}");
                    break;
                }
            }
        }
        row(&format!("{version}, {snapshotter}"), &costs);
    }
    let small = registry.push("small", "1", &image::busybox()?)?;
    starts(&host, &image, &small).await?;
    println!("\n{}", figures::machine()?);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn row(name: &str, costs: &[Cost]) {
    let Some(best) = costs.iter().min_by_key(|cost| cost.wall) else {
        return;
    };
    println!(
        "| {name} | {:.2} | {:.2} | {:.0} | {:.0} |",
        best.wall.as_secs_f64(),
        best.cpu.as_secs_f64(),
        mb(best.peak_kib * 1024) * 1e6 / f64::from(1 << 20),
        mb(best.disk_bytes)
    );
}

async fn caisson(host: &Host, image: &str, number: usize) -> Result<Cost> {
    let product = Product::find()?;
    let mut daemon = Daemon::start(host, &product, &[]).await?;
    let mut cri = daemon.cri().await?;
    let store = host.dir().join("root/images");
    let before = disk(&store)?;
    let watch = Watch::start(daemon.pid());
    let (start, spent) = (Instant::now(), cpu(daemon.pid())?);
    cri.pull(image).await?;
    let wall = start.elapsed();
    let cost = Cost {
        wall,
        cpu: cpu(daemon.pid())?.saturating_sub(spent),
        peak_kib: watch.stop(),
        disk_bytes: disk(&store)?.saturating_sub(before),
    };
    ensure!(
        cost.disk_bytes > 0,
        "nothing was stored in {}, run {number}",
        store.display()
    );
    cri.remove_image(image).await?;
    daemon.terminate().await?;
    Ok(cost)
}

/// From CreateContainer to the answer of StartContainer, images that are there already, one container at a time in one pod: so each image is
/// attached anew.
async fn starts(host: &Host, large: &str, small: &str) -> Result<()> {
    let mut daemon = Daemon::start(host, &Product::find()?, &[]).await?;
    let mut cri = daemon.cri().await?;
    let pod = pod(host, "starts");
    let id = cri.run_pod(&pod).await?;
    let mut taken: [Vec<f64>; 2] = Default::default();
    for image in [large, small] {
        cri.pull(image).await?;
    }
    for number in 0..STARTS {
        for (image, taken) in [large, small].into_iter().zip(&mut taken) {
            let config = container(&format!("c-{number}"), image, &["/bin/sleep", "1000000"]);
            let began = Instant::now();
            let started = cri.run(&id, &config, &pod).await?;
            taken.push(figures::ms(began.elapsed()));
            cri.remove(&started).await?;
        }
    }
    cri.stop_pod(&id).await?;
    cri.remove_pod(&id).await?;
    daemon.terminate().await?;
    println!("\n| CreateContainer and StartContainer, ms | least | median |\n|---|---:|---:|");
    for (name, taken) in ["that image", "busybox, one small layer"].iter().zip(&taken) {
        let [least, median] = [0.0, 0.5].map(|q| figures::quantile(taken, q));
        println!("| {name} | {least:.0} | {median:.0} |");
    }
    Ok(())
}

/// A process that ends with this value.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _already_reaped = self.0.wait();
    }
}

async fn containerd_pull(root: &Path, snapshotter: &str, image: &str) -> Result<Cost> {
    fs::create_dir_all(root)?;
    let (socket, config) = (root.join("sock"), root.join("config.toml"));
    let data = root.join("root");
    fs::write(
        &config,
        format!(
            "version = 3\nroot = {data:?}\nstate = {:?}\n[grpc]\n  address = {socket:?}\n\
             [plugins.'io.containerd.cri.v1.images']\n  snapshotter = '{snapshotter}'\n\
             [plugins.'io.containerd.service.v1.diff-service']\n  default = ['erofs', 'walking']\n\
             [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n  platform = 'linux/amd64'\n  \
             snapshotter = '{snapshotter}'\n  differ = '{}'\n",
            root.join("state"),
            if snapshotter == "erofs" {
                "erofs"
            } else {
                "walking"
            },
        ),
    )?;
    let log = fs::File::create(root.join("log"))?;
    let tools = cache().join("erofs-utils-1.8");
    let path = format!("{}:{}", tools.display(), env::var("PATH").unwrap_or_default());
    let mut peer = Peer(
        Command::new(cache().join("containerd/bin/containerd"))
            // Its erofs snapshotter calls mkfs.erofs.
            .env("PATH", path)
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?,
    );
    let mut cri = eventually("containerd's answer", Duration::from_secs(30), async || {
        let mut cri = Cri::connect(&socket).await.ok()?;
        cri.version().await.ok().map(|_| cri)
    })
    .await?;
    let pid = peer.0.id();
    let before = disk(&data)?;
    let watch = Watch::start(pid);
    let (start, spent) = (Instant::now(), cpu(pid)?);
    cri.pull(image).await?;
    let wall = start.elapsed();
    let cost = Cost {
        wall,
        cpu: cpu(pid)?.saturating_sub(spent),
        peak_kib: watch.stop(),
        disk_bytes: disk(&data)?.saturating_sub(before),
    };
    peer.0.kill()?;
    peer.0.wait()?;
    unmount_below(root)?;
    fs::remove_dir_all(root)?;
    Ok(cost)
}

/// containerd leaves its layers mounted when it ends.
fn unmount_below(root: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| Path::new(point).starts_with(root)) {
        umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {point}"))?;
    }
    Ok(())
}

/// CPU time of a process and of the children it has waited for (proc(5), stat: utime, stime, cutime, cstime).
fn cpu(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("stat without a name")?;
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(4)
        .map(str::parse::<u64>)
        .sum::<Result<u64, _>>()?;
    // USER_HZ is 100 on every architecture that matters here.
    Ok(Duration::from_millis(ticks * 10))
}

/// Blocks below a directory, in bytes, without what is mounted there.
fn disk(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    let device = fs::metadata(directory)?.dev();
    let mut pending = vec![directory.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.dev() != device {
            continue;
        }
        bytes += metadata.blocks() * 512;
        if metadata.is_dir() {
            for entry in fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        }
    }
    Ok(bytes)
}

/// Looks at the memory of a process and its children again and again.
struct Watch {
    peak: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watch {
    fn start(pid: u32) -> Self {
        let (peak, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (highest, end) = (peak.clone(), ended.clone());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                let sum = std::iter::once(pid).chain(children(pid)).map(memory).sum::<u64>();
                highest.fetch_max(sum, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Self { peak, ended, thread }
    }

    fn stop(self) -> u64 {
        self.ended.store(true, Ordering::SeqCst);
        let _panicked = self.thread.join();
        self.peak.load(Ordering::SeqCst)
    }
}

fn children(pid: u32) -> Vec<u32> {
    let tasks: Vec<PathBuf> = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|task| task.path().join("children"))
        .collect();
    tasks
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Proportional set size in KiB; zero for a process that is gone.
fn memory(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|line| line.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap_or_default()
}
