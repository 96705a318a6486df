//! `caissond check`: what this host can do, what would be used, and how to mend what is missing. Changes nothing.

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use caisson_hypervisor::kvm;
use caisson_net::Network;
use caisson_sandbox::AppArmorSettings;
use serde_json::json;

use crate::{config::Config, drivers, status::chain};

/// How a finding bears on pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Pods run, but not as well as they could.
    Note,
    /// No pod can run.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub subject: &'static str,
    /// How it bears on pods.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What a person could do.
    pub hint: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In the order of the check.
    pub findings: Vec<Finding>,
}

/// Looks at everything that a pod needs.
pub async fn check(config: &Config) -> Report {
    let mut findings = vec![privileges(), kvm_device()];
    findings.push(hypervisor(config).await);
    findings.extend([
        guest_file("guest kernel", &config.guest.kernel, "make guest"),
        guest_file("guest initramfs", &config.guest.initramfs, "make guest"),
        tun(),
        vhost_net(),
        vhost_vsock(),
        cgroups(Path::new("/sys/fs/cgroup")),
    ]);
    findings.push(cni(config).await);
    findings.extend([
        apparmor(&config.apparmor),
        mkfs(),
        disk(&config.daemon.root),
        daemon_socket(&config.daemon.socket),
    ]);
    Report { findings }
}

impl Report {
    /// Whether nothing stands in a pod's way.
    #[must_use]
    pub fn pods_can_run(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.verdict != Verdict::Bad)
    }

    /// Lines for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let mark = match finding.verdict {
                Verdict::Good => '✔',
                Verdict::Note => '!',
                Verdict::Bad => '✘',
            };
            text.push_str(&format!("{mark} {:<16} {}\n", finding.subject, finding.found));
            if let Some(hint) = &finding.hint {
                text.push_str(&format!("  {:<16} -> {hint}\n", ""));
            }
        }
        let bad = self.count(Verdict::Bad);
        let notes = self.count(Verdict::Note);
        let conclusion = match (bad, notes) {
            (0, 0) => "Pods can run on this host.".to_owned(),
            (0, notes) => format!("Pods can run on this host ({notes} remarks above)."),
            (bad, _) => format!("No pod can run on this host: mend the {bad} lines marked ✘."),
        };
        text.push_str(&format!("\n{conclusion}\n"));
        text
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.verdict == verdict)
            .count()
    }

    /// One JSON document.
    #[must_use]
    pub fn json(&self) -> String {
        let findings: Vec<_> = self
            .findings
            .iter()
            .map(|finding| {
                json!({
                    "subject": finding.subject,
                    "verdict": match finding.verdict {
                        Verdict::Good => "good",
                        Verdict::Note => "note",
                        Verdict::Bad => "bad",
                    },
                    "found": finding.found,
                    "hint": finding.hint,
                })
            })
            .collect();
        format!(
            "{:#}\n",
            json!({ "podsCanRun": self.pods_can_run(), "findings": findings })
        )
    }
}

fn good(subject: &'static str, found: impl Into<String>) -> Finding {
    finding(subject, Verdict::Good, found, None)
}

fn note(subject: &'static str, found: impl Into<String>, hint: &str) -> Finding {
    finding(subject, Verdict::Note, found, Some(hint))
}

fn bad(subject: &'static str, found: impl Into<String>, hint: &str) -> Finding {
    finding(subject, Verdict::Bad, found, Some(hint))
}

fn finding(subject: &'static str, verdict: Verdict, found: impl Into<String>, hint: Option<&str>) -> Finding {
    Finding {
        subject,
        verdict,
        found: found.into(),
        hint: hint.filter(|hint| !hint.is_empty()).map(str::to_owned),
    }
}

fn privileges() -> Finding {
    if rustix::process::geteuid().is_root() {
        good("privileges", "runs as root")
    } else {
        bad(
            "privileges",
            "does not run as root",
            "run it as root: network namespaces, taps and cgroups need it",
        )
    }
}

fn kvm_device() -> Finding {
    let kvm = kvm::probe(Path::new("/dev/kvm"));
    if kvm.is_usable() {
        good("KVM", kvm.to_string())
    } else {
        note(
            "KVM",
            kvm.to_string(),
            "pods run all the same, their code emulated in software and therefore slower",
        )
    }
}

async fn hypervisor(config: &Config) -> Finding {
    match drivers::choose(config).await {
        Ok(driver) => good("hypervisor", format!("{}: {}", driver.name(), driver.describe())),
        Err(error) => bad(
            "hypervisor",
            format!("{error:#}"),
            "install QEMU (Debian: apt-get install qemu-system-x86), and keep caisson-vhost-vsock beside caissond",
        ),
    }
}

/// The default profile needs nothing of the host.
fn apparmor(profiles: &AppArmorSettings) -> Finding {
    const KERNEL: &str = "profiles that are loaded on the host";
    let files = profiles.compiler().map(|compiler| {
        let directory = profiles.directory.display();
        format!("those in {directory}, compiled by {}", compiler.display())
    });
    let found = match (profiles.host_has_apparmor(), files) {
        (true, Some(files)) => format!("{KERNEL}, and {files}"),
        (true, None) => KERNEL.to_owned(),
        (false, Some(files)) => files,
        (false, None) => {
            return note(
                "AppArmor",
                "no profile of the host can be had: its kernel has no AppArmor, and there is no apparmor_parser",
                "apt-get install apparmor, where pods shall have profiles of your own",
            );
        }
    };
    good("AppArmor", found)
}

fn guest_file(subject: &'static str, path: &Path, target: &str) -> Finding {
    match std::fs::File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => good(
            subject,
            format!("{} ({:.1} MiB)", path.display(), mib(metadata.len())),
        ),
        Ok(_) => bad(subject, format!("{} is no file or empty", path.display()), ""),
        Err(error) => bad(
            subject,
            format!("cannot open {}: {error}", path.display()),
            &format!(
                "install it there, name another by --{}, or build one in a checkout with `{target}`",
                subject.trim_start_matches("guest ")
            ),
        ),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn is_device(path: &str) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_char_device())
}

fn tun() -> Finding {
    let path = "/dev/net/tun";
    match std::fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => good("tun", format!("{path} opens")),
        Err(error) => bad("tun", format!("cannot open {path}: {error}"), "modprobe tun"),
    }
}

fn vhost_net() -> Finding {
    if is_device("/dev/vhost-net") {
        good("vhost-net", "/dev/vhost-net is there")
    } else {
        note(
            "vhost-net",
            "/dev/vhost-net is not there",
            "packets take the way through the VMM process; modprobe vhost_net makes it shorter",
        )
    }
}

fn vhost_vsock() -> Finding {
    let found = if is_device("/dev/vhost-vsock") {
        "/dev/vhost-vsock is there, and not needed: a helper process per VM carries vsock"
    } else {
        "/dev/vhost-vsock is not there, nor needed: a helper process per VM carries vsock"
    };
    good("vhost-vsock", found)
}

/// Memory and CPU limits of a pod hold for its VM only where the v2 controllers are.
fn cgroups(root: &Path) -> Finding {
    let subject = "cgroups";
    let controllers = |dir: &Path| std::fs::read_to_string(dir.join("cgroup.controllers")).ok();
    if let Some(list) = controllers(root) {
        let missing: Vec<&str> = ["cpu", "memory"]
            .into_iter()
            .filter(|wanted| !list.split_whitespace().any(|have| have == *wanted))
            .collect();
        if missing.is_empty() {
            return good(subject, "version 2: pods' limits hold for their VMs");
        }
        return note(
            subject,
            format!("version 2 without {}", missing.join(" and ")),
            "limits hold inside the VMs only; enable these controllers for the root cgroup",
        );
    }
    let found = if controllers(&root.join("unified")).is_some() {
        "hybrid: the controllers are on version 1"
    } else {
        "version 1, or not mounted"
    };
    note(
        subject,
        found,
        "limits hold inside the VMs but not for the VM processes; boot with systemd.unified_cgroup_hierarchy=1",
    )
}

async fn cni(config: &Config) -> Finding {
    match Network::new(config.network.clone()).status().await {
        Ok(()) => good(
            "CNI",
            format!(
                "configuration in {} and its plugins are there",
                config.network.conf_dir.display()
            ),
        ),
        Err(error) => bad(
            "CNI",
            chain(&error),
            "install a CNI network (a cluster's does it), or name the directories by --cni-conf-dir and --cni-bin-dir",
        ),
    }
}

fn mkfs() -> Finding {
    match in_path("mkfs.ext4") {
        Some(path) => good("mkfs.ext4", path.display().to_string()),
        None => bad(
            "mkfs.ext4",
            "not found in PATH: the pods' writable disks cannot be made",
            "Debian: apt-get install e2fsprogs",
        ),
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

/// Least free space with which a first image and a first pod fit.
const DISK_NEEDED: u64 = 1 << 30;
/// Below this, a node that is used fills soon.
const DISK_WISHED: u64 = 10 << 30;

fn disk(root: &Path) -> Finding {
    let subject = "disk";
    let Some(dir) = root.ancestors().find(|dir| dir.is_dir()) else {
        return bad(
            subject,
            format!("{} has no directory above it", root.display()),
            "",
        );
    };
    let free = match rustix::fs::statvfs(dir) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => return bad(subject, format!("cannot measure {}: {error}", dir.display()), ""),
    };
    let found = format!("{:.1} GiB free for {}", mib(free) / 1024.0, root.display());
    if free < DISK_NEEDED {
        bad(
            subject,
            found,
            "free some space, or name another directory by --root",
        )
    } else if free < DISK_WISHED {
        note(subject, found, "images and the pods' writable disks live there")
    } else {
        good(subject, found)
    }
}

fn daemon_socket(socket: &Path) -> Finding {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        good("daemon", format!("a daemon serves {} now", socket.display()))
    } else {
        good(
            "daemon",
            format!("none runs yet; it would serve {}", socket.display()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_says_whether_pods_can_run_and_how_to_mend_it() {
        let mut report = Report {
            findings: vec![good("a", "fine"), note("b", "so-so", "do that")],
        };
        assert!(report.pods_can_run());
        let text = report.text();
        assert!(text.contains("✔ a") && text.contains("! b") && text.contains("-> do that"));
        assert!(text.contains("Pods can run on this host (1 remarks above)."));
        report.findings.push(bad("c", "gone", "fetch it"));
        assert!(!report.pods_can_run());
        assert!(report.text().contains("✘ c"));
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["podsCanRun"], false);
        assert_eq!(json["findings"][2]["hint"], "fetch it");
    }

    #[test]
    fn each_layout_of_cgroups_is_told_with_its_consequence() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroups(dir.path()).verdict, Verdict::Note);
        std::fs::create_dir(dir.path().join("unified")).unwrap();
        std::fs::write(dir.path().join("unified/cgroup.controllers"), "").unwrap();
        assert!(cgroups(dir.path()).found.starts_with("hybrid"));
        std::fs::write(dir.path().join("cgroup.controllers"), "cpu io").unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 2 without memory");
        std::fs::write(dir.path().join("cgroup.controllers"), "cpu io memory").unwrap();
        assert_eq!(cgroups(dir.path()).verdict, Verdict::Good);
    }

    #[test]
    fn a_missing_guest_file_says_which_flag_names_another() {
        let finding = guest_file("guest kernel", Path::new("/nonexistent/vmlinuz"), "make kernel");
        assert_eq!(finding.verdict, Verdict::Bad);
        assert!(finding.hint.unwrap().contains("--kernel"));
    }
}
