//! AppArmor of the guest's kernel: whether there is any, what it can do, and loading policy: the daemon's, and the default profile that
//! the initramfs has.
//!
//! Nothing is mounted or loaded before a container needs it. Must not know where policy comes from, or what is in it.

use std::{
    fs, io,
    os::fd::AsFd,
    path::Path,
    sync::{Mutex, PoisonError},
};

use caisson_agent_api::{MAX_APPARMOR_POLICY_BYTES, v1};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::error::{AgentError, At};

/// Name of the guest's own profile, as guest/apparmor/default.profile has it.
const DEFAULT_PROFILE: &str = "caisson-default";

/// Where the builder of the initramfs puts the compiled default profile.
const BUILT: &str = "/etc/apparmor-default";

/// Where the agent finds it, since it does not see the initramfs.
const KEPT: &str = "/run/apparmor-default";

const SWITCH: &str = "/sys/module/apparmor/parameters/enabled";
const SECURITYFS: &str = "/sys/kernel/security";
const INTERFACE: &str = "/sys/kernel/security/apparmor";

/// Longest name of a profile, in bytes.
const MAX_NAME: usize = 1024;

/// How deep the kernel's tree of features may be, and how long its description.
const MAX_FEATURE_DEPTH: usize = 8;
const MAX_FEATURE_BYTES: usize = 64 << 10;

/// Whether the kernel has AppArmor, switched on.
pub(crate) fn enabled() -> bool {
    fs::read_to_string(SWITCH).is_ok_and(|switch| switch.starts_with('Y'))
}

/// Saves the default profile from the initramfs, which nobody sees any more when `root` has become the root.
pub(crate) fn keep_default_policy(root: &Path) -> Result<(), AgentError> {
    let kept = root.join(KEPT.trim_start_matches('/'));
    match fs::copy(BUILT, &kept) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).at(|| format!("copying {BUILT}")),
    }
}

/// What has been done so far.
#[derive(Debug, Default)]
struct Done {
    mounted: bool,
    default_loaded: bool,
}

/// AppArmor as this agent uses it.
#[derive(Debug, Default)]
pub(crate) struct AppArmor {
    done: Mutex<Done>,
}

impl AppArmor {
    /// `LoadApparmorPolicy`. Blocking.
    pub(crate) fn load(&self, policy: &[u8]) -> Result<(), AgentError> {
        if policy.is_empty() || policy.len() > MAX_APPARMOR_POLICY_BYTES {
            let reason = format!("{} bytes are not 1 to {MAX_APPARMOR_POLICY_BYTES}", policy.len());
            return Err(AgentError::invalid("policy", reason));
        }
        self.mount()?;
        replace(policy)
    }

    /// `ApparmorFeatures`. Blocking.
    pub(crate) fn features(&self) -> Result<String, AgentError> {
        self.mount()?;
        let mut text = String::new();
        let top = Path::new(INTERFACE).join("features");
        describe(&top, MAX_FEATURE_DEPTH, &mut text).at(|| format!("reading {}", top.display()))?;
        Ok(text)
    }

    /// The profile that a process gets, by its name, loaded; none when it gets none. Blocking, for a moment.
    pub(crate) fn resolve(
        &self,
        wanted: Option<v1::ApparmorProfile>,
    ) -> Result<Option<v1::ApparmorProfile>, AgentError> {
        let Some(mut wanted) = wanted else {
            return Ok(None);
        };
        check(&wanted.name)?;
        if wanted.optional && !enabled() {
            return Ok(None);
        }
        self.mount()?;
        if wanted.name.is_empty() {
            match self.load_default()? {
                true => DEFAULT_PROFILE.clone_into(&mut wanted.name),
                false if wanted.optional => return Ok(None),
                false => {
                    return Err(AgentError::State {
                        what: "AppArmor profile",
                        id: DEFAULT_PROFILE.to_owned(),
                        reason: "is not part of the guest's initramfs",
                    });
                }
            }
        }
        let path = Path::new(INTERFACE).join("profiles");
        let loaded = fs::read_to_string(&path).at(|| format!("reading {}", path.display()))?;
        if !lists(&loaded, &wanted.name) {
            return Err(AgentError::Unknown {
                what: "AppArmor profile",
                id: wanted.name,
            });
        }
        Ok(Some(wanted))
    }

    /// Makes the kernel's interface visible to the agent.
    fn mount(&self) -> Result<(), AgentError> {
        if !enabled() {
            return Err(AgentError::State {
                what: "AppArmor",
                id: String::from("of the guest's kernel"),
                reason: "is absent or switched off",
            });
        }
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if !done.mounted {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            mount("securityfs", SECURITYFS, "securityfs", flags, c"")
                .at(|| format!("mounting securityfs on {SECURITYFS}"))?;
            done.mounted = true;
        }
        Ok(())
    }

    /// False when there is none.
    fn load_default(&self) -> Result<bool, AgentError> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if done.default_loaded {
            return Ok(true);
        }
        let policy = match fs::read(KEPT) {
            Ok(policy) => policy,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).at(|| format!("reading {KEPT}")),
        };
        replace(&policy)?;
        done.default_loaded = true;
        Ok(true)
    }
}

/// Hands policy to the kernel, in one piece, as it wants it.
fn replace(policy: &[u8]) -> Result<(), AgentError> {
    let step = || "loading AppArmor policy into the guest's kernel";
    let path = Path::new(INTERFACE).join(".replace");
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).at(step)?;
    let written = rustix::io::write(file.as_fd(), policy).at(step)?;
    if written == policy.len() {
        return Ok(());
    }
    Err(Errno::MSGSIZE).at(step)
}

/// Whether the kernel's list, of lines such as `name (enforce)`, has this profile.
fn lists(loaded: &str, name: &str) -> bool {
    loaded
        .lines()
        .filter_map(|line| line.rsplit_once(" ("))
        .any(|(known, _)| known == name)
}

/// What is written into the kernel's files must be one word of them. Empty is the default profile.
fn check(name: &str) -> Result<(), AgentError> {
    if name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let reason = format!("{name:?} is not a name of at most {MAX_NAME} bytes");
        return Err(AgentError::invalid("process.apparmor.name", reason));
    }
    Ok(())
}

/// The kernel's tree of features, as apparmor_parser writes it down: `name {content}` with directories nested.
fn describe(directory: &Path, depth: usize, text: &mut String) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        text.push_str(&entry.file_name().to_string_lossy());
        text.push_str(" {");
        if entry.file_type()?.is_dir() {
            let depth = depth
                .checked_sub(1)
                .ok_or_else(|| io::Error::other("too deep a tree"))?;
            describe(&entry.path(), depth, text)?;
        } else {
            text.push_str(&fs::read_to_string(entry.path())?);
        }
        text.push_str("}\n");
        if text.len() > MAX_FEATURE_BYTES {
            return Err(io::Error::other("too large a tree"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_listed_by_its_whole_name() {
        let list = "caisson-default (enforce)\nmy (odd) one (complain)\n/usr/bin/x//y (unconfined)\n";
        for known in ["caisson-default", "my (odd) one", "/usr/bin/x//y"] {
            assert!(lists(list, known), "{known}");
        }
        for unknown in ["caisson", "my", "/usr/bin/x", "", "(enforce)", "unconfined"] {
            assert!(!lists(list, unknown), "{unknown}");
        }
    }

    #[test]
    fn a_name_is_one_line() {
        check("").unwrap();
        check("k8s-deny write").unwrap();
        for bad in ["a\nb", "a\0", &"x".repeat(1025)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_tree_of_features_is_written_as_the_compiler_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("policy/versions")).unwrap();
        fs::write(dir.path().join("policy/versions/v7"), "yes\n").unwrap();
        fs::write(dir.path().join("policy/set_load"), "yes\n").unwrap();
        fs::write(dir.path().join("capability"), "0xffffff\n").unwrap();
        let mut text = String::new();
        describe(dir.path(), 2, &mut text).unwrap();
        assert_eq!(
            text,
            "capability {0xffffff\n}\npolicy {set_load {yes\n}\nversions {v7 {yes\n}\n}\n}\n"
        );
        assert!(describe(dir.path(), 1, &mut String::new()).is_err());
    }

    #[test]
    fn nobody_asks_for_nothing_of_a_kernel() {
        assert_eq!(AppArmor::default().resolve(None).unwrap(), None);
    }
}
