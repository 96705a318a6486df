//! A program under the confinement of a VMM tries to get out. Needs root: elsewhere there is nothing to give up.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    net::TcpListener,
    os::linux::net::SocketAddrExt,
    os::unix::net::{SocketAddr, UnixListener},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

/// The program of `examples/`, which cargo builds with the tests.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let target = test.parent().unwrap().parent().unwrap();
    let program = target.join("examples/escapee");
    assert!(program.is_file(), "{} is not built", program.display());
    program
}

/// What the attempts meet: all of it would let them in.
struct World {
    neighbour: Child,
    directory: tempfile::TempDir,
    _unix: UnixListener,
    _abstract: UnixListener,
    tcp: TcpListener,
}

impl Drop for World {
    fn drop(&mut self) {
        self.neighbour.kill().unwrap();
        self.neighbour.wait().unwrap();
    }
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("open.sock");
        let name = SocketAddr::from_abstract_name(path.to_str().unwrap()).unwrap();
        // Of the escapee's own user, so that its user alone does not keep it from anything.
        let neighbour = Command::new("setpriv")
            .args([
                "--reuid=2100000000",
                "--regid=2100000000",
                "--clear-groups",
                "sleep",
                "600",
            ])
            .spawn()
            .unwrap();
        Self {
            neighbour,
            _unix: UnixListener::bind(&path).unwrap(),
            _abstract: UnixListener::bind_addr(&name).unwrap(),
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            directory,
        }
    }

    /// How each attempt ended: 0, or an errno.
    fn attempts(&self, layers: &str, kind: &str) -> BTreeMap<String, i32> {
        let socket = self.directory.path().join("open.sock");
        let output = Command::new(program())
            .args([layers, kind, &self.neighbour.id().to_string()])
            .arg(&socket)
            .arg(self.tcp.local_addr().unwrap().port().to_string())
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let pairs = text.lines().map(|line| line.split_once(' ').unwrap());
        pairs
            .map(|(name, result)| (name.to_owned(), result.parse().unwrap()))
            .collect()
    }

    fn neighbour_lives(&mut self) -> bool {
        self.neighbour.try_wait().unwrap().is_none()
    }
}

fn skip() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root, since it is privilege that is given up");
    }
    !root
}

const OUTWARD: &[&str] = &[
    "open", "create", "mknod", "chroot", "mount", "setuid", "kill", "ptrace", "pidfd", "exec", "perf",
    "unix", "abstract", "tcp",
];

#[test]
fn without_any_filter_namespaces_and_user_keep_it_in() {
    if skip() {
        return;
    }
    let mut world = World::new();
    let results = world.attempts("process", "control");
    for attempt in OUTWARD {
        assert_ne!(results[*attempt], 0, "{attempt} succeeded: {results:?}");
    }
    assert_eq!(results["open"], libc::ENOENT, "the root directory is empty");
    assert_eq!(results["create"], libc::EROFS, "and cannot be filled");
    assert_eq!(results["kill"], libc::ESRCH, "there is no other process");
    assert_eq!(results["tcp"], libc::ENETUNREACH, "loopback is its own, and down");
    assert!(world.neighbour_lives());
}

#[test]
fn without_namespaces_the_filters_of_every_thread_keep_it_in() {
    if skip() {
        return;
    }
    let mut world = World::new();
    for kind in ["control", "vcpu", "block", "net", "vsock", "entropy", "memory"] {
        let results = world.attempts("filters", kind);
        for attempt in OUTWARD
            .iter()
            .chain(&["unshare", "userfaultfd", "socket", "executable"])
        {
            assert_eq!(
                results[*attempt],
                libc::ENOSYS,
                "{attempt} on {kind}: {results:?}"
            );
        }
        let makes_threads = matches!(kind, "control" | "vcpu");
        assert_eq!(results["thread"] == 0, makes_threads, "{kind}: {results:?}");
    }
    assert!(world.neighbour_lives());
}

#[test]
fn with_both_layers_the_process_still_does_its_work() {
    if skip() {
        return;
    }
    let mut world = World::new();
    let results = world.attempts("both", "vcpu");
    for attempt in OUTWARD {
        assert_eq!(results[*attempt], libc::ENOSYS, "{attempt}: {results:?}");
    }
    assert_eq!(results["thread"], 0);
    assert!(results.contains_key("pid"), "the first process said who goes on");
    assert!(world.neighbour_lives());
}
