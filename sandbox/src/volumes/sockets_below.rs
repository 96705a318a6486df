//! Finds the Unix sockets of the host below a directory that is shared with a VM, which cannot be connected through a file system.
//!
//! Breadth first, so that what is near the top is found when a limit ends the search. No symbolic link is followed and nothing is looked
//! at that is mounted below: what is found lies on the volume's own mount, whoever moves names about meanwhile. Whether somebody listens
//! decides, see [`Listeners`]: a socket that the pod's own containers have made is theirs, and nobody's here.

use std::{
    collections::{BTreeSet, VecDeque},
    ffi::OsStr,
    fmt, io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use caisson_agent_api::files::MAX_SOCKETS_BELOW;
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::{
    SandboxError,
    volumes::{host_path::HostPath, listeners::Listeners, mount_table::MountTable},
};

/// How far to look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Directories inside each other, the volume's own not counted.
    depth: usize,
    /// Names that are looked at.
    entries: usize,
    sockets: usize,
    time: Duration,
}

/// Servers put their sockets near the top. What is deeper, or in a directory with so many names, can be a volume itself.
pub(crate) const LIMITS: Limits = Limits {
    depth: 6,
    entries: 10_000,
    sockets: MAX_SOCKETS_BELOW,
    time: Duration::from_secs(5),
};

/// A limit that was reached: there may be more sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Limit {
    Depth,
    Entries,
    Sockets,
    Time,
    /// Of the pod; not one of the search.
    Exports,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Depth => "depth of directories",
            Self::Entries => "number of entries",
            Self::Sockets => "number of sockets in the volume",
            Self::Time => "time",
            Self::Exports => "number of sockets of the pod",
        })
    }
}

/// What a search has found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Each with its path below the directory.
    pub(crate) sockets: Vec<(PathBuf, HostPath)>,
    pub(crate) reached: BTreeSet<Limit>,
}

/// File systems of the kernel's that have many names and no sockets.
const WITHOUT_SOCKETS: [&str; 4] = ["cgroup", "cgroup2", "proc", "sysfs"];

/// Sockets below a directory on which somebody on the host listens now. Blocking.
pub(crate) fn search(top: &HostPath, limits: &Limits) -> Result<Found, SandboxError> {
    let table = MountTable::read()?;
    let mount = table.numbered(top.mount);
    if mount.is_some_and(|mount| WITHOUT_SOCKETS.contains(&mount.file_system.as_str())) {
        return Ok(Found::default());
    }
    let mut search = Search {
        top,
        // Of the file system; what stat(2) says of files is another where there are subvolumes.
        device: mount
            .and_then(|mount| mount.device_numbers())
            .unwrap_or(top.device),
        limits,
        listeners: None,
        queue: VecDeque::from([(PathBuf::new(), 0)]),
        entries: 0,
        deadline: Instant::now() + limits.time,
        found: Found::default(),
    };
    search.run().map_err(SandboxError::io(format!(
        "look for sockets below {}",
        top.path.display()
    )))?;
    Ok(search.found)
}

struct Search<'a> {
    top: &'a HostPath,
    device: (u32, u32),
    limits: &'a Limits,
    /// Read when the first socket is seen.
    listeners: Option<Listeners>,
    /// Directories to look into, with their depth.
    queue: VecDeque<(PathBuf, usize)>,
    entries: usize,
    deadline: Instant,
    found: Found,
}

impl Search<'_> {
    fn run(&mut self) -> io::Result<()> {
        while let Some((directory, depth)) = self.queue.pop_front() {
            // What cannot be read, or is another thing by now, has no sockets for anybody.
            let Ok(entries) = self.open_directory(&directory) else {
                continue;
            };
            if !self.directory(entries, &directory, depth)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Looks at the names of a directory; false when the search is over.
    fn directory(&mut self, entries: Dir, directory: &Path, depth: usize) -> io::Result<bool> {
        for entry in entries {
            let Ok(entry) = entry else { break };
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if let Some(limit) = self.exhausted() {
                self.found.reached.insert(limit);
                return Ok(false);
            }
            self.entries += 1;
            let path = directory.join(OsStr::from_bytes(name));
            match entry.file_type() {
                FileType::Directory => self.later(path, depth),
                FileType::Socket => self.socket(path)?,
                // Not every file system says.
                FileType::Unknown => match at(self.top, &path).map(|found| found.kind) {
                    Ok(FileType::Directory) => self.later(path, depth),
                    Ok(FileType::Socket) => self.socket(path)?,
                    _ => {}
                },
                _ => {}
            }
        }
        Ok(true)
    }

    fn exhausted(&self) -> Option<Limit> {
        if self.entries >= self.limits.entries {
            return Some(Limit::Entries);
        }
        (Instant::now() >= self.deadline).then_some(Limit::Time)
    }

    fn later(&mut self, directory: PathBuf, depth: usize) {
        if depth < self.limits.depth {
            self.queue.push_back((directory, depth + 1));
        } else {
            self.found.reached.insert(Limit::Depth);
        }
    }

    fn socket(&mut self, path: PathBuf) -> io::Result<()> {
        let listeners = match &mut self.listeners {
            Some(listeners) => listeners,
            empty => empty.insert(Listeners::read()?),
        };
        // From here on the descriptor counts, and not the name.
        let Ok(socket) = at(self.top, &path) else {
            return Ok(());
        };
        if socket.kind != FileType::Socket || !listeners.have(self.device, socket.inode) {
            return Ok(());
        }
        if self.found.sockets.len() < self.limits.sockets {
            self.found.sockets.push((path, socket));
        } else {
            self.found.reached.insert(Limit::Sockets);
        }
        Ok(())
    }

    fn open_directory(&self, path: &Path) -> rustix::io::Result<Dir> {
        // In two steps: to open a directory by name would mount what an automounter has there.
        let place = at(self.top, path)?.location;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Dir::new(openat(&place, c".", flags, Mode::empty())?)
    }
}

/// What is at a path below, as a location; an error when a link or a mount is on the way.
fn at(top: &HostPath, below: &Path) -> rustix::io::Result<HostPath> {
    let name = if below.as_os_str().is_empty() {
        Path::new(".")
    } else {
        below
    };
    let location: OwnedFd = openat2(
        &top.location,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )?;
    HostPath::at(top.path.join(below), location)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
    };

    struct Volume {
        dir: tempfile::TempDir,
        servers: Vec<UnixListener>,
    }

    impl Volume {
        fn new() -> Self {
            Self {
                dir: tempfile::tempdir().unwrap(),
                servers: Vec::new(),
            }
        }

        fn at(&self, path: impl AsRef<Path>) -> PathBuf {
            self.dir.path().join("volume").join(path)
        }

        fn serve(&mut self, path: impl AsRef<Path>) {
            let path = self.at(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            self.servers.push(UnixListener::bind(path).unwrap());
        }

        fn search(&self, limits: &Limits) -> (BTreeSet<PathBuf>, BTreeSet<Limit>) {
            let found = search(&HostPath::resolve(&self.at("")).unwrap(), limits).unwrap();
            let paths = found.sockets.into_iter().map(|(path, socket)| {
                assert_eq!(socket.path, self.at("").canonicalize().unwrap().join(&path));
                path
            });
            (paths.collect(), found.reached)
        }
    }

    fn paths<const N: usize>(paths: [&str; N]) -> BTreeSet<PathBuf> {
        paths.into_iter().map(PathBuf::from).collect()
    }

    #[test]
    fn sockets_with_a_server_are_found_at_any_depth_within_the_limit() {
        let mut volume = Volume::new();
        for path in ["top", "a/one", "a/b/two", "a/b/c/three"] {
            volume.serve(path);
        }
        drop(UnixListener::bind(volume.at("a/left")).unwrap());
        fs::write(volume.at("file"), "").unwrap();
        let (found, reached) = volume.search(&LIMITS);
        assert_eq!(found, paths(["top", "a/one", "a/b/two", "a/b/c/three"]));
        assert!(reached.is_empty());
        let (found, reached) = volume.search(&Limits { depth: 2, ..LIMITS });
        assert_eq!(found, paths(["top", "a/one", "a/b/two"]));
        assert_eq!(reached, BTreeSet::from([Limit::Depth]));
    }

    #[test]
    fn a_limit_ends_the_search_and_what_is_near_the_top_is_found() {
        let mut volume = Volume::new();
        volume.serve("top");
        for number in 0..20 {
            volume.serve(format!("many/{number}"));
        }
        let (found, reached) = volume.search(&Limits { entries: 2, ..LIMITS });
        assert_eq!(
            (found, reached),
            (paths(["top"]), BTreeSet::from([Limit::Entries]))
        );
        let (found, reached) = volume.search(&Limits { sockets: 7, ..LIMITS });
        assert_eq!((found.len(), reached), (7, BTreeSet::from([Limit::Sockets])));
        assert!(found.contains(Path::new("top")));
        let time = Duration::ZERO;
        let (found, reached) = volume.search(&Limits { time, ..LIMITS });
        assert_eq!((found.len(), reached), (0, BTreeSet::from([Limit::Time])));
        // Exactly as many as are allowed are not too many.
        let (found, reached) = volume.search(&Limits {
            entries: 22,
            sockets: 21,
            ..LIMITS
        });
        assert_eq!((found.len(), reached), (21, BTreeSet::new()));
    }

    #[test]
    fn links_lead_nowhere() {
        let mut volume = Volume::new();
        volume.serve("real/socket");
        volume.serve("../outside/socket");
        symlink("../outside", volume.at("directory")).unwrap();
        symlink("../outside/socket", volume.at("socket")).unwrap();
        symlink("real", volume.at("inside")).unwrap();
        symlink("loop", volume.at("loop")).unwrap();
        assert_eq!(volume.search(&LIMITS), (paths(["real/socket"]), BTreeSet::new()));
    }

    #[test]
    fn names_are_bytes() {
        let mut volume = Volume::new();
        let odd: Vec<PathBuf> = [&b"a b\n"[..], b"\xff\xfe", b"...", b"back\\slash", b"-rf *"]
            .map(|name| PathBuf::from(OsStr::from_bytes(name)).join("s"))
            .to_vec();
        for path in &odd {
            volume.serve(path);
        }
        assert_eq!(volume.search(&LIMITS).0, odd.into_iter().collect());
    }

    #[test]
    fn what_is_mounted_below_is_not_looked_at() {
        // Each of these is a mount of its own wherever tests run.
        let root = HostPath::resolve(Path::new("/")).unwrap();
        for mounted in ["proc", "proc/self"] {
            assert_eq!(
                at(&root, Path::new(mounted)).unwrap_err(),
                rustix::io::Errno::XDEV
            );
        }
        let kernel = search(&HostPath::resolve(Path::new("/proc")).unwrap(), &LIMITS).unwrap();
        assert!(kernel.sockets.is_empty() && kernel.reached.is_empty());
    }

    #[test]
    fn a_directory_that_becomes_a_link_meanwhile_leads_nowhere() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let mut volume = Volume::new();
        volume.serve("real/socket");
        volume.serve("../outside/socket");
        symlink("../outside", volume.at("aside")).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let (one, other) = (volume.at("real"), volume.at("aside"));
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, flags).unwrap();
                }
            });
            let inside = {
                use std::os::unix::fs::MetadataExt;
                let directory =
                    |name: &str| fs::metadata(volume.at(name).join("socket")).map(|found| found.ino());
                let outside = directory("../outside").unwrap();
                move |inode: u64| inode != outside
            };
            for _ in 0..200 {
                let found = search(&HostPath::resolve(&volume.at("")).unwrap(), &LIMITS).unwrap();
                assert!(found.sockets.iter().all(|(_, socket)| inside(socket.inode)));
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
