//! Pods that work for as long as one likes, until something goes wrong, and then a look at the VM that did it.
//!
//! Each pod has a container in which a command runs after the other, and now and then a container of its own comes and goes. The first failure
//! ends it all: what the daemon said, and of a VM of the built-in driver what its VMM counts, where its vCPUs and devices stand, and what
//! KVM counts. Everything stays where it is (`--keep`) or is removed.
//!
//!   soak [--seconds N] [--pods N] [--keep]

use std::{
    fs::{self, File},
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    host::Host,
    node::{Node, node},
    run,
};
use k8s_cri::v1 as cri;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg, socket,
};
use serde_json::{Value, json};

/// Containers come and go once in so many commands.
const COMMANDS_PER_CONTAINER: u64 = 20;

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
        let pod_id = cri.run_pod(&config).await?;
        let main = container("main", image, &["sleep", "1000000"]);
        let container = cri.run(&pod_id, &main, &config).await?;
        Ok(Self {
            config,
            pod_id,
            container,
            image: image.to_owned(),
            commands: 0,
        })
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
                    look_at(&host.dir().join("run"), &worker.pod_id);
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

/// Says what can be seen of a pod's VM from outside.
fn look_at(run_dir: &Path, pod_id: &str) {
    let sockets = Command::new("find")
        .arg(run_dir)
        .args(["-path", &format!("*{pod_id}*"), "-name", "control.sock"])
        .output();
    let found = sockets.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    for socket in found.unwrap_or_default().lines().map(PathBuf::from) {
        let said = look_at_vmm(&socket).unwrap_or_else(|e| format!("its VMM: {e:?}"));
        println!("{said}");
        for file in ["console.log", "vmm.log"] {
            let path = socket.with_file_name(file);
            println!("{file}: {}", fs::read_to_string(path).unwrap_or_default());
        }
    }
    let script = format!(
        "for p in $(pgrep -f caisson-vmm); do grep -qaz 'CAISSON.*{pod_id}' /proc/$p/environ || continue; echo process $p; \
         for t in /proc/$p/task/*; do echo \"$(cat $t/comm) $(cut -d' ' -f3,14,15 $t/stat) $(cat $t/wchan)\"; done; done; \
         grep -r . /sys/kernel/debug/kvm/ 2>/dev/null | grep -v ' 0$' | grep -v ':0$'"
    );
    let seen = Command::new("sh").args(["-c", &script]).output();
    println!(
        "{}",
        seen.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default()
    );
}

fn look_at_vmm(path: &Path) -> Result<String> {
    let session = Session::open(path)?;
    let mut said = String::new();
    for _ in 0..2 {
        said += &format!("status: {}\n", session.ask(&json!({"verb": "status"}), None)?);
        std::thread::sleep(Duration::from_secs(1));
    }
    let file = File::create("/tmp/soak-state.json")?;
    said += &format!("pause: {}\n", session.ask(&json!({"verb": "pause"}), None)?);
    let save = json!({"verb": "save_state", "msrs": []});
    said += &format!("save_state: {}\n", session.ask(&save, Some(file.as_raw_fd()))?);
    said += &format!("resume: {}\n", session.ask(&json!({"verb": "resume"}), None)?);
    said += &fs::read_to_string("/tmp/soak-state.json")?;
    Ok(said)
}

/// A conversation with a VMM.
struct Session(OwnedFd);

impl Session {
    fn open(path: &Path) -> Result<Self> {
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        let session = Self(fd);
        session.ask(&json!({"verb": "hello", "oldest": 2, "newest": 2}), None)?;
        Ok(session)
    }

    fn ask(&self, request: &Value, file: Option<RawFd>) -> Result<Value> {
        let bytes = serde_json::to_vec(request)?;
        let files: Vec<RawFd> = file.into_iter().collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let control = if files.is_empty() { &[][..] } else { &rights[..] };
        let data = [IoSlice::new(&bytes)];
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &data, control, MsgFlags::empty(), None)?;
        let mut answer = vec![0; 64 << 10];
        let mut space = [IoSliceMut::new(&mut answer)];
        let length = recvmsg::<UnixAddr>(self.0.as_raw_fd(), &mut space, None, MsgFlags::empty())?.bytes;
        Ok(serde_json::from_slice(&answer[..length])?)
    }
}
