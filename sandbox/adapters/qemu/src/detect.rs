//! Which QEMU there is, and whether it shall use KVM. Must not start VMs.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use caisson_hypervisor::{
    HypervisorError,
    kvm::{self, Kvm},
    user::Users,
};

use crate::{Accelerator, Engine, Qemu, QemuConfig};

const PROGRAM: &str = "qemu-system-x86_64";
const KVM_DEVICE: &str = "/dev/kvm";
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// The oldest version whose machine properties and hotplug this driver was tested with.
const OLDEST: Version = Version {
    major: 7,
    minor: 2,
    micro: 0,
};

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Yearly.
    pub major: u32,
    /// Three a year.
    pub minor: u32,
    /// Stable release.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Version {
    /// Reads `QEMU emulator version 7.2.22 (Debian ...)`.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.lines().next()?.split_once("version ")?;
        let number = rest.split([' ', '(', '-', '+']).next()?;
        let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
        let (major, minor) = (parts.next()??, parts.next()??);
        Some(Self {
            major,
            minor,
            micro: parts.next().flatten().unwrap_or(0),
        })
    }
}

pub(crate) async fn detect(config: QemuConfig) -> Result<Qemu, HypervisorError> {
    let binary = match config.binary {
        Some(path) => path,
        None => find_in_path(std::env::var_os("PATH").as_deref())?,
    };
    if !config.vsock_backend.is_file() {
        return Err(HypervisorError::Start {
            program: config.vsock_backend,
            reason: "no such file; it serves the vsock device of QEMU's VMs".into(),
        });
    }
    let version = ask_version(&binary).await?;
    if version < OLDEST {
        let reason = format!("it is version {version}, and at least {OLDEST} is needed");
        return Err(HypervisorError::Start {
            program: binary,
            reason,
        });
    }
    let (engine, because) =
        choose(config.accelerator, &kvm::probe(Path::new(KVM_DEVICE))).map_err(|reason| {
            HypervisorError::Start {
                program: binary.clone(),
                reason,
            }
        })?;
    let users = Users::new(config.user).map_err(|reason| HypervisorError::Start {
        program: binary.clone(),
        reason,
    })?;
    Ok(Qemu {
        binary,
        version,
        vsock_backend: config.vsock_backend,
        engine,
        because,
        users,
    })
}

fn find_in_path(path: Option<&std::ffi::OsStr>) -> Result<PathBuf, HypervisorError> {
    let directories = path.map(std::env::split_paths).into_iter().flatten();
    directories
        .map(|directory| directory.join(PROGRAM))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| HypervisorError::Start {
            program: PROGRAM.into(),
            reason: format!(
                "not found in PATH ({}); Debian has it in the package qemu-system-x86",
                path.unwrap_or_default().to_string_lossy()
            ),
        })
}

async fn ask_version(binary: &Path) -> Result<Version, HypervisorError> {
    let start = |reason: String| HypervisorError::Start {
        program: binary.to_owned(),
        reason,
    };
    let run = tokio::process::Command::new(binary)
        .arg("-version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(VERSION_DEADLINE, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(e)) => return Err(start(e.to_string())),
        Err(_) => {
            return Err(start(format!(
                "`-version` did not answer within {VERSION_DEADLINE:?}"
            )));
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    Version::parse(&text).ok_or_else(|| {
        let heard = if text.trim().is_empty() {
            String::from_utf8_lossy(&output.stderr)
        } else {
            text
        };
        start(format!(
            "`-version` said {:?}",
            heard.chars().take(200).collect::<String>()
        ))
    })
}

fn choose(wish: Accelerator, kvm: &Kvm) -> Result<(Engine, String), String> {
    match (wish, kvm.is_usable()) {
        (Accelerator::Tcg, _) => Ok((Engine::Tcg, "the configuration asks for it".into())),
        (_, true) => Ok((Engine::Kvm, kvm.to_string())),
        (Accelerator::Auto, false) => Ok((Engine::Tcg, kvm.to_string())),
        (Accelerator::Kvm, false) => Err(format!("the configuration asks for KVM, and {kvm}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_hypervisor::kvm::Vendor;

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        let read = |text| Version::parse(text).map(|v| v.to_string());
        assert_eq!(
            read("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"),
            Some("7.2.22".into())
        );
        assert_eq!(
            read("QEMU emulator version 10.0.2 (qemu-10.0.2-1.fc42)"),
            Some("10.0.2".into())
        );
        assert_eq!(read("QEMU emulator version 9.1.50-dirty"), Some("9.1.50".into()));
        assert_eq!(read("QEMU emulator version 8.0"), Some("8.0.0".into()));
        assert_eq!(read("hello"), None);
        assert_eq!(read("version x.y"), None);
        assert_eq!(read(""), None);
    }

    #[test]
    fn kvm_is_taken_when_usable_and_only_then() {
        let usable = Kvm::Usable { vendor: Vendor::Amd };
        assert_eq!(choose(Accelerator::Auto, &usable).unwrap().0, Engine::Kvm);
        assert_eq!(choose(Accelerator::Tcg, &usable).unwrap().0, Engine::Tcg);
        let (engine, because) = choose(Accelerator::Auto, &Kvm::Paravirtual).unwrap();
        assert_eq!(engine, Engine::Tcg);
        assert!(because.contains("PVM"), "{because}");
        let refusal = choose(Accelerator::Kvm, &Kvm::NoDevice).unwrap_err();
        assert_eq!(
            refusal,
            "the configuration asks for KVM, and this host has no KVM device"
        );
    }

    #[test]
    fn a_missing_binary_is_explained_with_the_path_that_was_searched() {
        let error = find_in_path(Some("/nonexistent/a:/nonexistent/b".as_ref()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/nonexistent/a:/nonexistent/b") && error.contains("qemu-system-x86"),
            "{error}"
        );
    }
}
