//! The second half of `make bench-vmm`: disks and network of a pod on the built-in VMM, and on QEMU with KVM, in the same run.
//!
//! `bench-io [SECONDS]` runs fio and iperf3 in a container, for so long each, and prints tables in Markdown. CPU is what all processes of the
//! VM used on the host, vhost threads included; under emulation, work for each second of it says more than work for each second of the wall.
//! Needs fio and iperf3 on the host that it runs on, which it puts into an image with their libraries.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    eventually,
    host::{Host, text},
    image::{Image, Layer, busybox_layer},
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;
use serde_json::{Value, json};

/// Address of the host in the pods' network.
const GATEWAY: &str = "10.88.0.1";

/// What fio does: its name here, and its words.
const DISK: [(&str, &str); 5] = [
    ("random read, 4 KiB, depth 1", "--rw=randread --bs=4k --iodepth=1"),
    (
        "random read, 4 KiB, depth 16",
        "--rw=randread --bs=4k --iodepth=16",
    ),
    (
        "random write, 4 KiB, depth 16",
        "--rw=randwrite --bs=4k --iodepth=16",
    ),
    ("read, 256 KiB, depth 4", "--rw=read --bs=256k --iodepth=4"),
    ("write, 256 KiB, depth 4", "--rw=write --bs=256k --iodepth=4"),
];

/// A figure of one driver: work, its unit, and the CPU time it cost.
struct Figure {
    what: String,
    work: f64,
    unit: &'static str,
    wall: Duration,
    cpu: Duration,
}

fn main() -> Result<()> {
    let seconds: u64 = std::env::args().nth(1).map_or(Ok(8), |text| text.parse())?;
    let host = Host::enter()?;
    let drivers = ["builtin", "qemu"];
    let measured: Vec<Vec<Figure>> = run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("bench/io", "1", &tools()?)?;
        let mut measured = Vec::new();
        for driver in drivers {
            measured.push(measure(&host, driver, &image, seconds).await.context(driver)?);
        }
        Ok(measured)
    })?;
    println!(
        "\n| {seconds} s each | caisson-vmm | QEMU | caisson-vmm, for each CPU-s | QEMU, for each CPU-s |"
    );
    println!("|---|---:|---:|---:|---:|");
    for (ours, theirs) in measured[0].iter().zip(&measured[1]) {
        let rate = |figure: &Figure| figure.work / figure.wall.as_secs_f64();
        let economy = |figure: &Figure| figure.work / figure.cpu.as_secs_f64();
        println!(
            "| {}, {} | {:.0} | {:.0} | {:.0} | {:.0} |",
            ours.what,
            ours.unit,
            rate(ours),
            rate(theirs),
            economy(ours),
            economy(theirs)
        );
    }
    Ok(())
}

/// busybox, fio and iperf3.
fn tools() -> Result<Image> {
    let mut files = BTreeSet::new();
    for program in ["fio", "iperf3"] {
        let path = text(Command::new("sh").args(["-c", &format!("command -v {program}")]))?;
        let path = path.trim().to_owned();
        let libraries = text(Command::new("ldd").arg(&path))?;
        let absolute = |word: &&str| word.starts_with('/');
        files.extend(
            libraries
                .split_ascii_whitespace()
                .filter(absolute)
                .map(str::to_owned),
        );
        files.insert(path);
    }
    let mut layer = Layer::default();
    for file in files {
        let content = fs::read(&file).with_context(|| format!("cannot read {file}"))?;
        let mode = fs::metadata(&file)?.permissions().mode() & 0o777;
        layer = layer.file(file.trim_start_matches('/'), mode, &content)?;
    }
    let config = json!({ "Volumes": { "/data": {} } });
    Ok(Image::new(vec![busybox_layer()?, layer.gzip()?], &config))
}

/// Ends with its scope.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _already_reaped = self.0.wait();
    }
}

async fn measure(host: &Host, driver: &str, image: &str, seconds: u64) -> Result<Vec<Figure>> {
    eprintln!("driver {driver}");
    let mut daemon = Daemon::start(host, &Product::find()?, &["--hypervisor", driver]).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(image).await?;
    let mut config = pod(host, &format!("bench-{driver}"));
    // Two CPUs, so that two queues of the network are used.
    config.linux = Some(cri::LinuxPodSandboxConfig {
        resources: Some(cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 200_000,
            ..Default::default()
        }),
        ..Default::default()
    });
    let pod_id = cri.run_pod(&config).await?;
    let (_, info) = cri.pod_status(&pod_id).await?;
    let info: Value = serde_json::from_str(info.get("info").context("no info")?)?;
    println!("- {driver}: {}", info["hypervisor"].as_str().unwrap_or_default());
    let pids: Vec<String> = info["processes"]
        .as_array()
        .context("no processes")?
        .iter()
        .map(|process| process["pid"].to_string())
        .collect();
    let id = cri
        .run(&pod_id, &container("io", image, &["sleep", "100000"]), &config)
        .await?;
    let mut bench = Bench {
        cri: cri.clone(),
        id,
        pids,
        figures: Vec::new(),
        limit: i64::try_from(seconds)? * 10 + 120,
    };
    bench.disk(seconds).await?;
    bench.network(seconds).await?;
    cri.remove_pod(&pod_id).await?;
    daemon.terminate().await?;
    Ok(bench.figures)
}

/// A container, and what was measured in it.
struct Bench {
    cri: Cri,
    id: String,
    pids: Vec<String>,
    figures: Vec<Figure>,
    /// For each command, seconds.
    limit: i64,
}

impl Bench {
    async fn shell(&mut self, script: &str) -> Result<(String, Duration)> {
        let before = self.cpu();
        let (code, output, errors) = self
            .cri
            .exec_within(&self.id, &["sh", "-c", script], self.limit)
            .await?;
        ensure!(code == 0, "{script}: {code}: {output}{errors}");
        Ok((output, self.cpu() - before))
    }

    /// All threads of the VM's processes.
    fn cpu(&self) -> Duration {
        let nanos = self.pids.iter().flat_map(|pid| tasks(pid)).filter_map(|task| {
            let text = fs::read_to_string(task.join("schedstat")).ok()?;
            text.split_ascii_whitespace().next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanos.sum())
    }

    async fn disk(&mut self, seconds: u64) -> Result<()> {
        let words =
            "fio --name=x --filename=/data/x --size=128M --ioengine=libaio --direct=1 --output-format=json";
        self.shell(&format!("{words} --rw=write --bs=1M --end_fsync=1"))
            .await?;
        for (what, how) in DISK {
            eprintln!("{what}");
            let (output, cpu) = self
                .shell(&format!("{words} {how} --time_based --runtime={seconds}"))
                .await?;
            let start = output.find('{').context("no JSON")?;
            let report: Value = serde_json::from_str(output.get(start..).unwrap_or_default())?;
            let job = &report["jobs"][0];
            let sum = |key: &str| {
                let side = |side: &str| job[side][key].as_f64().unwrap_or_default();
                side("read") + side("write")
            };
            let small = how.contains("4k");
            self.figures.push(Figure {
                what: what.into(),
                work: if small {
                    sum("total_ios")
                } else {
                    sum("io_bytes") / 1e6
                },
                unit: if small { "requests" } else { "MB" },
                wall: Duration::from_secs_f64(job["job_runtime"].as_f64().context("no runtime")? / 1e3),
                cpu,
            });
        }
        Ok(())
    }

    async fn network(&mut self, seconds: u64) -> Result<()> {
        let server = Command::new("iperf3")
            .args(["-s", "-B", GATEWAY])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let _server = Server(server);
        eventually("iperf3's port", Duration::from_secs(20), async || {
            tokio::net::TcpStream::connect((GATEWAY, 5201)).await.ok()
        })
        .await?;
        let directions = [
            ("TCP to the host", "-P 1"),
            ("TCP from the host", "-P 1 -R"),
            ("TCP to the host, 4 streams", "-P 4"),
        ];
        for (what, words) in directions {
            eprintln!("{what}");
            // A server that still ends with the one before says busy.
            let script = format!(
                "for i in 1 2 3 4 5 6 7 8; do iperf3 -c {GATEWAY} -t {seconds} -J {words} >/tmp/out && break; sleep 0.2; done; cat /tmp/out"
            );
            let (output, cpu) = self.shell(&script).await?;
            let report: Value = serde_json::from_str(&output)?;
            let received = &report["end"]["sum_received"];
            self.figures.push(Figure {
                what: what.into(),
                work: received["bytes"].as_f64().context("no bytes")? / 1e6,
                unit: "MB",
                wall: Duration::from_secs_f64(received["seconds"].as_f64().context("no time")?),
                cpu,
            });
        }
        eprintln!("echoes");
        let count = 100 * seconds;
        let began = Instant::now();
        let (output, cpu) = self.shell(&format!("ping -q -A -c {count} {GATEWAY}")).await?;
        ensure!(output.contains(" 0% packet loss"), "{output}");
        self.figures.push(Figure {
            what: "echo requests, one after the other".into(),
            #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
            work: count as f64,
            unit: "echoes",
            wall: began.elapsed(),
            cpu,
        });
        Ok(())
    }
}

fn tasks(pid: &str) -> Vec<std::path::PathBuf> {
    let tasks = fs::read_dir(Path::new("/proc").join(pid).join("task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .map(|task| task.path())
        .collect()
}
