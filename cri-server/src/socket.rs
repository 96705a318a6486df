//! The daemon's sockets: made so that there is never a moment with wrong permissions, and never two daemons behind one state.

use std::{
    fs::{File, OpenOptions, Permissions, TryLockError},
    io,
    os::unix::{
        fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

/// Owner and group may connect.
pub const FOR_GROUP: u32 = 0o660;

/// The owner alone may.
pub const FOR_OWNER: u32 = 0o600;

/// Why the socket or the state directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon holds the lock.
    #[error("another caissond uses {0} (its lock is held)")]
    Locked(PathBuf),
    /// Somebody listens on the socket.
    #[error("another process listens on {0}")]
    InUse(PathBuf),
    /// The path is something else.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Io { what, path, source }
}

/// Held for as long as the daemon lives; the kernel drops it with the process.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes `dir` for this process, making it when absent.
    pub fn take(dir: &Path) -> Result<Self, SocketError> {
        std::fs::create_dir_all(dir).map_err(io_error("make directory", dir))?;
        let path = dir.join("caissond.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(SocketError::Locked(dir.to_owned())),
            Err(TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
        }
    }
}

/// A bound socket that is removed when it is dropped.
#[derive(Debug)]
pub struct BoundSocket {
    path: PathBuf,
}

impl BoundSocket {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and the next start replaces a stale socket anyway.
        drop(std::fs::remove_file(&self.path));
    }
}

/// Binds `path` with this mode. A socket that nobody listens on any more is replaced; one that is served, or another kind of file, is an error.
pub fn bind(path: &Path, mode: u32) -> Result<(UnixListener, BoundSocket), SocketError> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(io_error("make directory", dir))?;
    }
    check_vacant(path)?;
    // Bound under another name and renamed: clients find either nothing or a socket with its final mode.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    match std::fs::remove_file(&fresh) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error("remove", &fresh)(error)),
    }
    let listener = UnixListener::bind(&fresh).map_err(io_error("bind", &fresh))?;
    std::fs::set_permissions(&fresh, Permissions::from_mode(mode))
        .map_err(io_error("set the mode of", &fresh))?;
    std::fs::rename(&fresh, path).map_err(io_error("rename the socket to", path))?;
    listener.set_nonblocking(true).map_err(io_error("set up", path))?;
    Ok((
        listener,
        BoundSocket {
            path: path.to_owned(),
        },
    ))
}

fn check_vacant(path: &Path) -> Result<(), SocketError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("look at", path)(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(io_error("try to connect to", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/caisson.sock");
        let (listener, bound) = bind(&path, FOR_OWNER).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, FOR_OWNER);
        assert!(matches!(bind(&path, FOR_OWNER), Err(SocketError::InUse(_))));
        drop(listener);
        let (_listener, again) = bind(&path, FOR_GROUP).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, FOR_GROUP);
        drop(again);
        assert!(!path.exists());
        drop(bound);
    }

    #[test]
    fn a_file_in_the_way_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("caisson.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path, FOR_GROUP), Err(SocketError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_second_daemon_does_not_get_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let lock = StateLock::take(dir.path()).unwrap();
        assert!(matches!(StateLock::take(dir.path()), Err(SocketError::Locked(_))));
        drop(lock);
        StateLock::take(dir.path()).unwrap();
    }
}
