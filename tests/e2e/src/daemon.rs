//! The real daemon on a scratch host.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{aftermath, checkout, cri::Cri, eventually, host::Host};

/// How long the daemon may take to answer on its socket; recovery of pods included.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Where binaries and guest files are.
#[derive(Debug, Clone)]
pub struct Product {
    /// Directory of caissond and its helpers.
    pub bin: PathBuf,
    /// Kernel.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initramfs: PathBuf,
}

impl Product {
    /// The checkout's release build and its guest, or what CAISSON_BIN_DIR, CAISSON_KERNEL and CAISSON_INITRAMFS say.
    pub fn find() -> Result<Self> {
        let from = |variable: &str, default: &str| {
            std::env::var_os(variable).map_or_else(|| checkout().join(default), PathBuf::from)
        };
        let product = Self {
            bin: from("CAISSON_BIN_DIR", "target/release"),
            kernel: from("CAISSON_KERNEL", "guest/out/distribution/vmlinuz"),
            initramfs: from("CAISSON_INITRAMFS", "guest/out/distribution/initramfs.cpio"),
        };
        for path in [&product.bin.join("caissond"), &product.kernel, &product.initramfs] {
            anyhow::ensure!(
                path.exists(),
                "{} is missing: run `make build guest` first",
                path.display()
            );
        }
        Ok(product)
    }
}

/// A running daemon. Dropping it kills the daemon and sweeps its VMs, so that a failed test leaves nothing.
#[derive(Debug)]
pub struct Daemon {
    process: Child,
    product: Product,
    dir: PathBuf,
    arguments: Vec<String>,
}

impl Daemon {
    /// Starts the daemon below `host`'s directory and waits until it answers. CAISSON_HYPERVISOR names the driver, else the daemon
    /// takes the one that suits the host.
    pub async fn start(host: &Host, product: &Product, more: &[&str]) -> Result<Self> {
        let dir = host.dir().to_owned();
        let path = |part: &str| dir.join(part).display().to_string();
        let mut arguments = vec![
            "--root".into(),
            path("root"),
            "--run-dir".into(),
            path("run"),
            "--listen".into(),
            path("run/caisson.sock"),
            // The host's own would be shared by all tests.
            "--nri-socket".into(),
            path("run/nri.sock"),
            "--cni-conf-dir".into(),
            host.cni_conf_dir().display().to_string(),
            "--cni-bin-dir".into(),
            Host::cni_bin_dir().display().to_string(),
            "--kernel".into(),
            product.kernel.display().to_string(),
            "--initramfs".into(),
            product.initramfs.display().to_string(),
        ];
        arguments.extend(more.iter().map(ToString::to_string));
        if let Ok(driver) = std::env::var("CAISSON_HYPERVISOR") {
            arguments.extend(["--hypervisor".into(), driver]);
        }
        let process = spawn(product, &dir, &arguments)?;
        let mut daemon = Self {
            process,
            product: product.clone(),
            dir,
            arguments,
        };
        daemon.answers().await?;
        Ok(daemon)
    }

    /// The CRI socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/caisson.sock")
    }

    /// The socket where NRI plugins connect.
    #[must_use]
    pub fn nri_socket(&self) -> PathBuf {
        self.dir.join("run/nri.sock")
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Command line, for people who want to go on by hand.
    #[must_use]
    pub fn command_line(&self) -> String {
        format!(
            "{} {}",
            self.product.bin.join("caissond").display(),
            self.arguments.join(" ")
        )
    }

    /// A client, connected.
    pub async fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket()).await
    }

    /// What the daemon has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("caissond.log")).unwrap_or_default()
    }

    /// SIGKILL, as the kernel's OOM killer would.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// SIGTERM, as systemd would; waits for the end.
    pub async fn terminate(&mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.process.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let process = &mut self.process;
        let status = eventually(
            "the daemon's end after SIGTERM",
            Duration::from_secs(20),
            async || process.try_wait().ok().flatten(),
        )
        .await?;
        anyhow::ensure!(status.success(), "caissond ended with {status} after SIGTERM");
        Ok(())
    }

    /// Starts it again after [`Daemon::kill`] or [`Daemon::terminate`], on the same directories.
    pub async fn start_again(&mut self) -> Result<()> {
        self.process = spawn(&self.product, &self.dir, &self.arguments)?;
        self.answers().await
    }

    /// Where `CAISSON_TEST_LOGS` wants it: the test's own directory goes with the test.
    fn keep_log(&self) {
        if let (Some(logs), Some(name)) = (std::env::var_os("CAISSON_TEST_LOGS"), self.dir.file_name()) {
            let kept = Path::new(&logs).join(name).with_extension("log");
            if let Err(error) = fs::copy(self.dir.join("caissond.log"), &kept) {
                eprintln!("{} is not kept: {error}", kept.display());
            }
            // Only a test that has failed leaves VMs.
            let vms = self.dir.join("run/vm");
            if fs::read_dir(&vms).is_ok_and(|mut vms| vms.next().is_some()) {
                let said = aftermath::of(&self.dir.join("run"));
                if let Err(error) = fs::write(kept.with_extension("vms"), said) {
                    eprintln!("what was seen of VMs is not kept: {error}");
                }
            }
        }
    }

    async fn answers(&mut self) -> Result<()> {
        let socket = self.socket();
        let process = &mut self.process;
        let answered = eventually("the daemon's answer on its socket", START_LIMIT, async || {
            if let Ok(Some(status)) = process.try_wait() {
                return Some(Err(status));
            }
            let mut cri = Cri::connect(&socket).await.ok()?;
            cri.version().await.ok().map(|_| Ok(()))
        })
        .await;
        match answered {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("caissond ended with {status}:\n{}", self.log()),
            Err(error) => Err(error.context(self.log())),
        }
    }
}

fn spawn(product: &Product, dir: &Path, arguments: &[String]) -> Result<Child> {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("caissond.log"))?;
    Command::new(product.bin.join("caissond"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", product.bin.join("caissond").display()))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _already_reaped = self.process.wait();
        self.keep_log();
        // VMs outlive the daemon by design, so a test that fails must end those below its own directory.
        let here = self.dir.as_os_str().as_encoded_bytes().to_vec();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let path = entry.path();
            let owned = fs::read(path.join("environ")).is_ok_and(|environment| {
                environment
                    .split(|b| *b == 0)
                    .any(|v| v.starts_with(b"CAISSON_VM_ID="))
            });
            let ours = fs::read(path.join("cmdline"))
                .is_ok_and(|words| words.windows(here.len()).any(|part| part == here))
                || fs::read_link(path.join("fd/2")).is_ok_and(|log| log.starts_with(&self.dir));
            if let (true, true, Ok(pid)) = (owned, ours, entry.file_name().to_string_lossy().parse()) {
                let _already_gone = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}
