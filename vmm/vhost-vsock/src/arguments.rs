//! The command line, validated whole before anything is done.
#![expect(
    unsafe_code,
    reason = "file descriptors that were passed in are taken over by number"
)]

use std::{
    ffi::OsString,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
};

/// What `--help` prints.
pub(crate) const HELP: &str = "\
A virtio socket device for one VM, by vhost-user.

usage: caisson-vhost-vsock (--socket PATH | --socket-fd N) (--uds PATH | --uds-fd N) --cid CID

  --socket PATH    listen here for the hypervisor (QEMU: -device vhost-user-vsock-pci)
  --socket-fd N    the same, on a socket that listens already
  --uds PATH       listen here for the host's connections: write CONNECT <port>, read OK
  --uds-fd N       the same, on a socket that listens already
  --cid CID        the guest's context id, 3 or more
  --help           this text
  --version        the version

The process serves one hypervisor, and ends when it goes. The guest cannot open connections.
Its memory must be shared (QEMU: -object memory-backend-memfd,share=on).";

/// What the user wants.
#[derive(Debug)]
pub(crate) enum Invocation {
    Help,
    Version,
    Run(Arguments),
}

/// What a device is made of.
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) vhost_user: UnixListener,
    pub(crate) hybrid: UnixListener,
    pub(crate) cid: u64,
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Wrong {
    #[error("unknown argument {0:?}; --help shows what there is")]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("{0} needs a number, not {1:?}")]
    Number(&'static str, OsString),
    #[error("{0} is given twice")]
    Twice(&'static str),
    #[error("{0} is missing; --help shows the usage")]
    Missing(&'static str),
    #[error("cannot listen on {path}", path = .0.display())]
    Listen(PathBuf, #[source] std::io::Error),
    #[error("file descriptor {0} is not an open socket")]
    Descriptor(RawFd, #[source] std::io::Error),
}

/// Where a listener comes from.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    Path(PathBuf),
    Descriptor(RawFd),
}

#[derive(Debug, Default)]
struct Raw {
    vhost_user: Option<Source>,
    hybrid: Option<Source>,
    cid: Option<u64>,
}

pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation, Wrong> {
    let mut arguments = arguments;
    let mut raw = Raw::default();
    while let Some(argument) = arguments.next() {
        let mut value = |name| arguments.next().ok_or(Wrong::NoValue(name));
        match argument.to_str() {
            Some("--help" | "-h") => return Ok(Invocation::Help),
            Some("--version") => return Ok(Invocation::Version),
            Some("--socket") => {
                let path = value("--socket")?.into();
                once(&mut raw.vhost_user, "--socket", Source::Path(path))?;
            }
            Some("--socket-fd") => {
                let fd = number("--socket-fd", value("--socket-fd")?)?;
                once(&mut raw.vhost_user, "--socket-fd", Source::Descriptor(fd))?;
            }
            Some("--uds") => {
                let path = value("--uds")?.into();
                once(&mut raw.hybrid, "--uds", Source::Path(path))?;
            }
            Some("--uds-fd") => {
                let fd = number("--uds-fd", value("--uds-fd")?)?;
                once(&mut raw.hybrid, "--uds-fd", Source::Descriptor(fd))?;
            }
            Some("--cid") => once(&mut raw.cid, "--cid", number("--cid", value("--cid")?)?)?,
            _ => return Err(Wrong::Unknown(argument)),
        }
    }
    let vhost_user = raw.vhost_user.ok_or(Wrong::Missing("--socket or --socket-fd"))?;
    let hybrid = raw.hybrid.ok_or(Wrong::Missing("--uds or --uds-fd"))?;
    let cid = raw.cid.ok_or(Wrong::Missing("--cid"))?;
    if vhost_user == hybrid {
        return Err(Wrong::Twice("the same socket"));
    }
    Ok(Invocation::Run(Arguments {
        vhost_user: listener(vhost_user)?,
        hybrid: listener(hybrid)?,
        cid,
    }))
}

fn once<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), Wrong> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Wrong::Twice(name)),
    }
}

fn number<T: std::str::FromStr>(name: &'static str, value: OsString) -> Result<T, Wrong> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or(Wrong::Number(name, value))
}

fn listener(source: Source) -> Result<UnixListener, Wrong> {
    match source {
        Source::Path(path) => UnixListener::bind(&path).map_err(|e| Wrong::Listen(path, e)),
        Source::Descriptor(fd) => {
            let invalid = |e| Wrong::Descriptor(fd, e);
            if fd < 3 {
                return Err(invalid(std::io::ErrorKind::InvalidInput.into()));
            }
            // SAFETY: the number was passed to us by the process that opened it, and each is taken over once: `parse` refuses two
            // equal ones, and nothing has been opened before it that could own this number. A closed one fails below.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            let listener = UnixListener::from(owned);
            match listener.local_addr() {
                Ok(_) => Ok(listener),
                Err(e) => {
                    // Not ours to close.
                    std::mem::forget(listener);
                    Err(invalid(e))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(line: &str) -> String {
        match parse(line.split_whitespace().map(OsString::from)) {
            Err(wrong) => wrong.to_string(),
            Ok(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_mistake_is_named() {
        assert!(wrong("").contains("--socket or --socket-fd"));
        assert!(wrong("--socket /x").contains("--uds"));
        assert!(wrong("--socket /x --uds /y").contains("--cid"));
        assert!(wrong("--socket /x --uds /y --cid three").contains("\"three\""));
        assert!(wrong("--socket /x --socket-fd 9").contains("twice"));
        assert!(wrong("--socket-fd 9 --uds-fd 9 --cid 3").contains("twice"));
        assert!(wrong("--socket").contains("value"));
        assert!(wrong("--frobnicate").contains("frobnicate"));
        assert!(wrong("--socket-fd 987654 --uds /nowhere/x --cid 3").contains("987654"));
    }

    #[test]
    fn sockets_are_made_where_the_paths_say() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, uds) = (dir.path().join("a"), dir.path().join("b"));
        let line = [
            "--socket".into(),
            socket.clone().into_os_string(),
            "--uds".into(),
            uds.clone().into(),
            "--cid".into(),
            "3".into(),
        ];
        assert!(matches!(
            parse(line.into_iter()),
            Ok(Invocation::Run(Arguments { cid: 3, .. }))
        ));
        assert!(socket.exists() && uds.exists());
    }
}
