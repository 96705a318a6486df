//! `make bench`: what a pod costs, step by step: wall time and CPU time, the VM's boot split, and memory.
//!
//! Prints Markdown for docs/performance.md. CPU time is that of the daemon and of all processes of VMs together, read from the
//! scheduler's own counters before and after each step; wall times under emulation compare only within one run.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use caisson_e2e::{
    checkout,
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    figures::{cpu_of, machine, ms, quantile},
    host::Host,
    image,
    registry::Registry,
    run,
};

/// Pods that are run after each other, when the command line doesn't say.
const RUNS: usize = 10;

/// Samples by name of the step, in the order of their first appearance.
#[derive(Default)]
struct Samples {
    order: Vec<String>,
    values: BTreeMap<String, Vec<(Duration, Duration)>>,
}

impl Samples {
    fn add(&mut self, name: &str, wall: Duration, cpu: Duration) {
        if !self.values.contains_key(name) {
            self.order.push(name.to_owned());
        }
        self.values.entry(name.to_owned()).or_default().push((wall, cpu));
    }

    fn print(&self, title: &str, with_cpu: bool) {
        println!(
            "\n| {title} | median ms | p95 ms |{}",
            if with_cpu {
                " CPU median ms | CPU p95 ms |"
            } else {
                ""
            }
        );
        println!("|---|---:|---:|{}", if with_cpu { "---:|---:|" } else { "" });
        for name in &self.order {
            let samples = &self.values[name];
            let wall: Vec<f64> = samples.iter().map(|sample| ms(sample.0)).collect();
            let cpu: Vec<f64> = samples.iter().map(|sample| ms(sample.1)).collect();
            print!(
                "| {name} | {:.1} | {:.1} |",
                quantile(&wall, 0.5),
                quantile(&wall, 0.95)
            );
            if with_cpu {
                print!(" {:.1} | {:.1} |", quantile(&cpu, 0.5), quantile(&cpu, 0.95));
            }
            println!();
        }
    }
}

/// The daemon and everything of its VMs. Processes that ended in between are not counted again, so steps that end a VM have none.
fn cpu(host: &Host, daemon: &Daemon) -> Result<Duration> {
    let vms = host.leftovers()?.processes;
    let vms = vms
        .iter()
        .filter_map(|process| process.split(' ').next())
        .map(cpu_of)
        .sum::<Duration>();
    Ok(vms + cpu_of(&daemon.pid().to_string()))
}

/// Proportional set size in KiB.
fn pss(pid: &str) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .context("no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

struct Bench<'a> {
    host: &'a Host,
    daemon: &'a Daemon,
    cri: Cri,
    steps: Samples,
    boot: Samples,
}

impl Bench<'_> {
    async fn step<T>(&mut self, name: &str, work: impl AsyncFnOnce(&mut Cri) -> Result<T>) -> Result<T> {
        let before = cpu(self.host, self.daemon)?;
        let start = Instant::now();
        let result = work(&mut self.cri).await?;
        let wall = start.elapsed();
        let spent = cpu(self.host, self.daemon)?.saturating_sub(before);
        self.steps.add(name, wall, spent);
        Ok(result)
    }

    async fn one(&mut self, number: usize, image: &str) -> Result<()> {
        let config = pod(self.host, &format!("bench-{number}"));
        let pod_id = self
            .step("RunPodSandbox", async |cri| Ok(cri.run_pod(&config).await?))
            .await?;
        self.split(&pod_id).await?;
        let sleeper = container("sleeper", image, &["sleep", "1000"]);
        let id = self
            .step("CreateContainer (attaches the image)", async |cri| {
                Ok(cri.create(&pod_id, &sleeper, &config).await?)
            })
            .await?;
        self.step("StartContainer", async |cri| Ok(cri.start(&id).await?))
            .await?;
        let second = container("second", image, &["sleep", "1000"]);
        let id = self
            .step("CreateContainer (image attached)", async |cri| {
                Ok(cri.create(&pod_id, &second, &config).await?)
            })
            .await?;
        self.step("StartContainer", async |cri| Ok(cri.start(&id).await?))
            .await?;
        self.step("ExecSync true", async |cri| Ok(cri.exec(&id, &["true"]).await?))
            .await?;
        if number == 0 {
            self.memory(&pod_id).await?;
        }
        self.step("StopPodSandbox", async |cri| Ok(cri.stop_pod(&pod_id).await?))
            .await?;
        self.step("RemovePodSandbox", async |cri| {
            Ok(cri.remove_pod(&pod_id).await?)
        })
        .await
    }

    /// The parts of RunPodSandbox, as the daemon and the agent measured them.
    async fn split(&mut self, pod_id: &str) -> Result<()> {
        let (_, info) = self.cri.pod_status(pod_id).await?;
        let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
        for (step, value) in info["timings_ms"].as_object().context("no timings")? {
            let wall = Duration::from_secs_f64(value.as_f64().unwrap_or_default() / 1000.0);
            self.boot.add(&format!("daemon: {step}"), wall, Duration::ZERO);
        }
        let nanos = |key: &str| Duration::from_nanos(info["agent"][key].as_u64().unwrap_or_default());
        self.boot
            .add("guest: kernel, to PID 1", nanos("kernel_nanos"), Duration::ZERO);
        self.boot.add(
            "guest: agent, to listening",
            nanos("listening_nanos").saturating_sub(nanos("kernel_nanos")),
            Duration::ZERO,
        );
        self.boot
            .add("guest: network", nanos("network_nanos"), Duration::ZERO);
        Ok(())
    }

    /// Memory with one pod of two sleeping containers.
    async fn memory(&mut self, pod_id: &str) -> Result<()> {
        let (_, info) = self.cri.pod_status(pod_id).await?;
        let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
        println!("\n| memory with one pod of two sleeping containers | MiB |\n|---|---:|");
        #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
        let mib = |kib: u64| kib as f64 / 1024.0;
        println!(
            "| caissond, PSS | {:.1} |",
            mib(pss(&self.daemon.pid().to_string())?)
        );
        for process in info["processes"].as_array().context("no processes")? {
            let pid = process["pid"].to_string();
            println!(
                "| {} process, PSS | {:.1} |",
                process["role"].as_str().unwrap_or("?"),
                mib(pss(&pid)?)
            );
        }
        println!(
            "| agent in the guest, RSS when it answered | {:.1} |",
            mib(info["agent"]["rss_bytes"].as_u64().unwrap_or_default() / 1024)
        );
        println!(
            "| guest memory that the kernel offers | {:.1} |",
            mib(info["agent"]["memory_bytes"].as_u64().unwrap_or_default() / 1024)
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    let runs = std::env::args()
        .nth(1)
        .map_or(Ok(RUNS), |word| word.parse())
        .context("the number of runs is not a number")?;
    println!("Machine: {}", machine()?);
    for (kernel, file) in [("distribution", "vmlinuz"), ("tuned", "vmlinux")] {
        let guest = checkout().join("guest/out").join(kernel);
        let product = Product {
            kernel: guest.join(file),
            initramfs: guest.join("initramfs.cpio"),
            ..Product::find()?
        };
        println!("\n### {kernel} kernel, {runs} runs");
        sizes(&product)?;
        // A host for each, since namespaces are the thread's.
        std::thread::scope(|scope| scope.spawn(|| measure(&product, runs)).join())
            .map_err(|_| anyhow::anyhow!("the run with the {kernel} kernel panicked"))??;
    }
    Ok(())
}

fn measure(product: &Product, runs: usize) -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("bench/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(&host, product, &[]).await?;
        let mut cri = daemon.cri().await?;
        cri.pull(&image).await?;
        let mut bench = Bench {
            host: &host,
            daemon: &daemon,
            cri,
            steps: Samples::default(),
            boot: Samples::default(),
        };
        for number in 0..runs {
            bench.one(number, &image).await?;
        }
        bench.steps.print("call", true);
        bench.boot.print("part of RunPodSandbox", false);
        Ok(())
    })
}

fn sizes(product: &Product) -> Result<()> {
    println!("\n| file | MiB |\n|---|---:|");
    #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
    let size = |path: &Path| -> Result<f64> { Ok(fs::metadata(path)?.len() as f64 / f64::from(1 << 20)) };
    println!(
        "| kernel ({}) | {:.1} |",
        product.kernel.file_name().unwrap_or_default().display(),
        size(&product.kernel)?
    );
    println!("| initramfs | {:.1} |", size(&product.initramfs)?);
    println!("| caissond | {:.1} |", size(&product.bin.join("caissond"))?);
    println!(
        "| caisson-vhost-vsock | {:.1} |",
        size(&product.bin.join("caisson-vhost-vsock"))?
    );
    Ok(())
}
