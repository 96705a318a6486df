//! Pinned network namespaces, and threads inside them.
//!
//! A namespace lives as long as a file on which it is bind-mounted. Everything happens on threads of its own: neither fork() in a
//! multi-threaded daemon, nor a runtime's worker that comes back in the wrong namespace. Must not know CNI.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{FsType, statfs},
};
use tokio::sync::oneshot;

/// Of the file system that namespaces live in (linux/magic.h); libc's constants lack it on musl.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// Makes a namespace and pins it at `path`, which must not exist. The directory is made if needed; it need not be a mount point.
pub(crate) async fn create(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    on_thread("netns-create", move || create_here(&path)).await
}

fn create_here(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path)?;
    let pinned = unshare(CloneFlags::CLONE_NEWNET).and_then(|()| {
        mount(
            Some("/proc/thread-self/ns/net"),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
    });
    pinned.map_err(|errno| {
        if let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove the file of a namespace that was not made");
        }
        errno.into()
    })
}

/// Whether a namespace is pinned there: a bare file may be left from a crash or from before a reboot.
pub(crate) fn is_pinned(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

/// Unpins what is at `path`; fine when nothing is. The kernel takes the namespace away with its last user.
pub(crate) async fn remove(path: &Path) -> io::Result<()> {
    let path = path.to_owned();
    on_thread("netns-remove", move || {
        // More than one mount can be stacked there when a daemon died at the wrong moment; EINVAL says that there is none left.
        loop {
            match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        // This also detaches copies of the mount in other mount namespaces, which would keep the namespace alive.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    })
    .await
}

/// Runs `work` on a thread of its own inside the namespace pinned at `path`. Goes on when the answer is no longer awaited.
pub(crate) async fn run_in<T, F>(path: &Path, work: F) -> io::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let path = path.to_owned();
    on_thread("netns", move || {
        setns(File::open(&path)?, CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .await
}

async fn on_thread<T, F>(name: &str, work: F) -> io::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let (answer, answered) = oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Nobody may be waiting any more; what the answer holds (descriptors of taps, say) is then dropped here.
        drop(answer.send(work()));
    })?;
    answered
        .await
        .map_err(|_| io::Error::other("the thread in the network namespace has panicked"))?
}
