//! The second half of `make bench-vmm`: disks and network of a pod on the built-in VMM, and on QEMU with KVM, in the same run.
//!
//! `bench-io [SECONDS]` runs fio, iperf3 and echoes over TCP in a container, for so long each, and prints tables in Markdown. CPU is what all
//! processes of the VM used on the host, vhost threads included; under emulation, work for each second of it says more than work for each second
//! of the wall. Needs fio and iperf3 on the host that it runs on, which it puts into an image with their libraries, and itself: `bench-io
//! --echo ADDRESS SECONDS` is the client of the echoes. What fails is told, left out of the tables, and ends the program with an error.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    eventually,
    figures::{cpu_of, quantile},
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

/// Words of every call of fio.
const FIO: &str =
    "fio --name=x --filename=/data/x --size=128M --ioengine=libaio --direct=1 --output-format=json";

/// What iperf3 does: its name here, and its words.
const STREAMS: [(&str, &str); 3] = [
    ("TCP to the host", "-P 1"),
    ("TCP from the host", "-P 1 -R"),
    ("TCP to the host, 4 streams", "-P 4"),
];

/// Where the host answers echoes.
const ECHO_PORT: u16 = 5203;

/// The longest that one driver may take; what has not been measured by then is left out.
const DRIVER_LIMIT: Duration = Duration::from_secs(540);

/// A figure of one driver: work, its unit, and the CPU time it cost.
struct Figure {
    what: String,
    work: f64,
    unit: &'static str,
    wall: Duration,
    cpu: Duration,
    /// Of single requests, where they come one after the other: median and 99th percentile, microseconds.
    latency: Option<(f64, f64)>,
}

/// What was measured of one driver.
#[derive(Default)]
struct Measured {
    figures: Vec<Figure>,
    failures: usize,
}

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, address, seconds] = &args[..]
        && flag == "--echo"
    {
        println!("{}", echo(address, Duration::from_secs(seconds.parse()?))?);
        return Ok(ExitCode::SUCCESS);
    }
    let seconds: u64 = args.first().map_or(Ok(8), |text| text.parse())?;
    let host = Host::enter()?;
    let drivers = ["builtin", "qemu"];
    let measured: Vec<Measured> = run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("bench/io", "1", &tools()?)?;
        let mut measured = Vec::new();
        for driver in drivers {
            let mut one = Measured::default();
            let limited =
                tokio::time::timeout(DRIVER_LIMIT, measure(&host, driver, &image, seconds, &mut one)).await;
            let failure = match limited {
                Ok(outcome) => outcome.err(),
                Err(_) => Some(anyhow::anyhow!("not done after {} s", DRIVER_LIMIT.as_secs())),
            };
            if let Some(error) = failure {
                println!("- {driver}: failed: {error:#}");
                one.failures += 1;
            }
            measured.push(one);
        }
        Ok(measured)
    })?;
    report(&measured, seconds);
    let failures: usize = measured.iter().map(|one| one.failures).sum();
    if failures > 0 {
        println!("\n**Incomplete: {failures} measurements failed; see above.**");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// A table of every figure that any driver has.
fn report(measured: &[Measured], seconds: u64) {
    let mut names: Vec<(&str, &str)> = Vec::new();
    for figure in measured.iter().flat_map(|one| &one.figures) {
        if !names.contains(&(&figure.what, figure.unit)) {
            names.push((&figure.what, figure.unit));
        }
    }
    let cells = |what: &str, value: &dyn Fn(&Figure) -> Option<f64>| -> String {
        let cell = |one: &Measured| {
            let figure = one.figures.iter().find(|figure| figure.what == what);
            figure
                .and_then(value)
                .map_or("-".to_owned(), |value| format!("{value:.0}"))
        };
        measured.iter().map(cell).collect::<Vec<_>>().join(" | ")
    };
    println!(
        "\n| {seconds} s each | caisson-vmm | QEMU | caisson-vmm, for each CPU-s | QEMU, for each CPU-s |"
    );
    println!("|---|---:|---:|---:|---:|");
    for (what, unit) in &names {
        let rate = cells(what, &|figure| Some(figure.work / figure.wall.as_secs_f64()));
        let economy = cells(what, &|figure| {
            let spent = figure.cpu.as_secs_f64();
            (spent > 0.0).then(|| figure.work / spent)
        });
        println!("| {what}, {unit} | {rate} | {economy} |");
    }
    println!("\n| latency, µs | caisson-vmm, median | QEMU, median | caisson-vmm, 99 % | QEMU, 99 % |");
    println!("|---|---:|---:|---:|---:|");
    for (what, _) in &names {
        let median = cells(what, &|figure| Some(figure.latency?.0));
        let tail = cells(what, &|figure| Some(figure.latency?.1));
        if median.contains(|letter: char| letter.is_ascii_digit()) {
            println!("| {what} | {median} | {tail} |");
        }
    }
}

/// Sends a byte and waits for it to come back, again and again: how often, and the time of each.
fn echo(address: &str, length: Duration) -> Result<Value> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let (began, mut times) = (Instant::now(), Vec::new());
    while began.elapsed() < length {
        let sent = Instant::now();
        let mut byte = [7];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    Ok(json!({
        "count": times.len(),
        "seconds": began.elapsed().as_secs_f64(),
        "median": quantile(&times, 0.5),
        "tail": quantile(&times, 0.99),
    }))
}

/// Answers echoes, one client at a time, for as long as the process lives.
fn answer_echoes(listener: &TcpListener) {
    for stream in listener.incoming() {
        // A client that goes away is done.
        let _done = stream.and_then(|mut stream| {
            stream.set_nodelay(true)?;
            let mut byte = [0];
            loop {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
            #[expect(unreachable_code, reason = "names the type of the loop's end")]
            std::io::Result::Ok(())
        });
    }
}

/// busybox, fio, iperf3 and this program.
fn tools() -> Result<Image> {
    let mut files = BTreeSet::new();
    let own = std::env::current_exe()?;
    let mut programs = vec![own.to_str().context("a path that is no text")?.to_owned()];
    for program in ["fio", "iperf3"] {
        let path = text(Command::new("sh").args(["-c", &format!("command -v {program}")]))?;
        programs.push(path.trim().to_owned());
    }
    for path in programs {
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

async fn measure(
    host: &Host,
    driver: &str,
    image: &str,
    seconds: u64,
    measured: &mut Measured,
) -> Result<()> {
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
        driver: driver.to_owned(),
        measured,
        limit: i64::try_from(seconds)? * 6 + 60,
    };
    bench.disk(seconds).await;
    bench.network(seconds).await;
    cri.remove_pod(&pod_id).await?;
    daemon.terminate().await?;
    Ok(())
}

/// A container, and what was measured in it.
struct Bench<'m> {
    cri: Cri,
    id: String,
    pids: Vec<String>,
    driver: String,
    measured: &'m mut Measured,
    /// For each command, seconds.
    limit: i64,
}

impl Bench<'_> {
    async fn shell(&mut self, script: &str) -> Result<(String, Duration)> {
        let before = self.cpu();
        let (code, output, errors) = self
            .cri
            .exec_within(&self.id, &["sh", "-c", script], self.limit)
            .await?;
        ensure!(code == 0, "{script}: {code}: {output}{errors}");
        Ok((output, self.cpu().saturating_sub(before)))
    }

    /// All threads of the VM's processes.
    fn cpu(&self) -> Duration {
        self.pids.iter().map(|pid| cpu_of(pid)).sum()
    }

    /// A figure more, or a failure.
    fn note(&mut self, what: &str, outcome: Result<Figure>) {
        match outcome {
            Ok(figure) => {
                let rate = figure.work / figure.wall.as_secs_f64();
                eprintln!("{what}: {rate:.0} {} each second", figure.unit);
                self.measured.figures.push(figure);
            }
            Err(error) => {
                println!("- {}: {what}: failed: {error:#}", self.driver);
                self.measured.failures += 1;
            }
        }
    }

    async fn disk(&mut self, seconds: u64) {
        let prepared = self
            .shell(&format!("{FIO} --rw=write --bs=1M --end_fsync=1"))
            .await;
        if let Err(error) = prepared {
            return self.note("a file for fio", Err(error));
        }
        for (what, how) in DISK {
            let outcome = self.fio(what, how, seconds).await;
            self.note(what, outcome);
        }
    }

    async fn fio(&mut self, what: &str, how: &str, seconds: u64) -> Result<Figure> {
        let (output, cpu) = self
            .shell(&format!("{FIO} {how} --time_based --runtime={seconds}"))
            .await?;
        let start = output.find('{').context("no JSON")?;
        let report: Value = serde_json::from_str(output.get(start..).unwrap_or_default())?;
        let job = &report["jobs"][0];
        let sum = |key: &str| {
            let side = |side: &str| job[side][key].as_f64().unwrap_or_default();
            side("read") + side("write")
        };
        let small = how.contains("4k");
        let percentile = |side: &str, key: &str| job[side]["clat_ns"]["percentile"][key].as_f64();
        let latency = ["read", "write"].iter().find_map(|side| {
            let (median, tail) = (percentile(side, "50.000000")?, percentile(side, "99.000000")?);
            (median > 0.0).then_some((median / 1e3, tail / 1e3))
        });
        Ok(Figure {
            what: what.into(),
            work: if small {
                sum("total_ios")
            } else {
                sum("io_bytes") / 1e6
            },
            unit: if small { "requests" } else { "MB" },
            wall: Duration::from_secs_f64(job["job_runtime"].as_f64().context("no runtime")? / 1e3),
            cpu,
            latency: latency.filter(|_| small),
        })
    }

    async fn network(&mut self, seconds: u64) {
        let server = Command::new("iperf3")
            .args(["-s", "-B", GATEWAY])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let server = match server {
            Ok(server) => Server(server),
            Err(error) => return self.note("iperf3's server", Err(error.into())),
        };
        let listens = eventually("iperf3's port", Duration::from_secs(20), async || {
            let tried = tokio::net::TcpStream::connect((GATEWAY, 5201)).await;
            // It serves one connection after the other: this one must end.
            tried.ok().map(drop)
        });
        match listens.await {
            Ok(()) => {
                for (what, words) in STREAMS {
                    let outcome = self.iperf3(what, words, seconds).await;
                    self.note(what, outcome);
                }
            }
            Err(error) => self.note("iperf3's server", Err(error)),
        }
        drop(server);
        let what = "echoes over TCP, one after the other";
        let outcome = self.echoes(what, seconds).await;
        self.note(what, outcome);
    }

    async fn iperf3(&mut self, what: &str, words: &str, seconds: u64) -> Result<Figure> {
        // A server that still ends with the one before says busy.
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8; do iperf3 -c {GATEWAY} -t {seconds} -J {words} >/tmp/out && break; sleep 0.2; done; cat /tmp/out"
        );
        let (output, cpu) = self.shell(&script).await?;
        let report: Value = serde_json::from_str(&output)?;
        let received = &report["end"]["sum_received"];
        Ok(Figure {
            what: what.into(),
            work: received["bytes"]
                .as_f64()
                .with_context(|| format!("no bytes: {}", report["error"]))?
                / 1e6,
            unit: "MB",
            wall: Duration::from_secs_f64(received["seconds"].as_f64().context("no time")?),
            cpu,
            latency: None,
        })
    }

    async fn echoes(&mut self, what: &str, seconds: u64) -> Result<Figure> {
        // Another driver's may still be there: it answers as well.
        if let Ok(listener) = TcpListener::bind((GATEWAY, ECHO_PORT)) {
            std::thread::spawn(move || answer_echoes(&listener));
        }
        let own = std::env::current_exe()?;
        let script = format!("{} --echo {GATEWAY}:{ECHO_PORT} {seconds}", own.display());
        let (output, cpu) = self.shell(&script).await?;
        let report: Value = serde_json::from_str(&output)?;
        let number = |key: &str| report[key].as_f64().with_context(|| format!("no {key}"));
        Ok(Figure {
            what: what.into(),
            work: number("count")?,
            unit: "echoes",
            wall: Duration::from_secs_f64(number("seconds")?),
            cpu,
            latency: Some((number("median")?, number("tail")?)),
        })
    }
}
