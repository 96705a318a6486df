//! A converter that was taken over: confines itself as the converter does, tries to get out, and says how far it got.

#![expect(clippy::unwrap_used, reason = "a program of tests fails like a test")]

use std::{fs::File, io, net::TcpStream, os::unix::fs::FileExt, process::Command};

use caisson_layer_converter::confinement::{Needs, confine};

fn main() {
    let before = File::open("/proc/self/status").unwrap();
    let parent = rustix::process::getppid().unwrap_or(rustix::process::Pid::INIT);
    let needs = Needs {
        memory_bytes: 256 << 20,
        file_bytes: 1 << 20,
    };
    confine(needs).unwrap();
    let attempts: [(&str, io::Result<()>); 8] = [
        ("open", File::open("/etc/passwd").map(drop)),
        ("create", File::create("/tmp/caisson-intruder").map(drop)),
        ("look", std::fs::metadata("/etc/passwd").map(drop)),
        ("connect", TcpStream::connect("127.0.0.1:1").map(drop)),
        ("execute", Command::new("/bin/true").status().map(drop)),
        ("duplicate", before.try_clone().map(drop)),
        (
            "signal",
            rustix::process::kill_process(parent, rustix::process::Signal::TERM).map_err(Into::into),
        ),
        ("thread", std::thread::Builder::new().spawn(|| ()).map(drop)),
    ];
    for (what, outcome) in attempts {
        println!("{what}: {}", if outcome.is_ok() { "possible" } else { "refused" });
    }
    // What it was given goes on working.
    let mut status = [0; 4096];
    let length = before.read_at(&mut status, 0).unwrap();
    let status = String::from_utf8_lossy(&status[..length]).into_owned();
    for line in status.lines() {
        if ["CapPrm", "CapBnd", "Uid", "Seccomp:", "NoNewPrivs", "Groups"]
            .iter()
            .any(|name| line.starts_with(name))
        {
            println!("{line}");
        }
    }
    let mut hoard = Vec::<u8>::new();
    let memory = hoard.try_reserve(512 << 20);
    println!("memory: {}", if memory.is_ok() { "possible" } else { "refused" });
}
