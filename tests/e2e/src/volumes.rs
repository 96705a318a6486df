//! Volumes as kubelet passes them, and what tests of them look at: mounts, kubelet's directories, disks and file systems of the host.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as cri;

use crate::{
    cri::{Cri, container},
    eventually,
    host::{Host, command, text},
};

/// How long a change on the host may take to be seen in a container, and the other way.
pub const SEEN_LIMIT: Duration = Duration::from_secs(20);

/// A mount of a host path, writable.
#[must_use]
pub fn mount(host_path: &Path, container_path: &str) -> cri::Mount {
    cri::Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.into(),
        ..Default::default()
    }
}

/// A mount of a host path, read-only.
#[must_use]
pub fn readonly(host_path: &Path, container_path: &str) -> cri::Mount {
    cri::Mount {
        readonly: true,
        ..mount(host_path, container_path)
    }
}

/// A container that sleeps, with these mounts.
#[must_use]
pub fn sleeper(name: &str, image: &str, mounts: &[cri::Mount]) -> cri::ContainerConfig {
    let mut config = container(name, image, &["sleep", "1000"]);
    config.mounts = mounts.to_vec();
    config
}

/// Runs a script that must succeed; answers what it printed.
pub async fn sh(cri: &mut Cri, id: &str, script: &str) -> Result<String> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code == 0, "{script}: {code}: {out}{err}");
    Ok(out)
}

/// Runs a script that must fail, with this in its error.
pub async fn fails(cri: &mut Cri, id: &str, script: &str, word: &str) -> Result<()> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code != 0 && err.contains(word), "{script}: {code}: {out}{err}");
    Ok(())
}

/// Runs a script again and again until it succeeds.
pub async fn wait_for(cri: &mut Cri, id: &str, what: &str, script: &str) -> Result<()> {
    eventually(what, SEEN_LIMIT, async || {
        let (code, _, _) = cri.exec(id, &["sh", "-c", script]).await.ok()?;
        (code == 0).then_some(())
    })
    .await
}

/// A file system of its own below the test's directory; unmounted at the end.
#[derive(Debug)]
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// An empty one in memory.
    pub fn tmpfs(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path)?;
        command(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&path))?;
        Ok(Self(path))
    }

    /// A directory on itself, so that propagation can be set.
    pub fn shared(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path)?;
        command(Command::new("mount").arg("--bind").arg(&path).arg(&path))?;
        command(Command::new("mount").arg("--make-rshared").arg(&path))?;
        Ok(Self(path))
    }
}

impl Mounted {
    /// Something of the host seen at another place, as kubelet does for a subPath.
    pub fn bind(from: &Path, at: PathBuf) -> Result<Self> {
        if from.is_dir() {
            fs::create_dir_all(&at)?;
        } else {
            fs::create_dir_all(at.parent().context("no parent")?)?;
            fs::write(&at, "")?;
        }
        command(Command::new("mount").arg("--bind").arg(from).arg(&at))?;
        Ok(Self(at))
    }

    /// A disk of so many bytes, made of a file, with an ext4 file system on it.
    pub fn ext4(file: &Path, bytes: u64, at: PathBuf) -> Result<Self> {
        fs::File::create(file)?.set_len(bytes)?;
        // No blocks for root alone: what the daemon finds free, a VM can use.
        command(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(file))?;
        fs::create_dir_all(&at)?;
        command(Command::new("mount").args(["-o", "loop"]).arg(file).arg(&at))?;
        Ok(Self(at))
    }

    /// No more writes from now on.
    pub fn make_read_only(&self) -> Result<()> {
        command(Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-lR").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

/// Pids of the file servers of this host's pods.
#[must_use]
pub fn file_servers(host: &Host) -> Vec<i32> {
    let mine = |pid: &i32| {
        fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.starts_with(host.dir()))
            && fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "caisson-files")
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(mine).collect()
}

/// SIGKILL for a process.
pub fn kill(pid: i32) -> Result<()> {
    command(Command::new("kill").args(["-9", &pid.to_string()]))?;
    Ok(())
}

/// kubelet's directory of a volume of this pod.
pub fn kubelet_volume(host: &Host, pod: &str, plugin: &str, name: &str) -> Result<PathBuf> {
    let path = host
        .dir()
        .join(format!("kubelet/pods/uid-{pod}/volumes/kubernetes.io~{plugin}"))
        .join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// Where kubelet puts the bind mount of a subPath.
#[must_use]
pub fn sub_path(host: &Host, pod: &str, volume: &str, container: &str) -> PathBuf {
    host.dir()
        .join(format!("kubelet/pods/uid-{pod}/volume-subpaths"))
        .join(volume)
        .join(container)
        .join("0")
}

/// Replaces a volume's content as kubelet's atomic writer does.
pub fn swap(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result<()> {
    let data = volume.join(version);
    fs::create_dir(&data)?;
    for (name, content) in files {
        fs::write(data.join(name), content)?;
        fs::set_permissions(data.join(name), fs::Permissions::from_mode(0o644))?;
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(version, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for (name, _) in files {
        if !volume.join(name).is_symlink() {
            symlink(Path::new("..data").join(name), volume.join(name))?;
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old))?;
    }
    Ok(())
}

/// A disk of the host's, made of a file.
#[derive(Debug)]
pub struct Loop(pub PathBuf);

impl Loop {
    /// Of so many bytes, sparse.
    pub fn new(file: &Path, bytes: u64) -> Result<Self> {
        fs::File::create(file)?.set_len(bytes)?;
        let name = text(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays attached", self.0.display());
        }
    }
}
