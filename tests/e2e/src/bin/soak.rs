//! Pods that work for as long as one likes, until something goes wrong, and then a look at the VM that did it.
//!
//! Each pod has a container in which a command runs after the other; now and then a container comes and goes beside it, or the whole pod. The first failure
//! ends it all: what the daemon said, and of a VM of the built-in driver what its VMM counts, where its vCPUs and devices stand, and what
//! KVM counts. VMs and daemon end in any case; with `--keep`, the host's directory with their files stays.
//!
//!   soak [--seconds N] [--pods N] [--keep]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use caisson_e2e::{
    aftermath,
    cri::{Cri, container, pod},
    host::Host,
    node::{Node, node},
    run,
};
use k8s_cri::v1 as cri;

/// Containers come and go once in so many commands.
const COMMANDS_PER_CONTAINER: u64 = 4;
/// Pods, in so many.
const COMMANDS_PER_POD: u64 = 60;

struct Arguments {
    seconds: u64,
    pods: u64,
    keep: bool,
}

fn arguments() -> Result<Arguments> {
    let mut parsed = Arguments {
        seconds: 60,
        pods: 1,
        keep: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let number = |words: &mut dyn Iterator<Item = String>| -> Result<u64> {
            let text = words.next().with_context(|| format!("{word} wants a number"))?;
            text.parse().with_context(|| format!("{word} {text}"))
        };
        match word.as_str() {
            "--seconds" => parsed.seconds = number(&mut words)?,
            "--pods" => parsed.pods = number(&mut words)?,
            "--keep" => parsed.keep = true,
            _ => bail!("usage: soak [--seconds N] [--pods N] [--keep]"),
        }
    }
    Ok(parsed)
}

/// One pod at work.
struct Worker {
    config: cri::PodSandboxConfig,
    pod_id: String,
    container: String,
    image: String,
    commands: u64,
}

impl Worker {
    async fn start(host: &Host, cri: &mut Cri, image: &str, number: u64) -> Result<Self> {
        let config = pod(host, &format!("soak-{number}"));
        let mut worker = Self {
            config,
            pod_id: String::new(),
            container: String::new(),
            image: image.to_owned(),
            commands: 0,
        };
        worker.begin(cri).await?;
        Ok(worker)
    }

    async fn begin(&mut self, cri: &mut Cri) -> Result<()> {
        self.pod_id = cri.run_pod(&self.config).await?;
        let main = container("main", &self.image, &["sleep", "1000000"]);
        self.container = cri.run(&self.pod_id, &main, &self.config).await?;
        Ok(())
    }

    async fn step(&mut self, cri: &mut Cri) -> Result<()> {
        self.commands += 1;
        let word = format!("{}-{}", self.pod_id, self.commands);
        let (code, out, error) = cri.exec(&self.container, &["echo", &word]).await?;
        ensure!(
            code == 0 && out.trim_end() == word,
            "echo {word} answered {code} {out:?} {error:?}"
        );
        if self.commands.is_multiple_of(COMMANDS_PER_CONTAINER) {
            let name = format!("brief-{}", self.commands);
            let brief = container(&name, &self.image, &["true"]);
            let id = cri.run(&self.pod_id, &brief, &self.config).await?;
            let status = cri.exited(&id).await?;
            ensure!(
                status.exit_code == 0,
                "a container ended: {} {}",
                status.exit_code,
                status.message
            );
            cri.remove(&id).await?;
        }
        if self.commands.is_multiple_of(COMMANDS_PER_POD) {
            cri.stop_pod(&self.pod_id).await?;
            cri.remove_pod(&self.pod_id).await?;
            self.begin(cri).await?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    let host = Host::enter()?;
    let outcome = run(async {
        let Node {
            daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let end = Instant::now() + Duration::from_secs(arguments.seconds);
        let mut workers = Vec::new();
        for number in 0..arguments.pods {
            workers.push(Worker::start(&host, &mut cri, &image, number).await?);
        }
        while Instant::now() < end {
            for worker in &mut workers {
                if let Err(error) = worker.step(&mut cri).await {
                    println!(
                        "pod {} after {} commands: {error:?}",
                        worker.pod_id, worker.commands
                    );
                    println!("{}", aftermath::of(&host.dir().join("run")));
                    println!("the daemon's last words:");
                    let log = daemon.log();
                    let lines: Vec<&str> = log.lines().collect();
                    println!("{}", lines[lines.len().saturating_sub(30)..].join("\n"));
                    bail!("failed");
                }
            }
        }
        let commands: u64 = workers.iter().map(|worker| worker.commands).sum();
        println!("{commands} commands in {} pods, no failure", workers.len());
        for worker in workers {
            cri.remove_pod(&worker.pod_id).await?;
        }
        Ok(())
    });
    if arguments.keep && outcome.is_err() {
        println!("kept: {}", host.keep().display());
    }
    outcome
}
