//! For tests: confines itself as a VMM does, then tries to get out, and says of each attempt how it ended.
//!
//! Arguments: which layers (`process`, `filters` or `both`), kind of thread, pid of a neighbour, path of a Unix socket that listens, port of a
//! TCP socket that listens on loopback. Output: the pid, then a line `attempt result` each, where the result is `0` or the name of an errno.

#![expect(unsafe_code, reason = "attempts are system calls with whatever arguments")]
#![expect(clippy::unwrap_used, reason = "a program of tests fails like a test")]

use std::{
    ffi::CString,
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::linux::net::SocketAddrExt,
    os::unix::net::{SocketAddr as UnixAddr, UnixStream},
    process::{ExitCode, exit},
    time::Duration,
};

use caisson_confinement::{Enforcement, Filters, Plan, ThreadKind, confine, into_pid_namespace};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layers, kind, neighbour, socket, port] = arguments.as_slice() else {
        exit(2);
    };
    let (process, filters) = match layers.as_str() {
        "process" => (true, false),
        "filters" => (false, true),
        _ => (true, true),
    };
    if process {
        into_pid_namespace(|pid| {
            println!("pid {pid}");
            ExitCode::SUCCESS
        })
        .unwrap();
        confine(&Plan {
            user: Some((2_100_000_000, 2_100_000_000)),
            namespaces: true,
        })
        .unwrap();
    }
    let kind = match kind.as_str() {
        "vcpu" => ThreadKind::Vcpu,
        "block" => ThreadKind::Block,
        "net" => ThreadKind::Net,
        "vsock" => ThreadKind::Vsock,
        "entropy" => ThreadKind::Entropy,
        "memory" => ThreadKind::Memory,
        _ => ThreadKind::Control,
    };
    let (neighbour, port) = (neighbour.parse().unwrap(), port.parse().unwrap());
    let socket = socket.clone();
    if filters {
        let filters = Filters::new(Enforcement::Refuse).unwrap();
        filters.enter(ThreadKind::Control).unwrap();
        let thread = std::thread::spawn(move || {
            filters.enter(kind).unwrap();
            attempt_all(neighbour, &socket, port);
        });
        thread.join().unwrap();
    } else {
        attempt_all(neighbour, &socket, port);
    }
}

fn attempt_all(neighbour: i64, socket: &str, port: u16) {
    let text = |text: &str| CString::new(text).unwrap();
    let call = |name: &str, number: libc::c_long, arguments: [i64; 5]| {
        // SAFETY: pointers among the arguments are those of strings that live in this function; the calls write nowhere.
        let result = unsafe {
            libc::syscall(
                number,
                arguments[0],
                arguments[1],
                arguments[2],
                arguments[3],
                arguments[4],
            )
        };
        say(
            name,
            if result < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            },
        );
    };
    let (passwd, file, sh, root) = (text("/etc/passwd"), text("/x"), text("/bin/true"), text("/"));
    let tmpfs = text("tmpfs");
    let p = |text: &CString| text.as_ptr() as i64;
    let cwd = i64::from(libc::AT_FDCWD);

    call("open", libc::SYS_openat, [cwd, p(&passwd), 0, 0, 0]);
    call(
        "create",
        libc::SYS_openat,
        [cwd, p(&file), i64::from(libc::O_CREAT | libc::O_WRONLY), 0o600, 0],
    );
    call(
        "mknod",
        libc::SYS_mknodat,
        [cwd, p(&file), i64::from(libc::S_IFCHR | 0o666), 0x101, 0],
    );
    call("chroot", libc::SYS_chroot, [p(&root), 0, 0, 0, 0]);
    call("mount", libc::SYS_mount, [p(&tmpfs), p(&root), p(&tmpfs), 0, 0]);
    call("setuid", libc::SYS_setuid, [0; 5]);
    call(
        "kill",
        libc::SYS_kill,
        [neighbour, i64::from(libc::SIGTERM), 0, 0, 0],
    );
    call(
        "ptrace",
        libc::SYS_ptrace,
        [i64::from(libc::PTRACE_SEIZE), neighbour, 0, 0, 0],
    );
    call("pidfd", libc::SYS_pidfd_open, [neighbour, 0, 0, 0, 0]);
    call("exec", libc::SYS_execve, [p(&sh), 0, 0, 0, 0]);
    call("perf", libc::SYS_perf_event_open, [0, neighbour, -1, -1, 0]);
    say("unix", UnixStream::connect(socket).map(drop));
    let abstract_name = UnixAddr::from_abstract_name(socket).unwrap();
    say("abstract", UnixStream::connect_addr(&abstract_name).map(drop));
    let tcp = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    say(
        "tcp",
        TcpStream::connect_timeout(&tcp, Duration::from_secs(5)).map(drop),
    );
    // Only the filters stand in the way of these.
    call(
        "unshare",
        libc::SYS_unshare,
        [i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0],
    );
    call("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0]);
    call(
        "socket",
        libc::SYS_socket,
        [i64::from(libc::AF_UNIX), i64::from(libc::SOCK_STREAM), 0, 0, 0],
    );
    let (read_write_execute, private) = (7, i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS));
    call(
        "executable",
        libc::SYS_mmap,
        [0, 4096, read_write_execute, private, -1],
    );
    // What must go on to work.
    say(
        "thread",
        std::thread::Builder::new()
            .spawn(|| vec![1_u8; 1 << 20].len())
            .map(|t| drop(t.join())),
    );
}

fn say(name: &str, result: io::Result<()>) {
    match result {
        Ok(()) => println!("{name} 0"),
        Err(e) => println!("{name} {}", e.raw_os_error().unwrap_or(-1)),
    }
}
