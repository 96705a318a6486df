//! What a converter can still do, seen from outside.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::{path::PathBuf, process::Command};

/// The example, which cargo builds with the tests.
fn intruder() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe
        .parent()
        .and_then(std::path::Path::parent)
        .unwrap()
        .join("examples/intruder");
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

#[test]
fn a_process_that_was_taken_over_gets_nowhere() {
    let output = Command::new(intruder()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for what in [
        "open",
        "create",
        "look",
        "connect",
        "execute",
        "duplicate",
        "signal",
        "thread",
        "memory",
    ] {
        assert!(said.contains(&format!("{what}: refused\n")), "{what}: {said}");
    }
    let field = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(field("CapPrm"), ["0000000000000000"]);
    assert_eq!(field("Seccomp:"), ["2"]);
    assert_eq!(field("NoNewPrivs"), ["1"]);
    if rustix::process::geteuid().is_root() {
        assert_eq!(field("CapBnd"), ["0000000000000000"]);
        assert_eq!(field("Uid"), ["65534"; 4]);
        assert_eq!(field("Groups"), Vec::<String>::new());
    } else {
        eprintln!("skipped: only root changes to another user");
    }
}
