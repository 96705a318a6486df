//! The command line: descriptors that the daemon has opened, and a directory to begin in.
#![expect(
    unsafe_code,
    reason = "descriptors come as numbers, from whoever started the process"
)]

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::File,
    os::{
        fd::{FromRawFd, RawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

/// What `--help` prints.
pub(crate) const HELP: &str = "\
Serves a pod's shared volumes over FUSE; started by caissond.

  --connection-fd N   a connected stream socket that FUSE messages come from; may be repeated
  --forward-fd N      a connected stream socket that the guest's connections to Unix sockets come from; may be repeated
  --ready-fd N        one byte is written there when volumes can be mounted
  --root DIRECTORY    an empty directory that the process makes its root
  --help, --version";

/// Most connections; a pod never has more messages in flight.
const MAX_CONNECTIONS: usize = 64;

/// What the process is to do.
pub(crate) enum Invocation {
    Run(Arguments),
    Help,
    Version,
}

/// What it works with.
pub(crate) struct Arguments {
    pub(crate) connections: Vec<UnixStream>,
    pub(crate) forwards: Vec<UnixStream>,
    pub(crate) ready: File,
    pub(crate) root: PathBuf,
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("unknown argument {0:?}; see --help")]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{0} is not the number of an open descriptor")]
    Descriptor(String),
    #[error("--root is not an absolute path")]
    Root,
    #[error("there are more than {MAX_CONNECTIONS} connections")]
    TooMany,
}

/// Takes the descriptors: call it once, before anything else is opened.
pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<Invocation, Wrong> {
    let mut words = words;
    let mut seen = HashSet::new();
    let (mut connections, mut forwards, mut ready, mut root) = (Vec::new(), Vec::new(), None, None);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--help") => return Ok(Invocation::Help),
            Some("--version") => return Ok(Invocation::Version),
            Some("--connection-fd") => {
                let fd = descriptor(words.next().ok_or(Wrong::NoValue("--connection-fd"))?, &mut seen)?;
                // SAFETY: `descriptor` has seen that the number is an open descriptor and that it comes once; nothing else in this
                // process has opened or knows it.
                connections.push(unsafe { UnixStream::from_raw_fd(fd) });
            }
            Some("--forward-fd") => {
                let fd = descriptor(words.next().ok_or(Wrong::NoValue("--forward-fd"))?, &mut seen)?;
                // SAFETY: as above.
                forwards.push(unsafe { UnixStream::from_raw_fd(fd) });
            }
            Some("--ready-fd") => {
                let fd = descriptor(words.next().ok_or(Wrong::NoValue("--ready-fd"))?, &mut seen)?;
                // SAFETY: as above.
                ready = Some(unsafe { File::from_raw_fd(fd) });
            }
            Some("--root") => root = Some(PathBuf::from(words.next().ok_or(Wrong::NoValue("--root"))?)),
            _ => return Err(Wrong::Unknown(word)),
        }
        if connections.len() + forwards.len() > MAX_CONNECTIONS {
            return Err(Wrong::TooMany);
        }
    }
    if connections.is_empty() {
        return Err(Wrong::Missing("--connection-fd"));
    }
    let root = root.ok_or(Wrong::Missing("--root"))?;
    if !root.is_absolute() {
        return Err(Wrong::Root);
    }
    Ok(Invocation::Run(Arguments {
        connections,
        forwards,
        ready: ready.ok_or(Wrong::Missing("--ready-fd"))?,
        root,
    }))
}

fn descriptor(word: OsString, seen: &mut HashSet<RawFd>) -> Result<RawFd, Wrong> {
    let wrong = || Wrong::Descriptor(word.to_string_lossy().into_owned());
    let fd: RawFd = word
        .to_str()
        .and_then(|word| word.parse().ok())
        .filter(|fd| *fd > 2)
        .ok_or_else(wrong)?;
    // SAFETY: F_GETFD takes numbers by value and answers EBADF for what is not open.
    let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    if open && seen.insert(fd) {
        Ok(fd)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(words: &[&str]) -> String {
        match parse(words.iter().map(OsString::from)) {
            Ok(_) => "accepted".into(),
            Err(wrong) => wrong.to_string(),
        }
    }

    #[test]
    fn a_wrong_command_line_is_refused_by_name() {
        assert_eq!(refused(&[]), "--connection-fd is missing");
        assert_eq!(refused(&["--connection-fd"]), "--connection-fd needs a value");
        for number in ["0", "2", "-1", "x", "100000"] {
            assert_eq!(
                refused(&["--connection-fd", number]),
                format!("{number} is not the number of an open descriptor")
            );
        }
        assert!(refused(&["--volume"]).contains("--volume"));
    }

    #[test]
    fn help_and_version_need_nothing_else() {
        assert!(matches!(
            parse(["--help".into()].into_iter()),
            Ok(Invocation::Help)
        ));
        assert!(matches!(
            parse(["--version".into()].into_iter()),
            Ok(Invocation::Version)
        ));
    }
}
