//! `make bench-images`: what pulling and converting an image of many layers costs, against containerd on the same image from the same
//! registry in the same run, where there is one: `CAISSON_BENCH_CONTAINERD` names its binary.
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
    cri::Cri,
    daemon::{Daemon, Product},
    eventually,
    host::{Host, text},
    image::{Image, Layer, debian_package},
    registry::Registry,
    run,
};
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

fn main() -> Result<()> {
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
    if let Some(containerd) = env::var_os("CAISSON_BENCH_CONTAINERD") {
        let mut costs = Vec::new();
        for number in 0..RUNS {
            let root = host.dir().join(format!("containerd-{number}"));
            costs.push(containerd_pull(Path::new(&containerd), &root, &image).await?);
        }
        let version = text(Command::new(&containerd).arg("--version"))?;
        row(
            &format!(
                "containerd {}, overlayfs",
                version.split(' ').nth(2).unwrap_or("?")
            ),
            &costs,
        );
    }
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

/// A process that ends with this value.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _already_reaped = self.0.wait();
    }
}

async fn containerd_pull(containerd: &Path, root: &Path, image: &str) -> Result<Cost> {
    fs::create_dir_all(root)?;
    let (socket, config) = (root.join("sock"), root.join("config.toml"));
    let data = root.join("root");
    fs::write(
        &config,
        format!(
            "version = 3\nroot = {data:?}\nstate = {:?}\n[grpc]\n  address = {socket:?}\n\
             [plugins.'io.containerd.cri.v1.images']\n  snapshotter = 'overlayfs'\n",
            root.join("state"),
        ),
    )?;
    let log = fs::File::create(root.join("log"))?;
    let mut peer = Peer(
        Command::new(containerd)
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
    fs::remove_dir_all(root)?;
    Ok(cost)
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

/// Blocks below a directory, in bytes.
fn disk(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path)?;
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
