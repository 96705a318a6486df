//! Profiles that the host's kernel has. It keeps the policy that each was loaded from (`raw_data`), unless it was built not to.
//!
//! Layout: `policy/profiles/<mangled name>.<number>/{name,raw_data}` below AppArmor's directory in securityfs; `raw_data` is a link to
//! the whole of what was loaded at once, which may hold more profiles.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use crate::{MAX_POLICY_BYTES, ProfileError};

/// What the kernel has of a profile.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Nothing, as a kernel without AppArmor.
    Nothing,
    /// The profile without its policy.
    Withheld,
    /// The policy.
    Policy(Vec<u8>),
}

/// Looks for a profile by its whole name. Blocking.
pub(crate) fn policy(kernel: &Path, name: &str) -> Result<Answer, ProfileError> {
    let profiles = kernel.join("policy/profiles");
    let entries = match fs::read_dir(&profiles) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Answer::Nothing),
        Err(error) => return Err(ProfileError::io(format!("list {}", profiles.display()))(error)),
    };
    for entry in entries.flatten() {
        // A profile that is being replaced or removed is not there for a moment.
        let known = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if known.strip_suffix('\n').unwrap_or(&known) == name {
            return read(&entry.path().join("raw_data"), name);
        }
    }
    Ok(Answer::Nothing)
}

fn read(path: &Path, name: &str) -> Result<Answer, ProfileError> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Answer::Withheld),
        Err(error) => return Err(ProfileError::io(format!("open {}", path.display()))(error)),
    };
    let mut policy = Vec::new();
    file.take(MAX_POLICY_BYTES + 1)
        .read_to_end(&mut policy)
        .map_err(ProfileError::io(format!("read {}", path.display())))?;
    if policy.is_empty() {
        return Ok(Answer::Withheld);
    }
    if u64::try_from(policy.len()).is_ok_and(|length| length > MAX_POLICY_BYTES) {
        return Err(ProfileError::TooLarge {
            name: name.to_owned(),
            limit: MAX_POLICY_BYTES,
        });
    }
    Ok(Answer::Policy(policy))
}
