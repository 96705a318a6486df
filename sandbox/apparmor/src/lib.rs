//! AppArmor profiles of the node, by name, as compiled policy for a guest's kernel.
//!
//! Two places are looked at: the host's kernel ([`loaded`]), then the files of a directory ([`files`], compiled by [`compiler`]). Must not
//! know pods, guests or the CRI. What the host's administrator has written is trusted as far as his kernel would trust it; the name is
//! not, since it comes from a pod.

mod compiler;
mod error;
mod files;
mod loaded;

use std::path::{Path, PathBuf};

use tokio::sync::Semaphore;

pub use error::ProfileError;

/// Largest compiled policy, in bytes.
pub const MAX_POLICY_BYTES: u64 = 4 << 20;

/// Longest name of a profile, in bytes.
const MAX_NAME: usize = 1024;

/// Compilers that run at a time: each may take a processor for a second.
const COMPILERS: usize = 2;

/// Where the profiles of a node are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Directory whose files have profiles.
    pub directory: PathBuf,
    /// `apparmor_parser`; `None`: from where Debian and Ubuntu have it.
    pub parser: Option<PathBuf>,
    /// AppArmor's directory below securityfs.
    pub kernel: PathBuf,
}

impl Settings {
    /// Those of a node that is as its distribution made it.
    #[must_use]
    pub fn new(directory: PathBuf, parser: Option<PathBuf>) -> Self {
        Self {
            directory,
            parser,
            kernel: PathBuf::from("/sys/kernel/security/apparmor"),
        }
    }

    /// Whether the host's kernel has AppArmor.
    #[must_use]
    pub fn host_has_apparmor(&self) -> bool {
        self.kernel.join("policy/profiles").is_dir()
    }

    /// What compiles the profiles in files; `None`: they cannot be had.
    #[must_use]
    pub fn compiler(&self) -> Option<PathBuf> {
        compiler::path(self.parser.as_deref())
    }
}

/// The profiles of a node.
#[derive(Debug)]
pub struct Profiles {
    settings: Settings,
    compilers: Semaphore,
}

/// Where a profile is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The policy as the host's kernel has it.
    Loaded(Vec<u8>),
    /// A file that has it in words, for [`Profiles::compile`].
    File(PathBuf),
}

impl Profiles {
    /// Looks at nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            compilers: Semaphore::new(COMPILERS),
        }
    }

    /// Finds a profile by its name. Children (`parent//child`) come with their parent.
    pub async fn find(&self, name: &str) -> Result<Found, ProfileError> {
        check(name)?;
        let top = name.split("//").next().unwrap_or(name).to_owned();
        let (kernel, directory) = (self.settings.kernel.clone(), self.settings.directory.clone());
        let wanted = top.clone();
        let searched = tokio::task::spawn_blocking(move || search(&kernel, &directory, &wanted));
        let (loaded, candidates) = searched
            .await
            .map_err(|_| ProfileError::Lost(name.to_owned()))??;
        if let loaded::Answer::Policy(policy) = loaded {
            return Ok(Found::Loaded(policy));
        }
        // A file that cannot be read may be the one that was meant, unless another has the profile.
        let mut failure = None;
        for file in candidates {
            match self.names(name, &file).await {
                Ok(names) if names.contains(&top) => return Ok(Found::File(file)),
                Ok(_) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| ProfileError::Unknown {
            name: name.to_owned(),
            directory: self.settings.directory.clone(),
            withheld: loaded == loaded::Answer::Withheld,
        }))
    }

    /// Compiles a file for a kernel with these features, as its agent describes them.
    pub async fn compile(&self, name: &str, file: &Path, features: &str) -> Result<Vec<u8>, ProfileError> {
        let features = features.to_owned();
        let description = tokio::task::spawn_blocking(move || compiler::features(&features))
            .await
            .map_err(|_| ProfileError::Lost(name.to_owned()))?
            .map_err(ProfileError::io("write down the features of the guest's kernel"))?;
        let mut arguments = compiler::WITHOUT_KERNEL.map(std::ffi::OsStr::new).to_vec();
        arguments.extend([
            std::ffi::OsStr::new("--stdout"),
            std::ffi::OsStr::new("--kernel-features"),
            description.path().as_os_str(),
            file.as_os_str(),
        ]);
        let policy = self.run(name, file, &arguments).await?;
        if policy.is_empty() {
            return Err(ProfileError::Compiler {
                name: name.to_owned(),
                file: file.to_owned(),
                reason: "it printed nothing".into(),
            });
        }
        Ok(policy)
    }

    /// The names of the profiles in a file.
    async fn names(&self, name: &str, file: &Path) -> Result<Vec<String>, ProfileError> {
        let mut arguments = compiler::WITHOUT_KERNEL.map(std::ffi::OsStr::new).to_vec();
        arguments.extend([std::ffi::OsStr::new("--names"), file.as_os_str()]);
        let printed = self.run(name, file, &arguments).await?;
        Ok(String::from_utf8_lossy(&printed)
            .lines()
            .map(str::to_owned)
            .collect())
    }

    async fn run(
        &self,
        name: &str,
        file: &Path,
        arguments: &[&std::ffi::OsStr],
    ) -> Result<Vec<u8>, ProfileError> {
        let parser = self.settings.compiler().ok_or_else(|| ProfileError::NoCompiler {
            name: name.to_owned(),
            file: file.to_owned(),
        })?;
        // Never closed.
        let _turn = self.compilers.acquire().await;
        compiler::run(&parser, arguments)
            .await
            .map_err(|reason| ProfileError::Compiler {
                name: name.to_owned(),
                file: file.to_owned(),
                reason,
            })
    }
}

/// Blocking.
fn search(
    kernel: &Path,
    directory: &Path,
    name: &str,
) -> Result<(loaded::Answer, Vec<PathBuf>), ProfileError> {
    let loaded = loaded::policy(kernel, name)?;
    let candidates = match loaded {
        loaded::Answer::Policy(_) => Vec::new(),
        _ => files::candidates(directory, name)?,
    };
    Ok((loaded, candidates))
}

/// A name of this node's own policy: one line, and of no other namespace.
fn check(name: &str) -> Result<(), ProfileError> {
    let reason = if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        "is not a line of 1 to 1024 bytes"
    } else if name.starts_with(':') {
        "is of another policy namespace"
    } else {
        return Ok(());
    };
    Err(ProfileError::Name {
        name: name.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests;
