//! A scratch host: network and mount namespaces of its own, a directory, a CNI configuration; and the proof that nothing is left.
//!
//! Namespaces belong to the calling thread and to everything it starts, so a test needs no other process and touches nothing of the
//! machine.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::json;

/// Environment variable that every process of a VM carries, by the product's promise.
const OWNER_ENV: &[u8] = b"CAISSON_VM_ID=";

/// A host to test on.
#[derive(Debug)]
pub struct Host {
    dir: tempfile::TempDir,
}

/// What a daemon could leave behind, as the host shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers {
    /// Processes of VMs: pid and command.
    pub processes: BTreeSet<String>,
    /// Network interfaces.
    pub links: BTreeSet<String>,
    /// Mount points.
    pub mounts: BTreeSet<String>,
    /// Firewall rules; plugins keep their own base chains, which are not listed.
    pub rules: BTreeSet<String>,
    /// Files of pods: state, run directory, pinned namespaces, CNI leases and results.
    pub files: BTreeSet<String>,
}

impl Host {
    /// Leaves the machine's network and mounts and makes a host with a bridge network for pods, both IP families, and host ports.
    pub fn enter() -> Result<Self> {
        // Inside, there is no way to an archive any more.
        crate::image::fetch_packages()?;
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .context("cannot make namespaces (tests need root)")?;
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )?;
        command(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        // The new network namespace has its own /proc/sys/net, seen through the same mount.
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        let dir = tempfile::Builder::new().prefix("caisson-e2e-").tempdir()?;
        // The unprivileged VMM passes through here to its own directory.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let host = Self { dir };
        fs::create_dir_all(host.cni_conf_dir())?;
        fs::write(
            host.cni_conf_dir().join("10-pods.conflist"),
            host.conflist().to_string(),
        )?;
        Ok(host)
    }

    /// Scratch directory, deleted with the host.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Keeps the scratch directory; answers its path.
    #[must_use]
    pub fn keep(self) -> PathBuf {
        self.dir.keep()
    }

    /// Where CNI configuration is.
    #[must_use]
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.dir().join("cni/net.d")
    }

    /// Directory of Debian's CNI plugins.
    #[must_use]
    pub fn cni_bin_dir() -> PathBuf {
        PathBuf::from("/usr/lib/cni")
    }

    /// Directory for a pod's logs, as kubelet would make it.
    pub fn log_dir(&self, pod: &str) -> Result<PathBuf> {
        let dir = self.dir().join("logs").join(pod);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    fn conflist(&self) -> serde_json::Value {
        json!({
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": self.dir().join("cni/leases"),
                        "ranges": [[{ "subnet": "10.88.0.0/16" }], [{ "subnet": "fd00:88::/64" }]],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                    },
                },
                { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
            ],
        })
    }

    /// What is there now.
    pub fn leftovers(&self) -> Result<Leftovers> {
        let mut files = BTreeSet::new();
        for dir in ["root", "run", "cni/leases", "cni/cache"] {
            list_files(&self.dir().join(dir), &mut files)?;
        }
        // What belongs to the daemon, to the image store or to a plugin, not to a pod.
        let own = |path: &String| {
            let name = path.rsplit('/').next().unwrap_or_default();
            name.starts_with("last_reserved_ip")
                || [
                    "pod-cidr",
                    "lock",
                    "caissond.lock",
                    "caisson.sock",
                    "nri.sock",
                    "index.redb",
                ]
                .contains(&name)
                || path.contains("/root/images/images/")
                || path.contains("/root/images/layers/")
                || path.contains("/templates/")
        };
        files.retain(|path| !own(path));
        Ok(Leftovers {
            processes: self.vm_processes()?,
            links: text(Command::new("ip").args(["-o", "link"]))?
                .lines()
                .filter_map(|line| line.split(": ").nth(1).map(String::from))
                .collect(),
            mounts: fs::read_to_string("/proc/thread-self/mountinfo")?
                .lines()
                .filter_map(|line| line.split(' ').nth(4).map(String::from))
                .collect(),
            rules: ["iptables-save", "ip6tables-save"]
                .iter()
                .map(|save| text(&mut Command::new(save)))
                .collect::<Result<Vec<_>>>()?
                .iter()
                .flat_map(|rules| {
                    rules
                        .lines()
                        .filter(|line| line.contains("CNI-DN-"))
                        .map(String::from)
                        .collect::<Vec<_>>()
                })
                .collect(),
            files,
        })
    }

    /// Processes whose environment says that they belong to a VM of this host.
    fn vm_processes(&self) -> Result<BTreeSet<String>> {
        let here = self.dir().as_os_str().as_encoded_bytes();
        let mut found = BTreeSet::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Ok(environment) = fs::read(entry.path().join("environ")) else {
                continue;
            };
            if !environment
                .split(|b| *b == 0)
                .any(|variable| variable.starts_with(OWNER_ENV))
            {
                continue;
            }
            let Ok(words) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            // Other tests of this machine have VMs of their own, below other directories.
            let ours = words.windows(here.len()).any(|part| part == here)
                || fs::read_link(entry.path().join("fd/2")).is_ok_and(|log| log.starts_with(self.dir()));
            if ours {
                let program = words.split(|b| *b == 0).next().unwrap_or_default();
                found.insert(format!(
                    "{} {}",
                    entry.file_name().to_string_lossy(),
                    String::from_utf8_lossy(program)
                ));
            }
        }
        Ok(found)
    }
}

impl Leftovers {
    /// An error that lists what `self` has and `before` had not. The bridge that the CNI plugin makes for the node may stay.
    pub fn nothing_new_since(&self, before: &Self) -> Result<()> {
        let mut new: Vec<String> = Vec::new();
        let sets = [
            ("process", &self.processes, &before.processes),
            ("link", &self.links, &before.links),
            ("mount", &self.mounts, &before.mounts),
            ("rule", &self.rules, &before.rules),
            ("file", &self.files, &before.files),
        ];
        for (kind, now, then) in sets {
            new.extend(
                now.difference(then)
                    .filter(|item| *item != "cni0")
                    .map(|item| format!("{kind} {item}")),
            );
        }
        ensure!(new.is_empty(), "left behind on the host:\n  {}", new.join("\n  "));
        Ok(())
    }
}

/// Every file below `dir`; directories of pods count as well.
fn list_files(dir: &Path, into: &mut BTreeSet<String>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            list_files(&path, into)?;
        } else {
            into.insert(path.display().to_string());
        }
    }
    Ok(())
}

/// Runs a command that must succeed.
pub fn command(command: &mut Command) -> Result<()> {
    text(command).map(drop)
}

/// Runs a command that must succeed; answers what it printed.
pub fn text(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
