//! The runtime that ours is compared with: Debian's containerd and runc, unpacked by `tests/containerd.sh`, on the same scratch host.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{cache, checkout, cri::Cri, eventually, host::Host};

/// A running containerd. Dropping it kills it and what it has started.
#[derive(Debug)]
pub struct Containerd {
    process: Child,
    dir: PathBuf,
}

impl Containerd {
    /// Fetches the programs unless they are there; to be called while there is a network, before [`Host::enter`].
    pub fn fetch() -> Result<()> {
        let status = Command::new(checkout().join("tests/containerd.sh"))
            .arg(home())
            .stdout(Stdio::null())
            .status()?;
        anyhow::ensure!(status.success(), "tests/containerd.sh failed with {status}");
        Ok(())
    }

    /// What is compared with, for a table's head.
    pub fn versions() -> Result<String> {
        let text = fs::read_to_string(home().join("versions"))?;
        Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// Starts it below `host`'s directory, with these registries mirrored by `127.0.0.1:port`, and waits until it answers.
    pub async fn start(host: &Host, registries: &[&str], port: u16) -> Result<Self> {
        let dir = host.dir().join("containerd");
        let bin = home().join("bin");
        for registry in registries {
            let hosts = dir.join("certs.d").join(registry);
            fs::create_dir_all(&hosts)?;
            let mirror = format!(
                "server = \"https://{registry}\"\n[host.\"http://127.0.0.1:{port}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
            );
            fs::write(hosts.join("hosts.toml"), mirror)?;
        }
        fs::write(dir.join("config.toml"), config(&dir, &bin, host))?;
        let log = fs::File::create(dir.join("containerd.log"))?;
        let path = std::env::var("PATH").unwrap_or_default();
        let process = Command::new(bin.join("containerd"))
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("PATH", format!("{}:{path}", bin.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        let mut containerd = Self { process, dir };
        containerd.answers().await?;
        Ok(containerd)
    }

    /// The CRI socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A client, connected.
    pub async fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket()).await
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default()
    }

    async fn answers(&mut self) -> Result<()> {
        let socket = self.socket();
        let process = &mut self.process;
        let answered = eventually("containerd's answer", Duration::from_secs(60), async || {
            if let Ok(Some(status)) = process.try_wait() {
                return Some(Err(status));
            }
            let mut cri = Cri::connect(&socket).await.ok()?;
            cri.version().await.ok().map(|_| Ok(()))
        })
        .await;
        match answered {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("containerd ended with {status}:\n{}", self.log()),
            Err(error) => Err(error.context(self.log())),
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _already_reaped = self.process.wait();
        // Shims outlive it, and end with what they run.
        let here = self.dir.as_os_str().as_encoded_bytes().to_vec();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let ours = fs::read(entry.path().join("cmdline"))
                .is_ok_and(|words| words.windows(here.len()).any(|part| part == here));
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            if ours {
                for child in children(pid).into_iter().chain([pid]) {
                    let _already_gone = nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(child),
                        nix::sys::signal::Signal::SIGKILL,
                    );
                }
            }
        }
    }
}

fn home() -> PathBuf {
    cache().join("containerd")
}

fn children(pid: i32) -> Vec<i32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

fn config(dir: &Path, bin: &Path, host: &Host) -> String {
    let (dir, cni) = (dir.display(), host.cni_conf_dir());
    format!(
        r#"version = 3
root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.10"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{dir}/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dir = "{plugins}"
    conf_dir = "{cni}"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{bin}/runc"
      SystemdCgroup = false
[plugins."io.containerd.nri.v1.nri"]
  socket_path = "{dir}/nri.sock"
  plugin_path = "{dir}/nri-plugins"
  plugin_config_path = "{dir}/nri-config"
"#,
        plugins = Host::cni_bin_dir().display(),
        cni = cni.display(),
        bin = bin.display(),
    )
}
