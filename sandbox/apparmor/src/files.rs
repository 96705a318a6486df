//! Files that may have a profile: the one that bears its name, and those in which its name occurs. Whether they do, the compiler says.
//!
//! Only files of the directory itself count, as apparmor_parser takes them; a name is never a path here.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use crate::ProfileError;

/// Largest file that is looked into, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Most entries of the directory that are looked at.
const MAX_ENTRIES: usize = 4096;

/// Most files that the compiler is asked about for one name.
const MAX_CANDIDATES: usize = 16;

/// What editors and package managers leave beside the file that is meant (apparmor.d(5)).
const LEFTOVERS: [&str; 6] = ["~", ".dpkg-new", ".dpkg-old", ".dpkg-dist", ".rpmnew", ".rpmsave"];

/// The files in which a profile of this name could be, the likeliest first. Blocking.
pub(crate) fn candidates(directory: &Path, name: &str) -> Result<Vec<PathBuf>, ProfileError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ProfileError::io(format!("list {}", directory.display()))(error)),
    };
    let mut names: Vec<_> = entries
        .take(MAX_ENTRIES)
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|file| {
            let file = file.to_string_lossy();
            !file.starts_with('.') && !LEFTOVERS.iter().any(|end| file.ends_with(end))
        })
        .collect();
    // The file of the profile's own name first, then in a fixed order.
    names.sort_by_key(|file| (file.as_os_str() != name, file.clone()));
    let mut found = Vec::new();
    for file in names {
        let path = directory.join(&file);
        if mentions(&path, name) {
            found.push(path);
        }
        if found.len() == MAX_CANDIDATES {
            break;
        }
    }
    Ok(found)
}

/// Whether a file has this name somewhere in it. One that cannot be read has nothing.
fn mentions(path: &Path, name: &str) -> bool {
    // Neither a fifo nor an endless device is waited for.
    let file = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    let Ok(file) = file else { return false };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return false;
    }
    let mut text = Vec::new();
    if file.take(MAX_FILE).read_to_end(&mut text).is_err() {
        return false;
    }
    text.windows(name.len()).any(|window| window == name.as_bytes())
}
