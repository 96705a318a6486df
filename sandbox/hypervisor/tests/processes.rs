//! Real processes: started detached, watched, found again by their environment, and killed.

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use caisson_hypervisor::{DetachedCommand, Ended, HypervisorError, ProcessRef, ProcessRole, process::sweep};

const LIMIT: Duration = Duration::from_secs(20);

fn unique_id(word: &str) -> String {
    format!("{word}-{}-{:?}", std::process::id(), std::thread::current().id()).replace(['(', ')'], "")
}

fn shell(owner: &str, script: &str, dir: &Path) -> DetachedCommand {
    let mut command =
        DetachedCommand::new(ProcessRole::Vmm, owner, PathBuf::from("/bin/sh"), dir.join("log"));
    command.args = vec!["-c".into(), script.into()];
    command
}

async fn log_when(dir: &Path, ready: impl Fn(&str) -> bool) -> String {
    let until = Instant::now() + LIMIT;
    loop {
        let text = fs::read_to_string(dir.join("log")).unwrap_or_default();
        if ready(&text) {
            return text;
        }
        assert!(Instant::now() < until, "the log never got there: {text:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_detached_process_gets_only_what_was_listed() {
    let dir = tempfile::tempdir().unwrap();
    let id = unique_id("env");
    let passed = OwnedFd::from(fs::File::create(dir.path().join("passed")).unwrap());
    let kept_back = fs::File::create(dir.path().join("kept-back")).unwrap();
    // Without this, the descriptor would be closed on exec anyway.
    rustix::io::fcntl_setfd(&kept_back, rustix::io::FdFlags::empty()).unwrap();
    let number = passed.as_raw_fd();
    // By the shell itself: while it starts another program, its signals are blocked.
    let script = "env; for fd in /proc/$$/fd/*; do echo fd ${fd##*/}; readlink $fd; done; cut -d' ' -f6 /proc/$$/stat; echo pid $$; \
                  while read -r key value; do case $key in SigBlk:|SigIgn:|NoNewPrivs:|CapBnd:) echo \"$key $value\";; esac; done </proc/$$/status; \
                  echo done";
    let mut command = shell(&id, script, dir.path());
    command.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    command.fds = vec![passed];
    command.confined = true;
    let process = command.spawn().unwrap();
    let text = log_when(dir.path(), |text| text.ends_with("done\n")).await;
    assert_eq!(process.wait().await.unwrap(), Ended::Exited(0));

    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.contains(&format!("CAISSON_VM_ID={id}").as_str()), "{text}");
    assert!(!text.contains("CARGO"), "the environment was inherited: {text}");
    let fds: Vec<i32> = lines
        .iter()
        .filter_map(|l| l.strip_prefix("fd "))
        .filter_map(|n| n.parse().ok())
        .collect();
    assert!(fds.contains(&number), "{text}");
    // By its file: the shell itself may use the same number while it lists the others.
    assert!(!text.contains("/kept-back"), "{text}");
    let pid = process.reference().pid.to_string();
    assert!(
        lines.contains(&pid.as_str()),
        "not the leader of its own session: {text}"
    );
    assert!(text.contains("SigBlk: 0000000000000000"), "{text}");
    assert!(text.contains("SigIgn: 0000000000000000"), "{text}");
    assert!(text.contains("NoNewPrivs: 1"), "{text}");
    if rustix::process::geteuid().is_root() {
        assert!(text.contains("CapBnd: 0000000000000000"), "{text}");
    }
}

#[tokio::test]
async fn an_ended_child_is_reaped_although_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let process = shell(&unique_id("reap"), "exit 3", dir.path()).spawn().unwrap();
    let pid = process.reference().pid;
    let until = Instant::now() + LIMIT;
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < until, "zombie {pid} is left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(process.wait().await.unwrap(), Ended::Exited(3));
    assert_eq!(
        process.wait().await.unwrap(),
        Ended::Exited(3),
        "a second wait answers the same"
    );
}

#[tokio::test]
async fn many_waiters_hear_of_a_kill_and_a_cancelled_wait_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let process = shell(&unique_id("kill"), "exec sleep 1000", dir.path())
        .spawn()
        .unwrap();
    assert!(
        tokio::time::timeout(Duration::from_millis(20), process.wait())
            .await
            .is_err()
    );
    assert!(process.reference().is_alive());
    let waiters: Vec<_> = (0..4)
        .map(|_| {
            let process = process.clone();
            tokio::spawn(async move { process.wait().await.unwrap() })
        })
        .collect();
    assert_eq!(process.kill(LIMIT).await.unwrap(), Ended::Signaled(9));
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), Ended::Signaled(9));
    }
    assert!(!process.reference().is_alive());
    assert_eq!(
        process.kill(LIMIT).await.unwrap(),
        Ended::Signaled(9),
        "killing again is fine"
    );
}

#[tokio::test]
async fn a_stopped_process_dies_of_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let process = shell(&unique_id("stop"), "kill -STOP $$", dir.path())
        .spawn()
        .unwrap();
    assert_eq!(process.kill(LIMIT).await.unwrap(), Ended::Signaled(9));
}

#[tokio::test]
async fn a_process_is_found_again_by_its_reference() {
    let dir = tempfile::tempdir().unwrap();
    let spawned = shell(&unique_id("again"), "exec sleep 1000", dir.path())
        .spawn()
        .unwrap();
    let reference = spawned.reference().clone();
    drop(spawned);
    assert_eq!(
        reference,
        ProcessRef::of(ProcessRole::Vmm, reference.pid).unwrap()
    );
    let adopted = reference.open().unwrap().expect("it lives");
    adopted.kill(LIMIT).await.unwrap();
    assert!(!reference.is_alive());
}

#[tokio::test]
async fn sweeping_kills_every_process_with_the_id_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let id = unique_id("sweep");
    let longer = format!("{id}x");
    // The second process of the first command is its child, which nobody holds.
    let family = shell(&id, "sleep 1000 & echo ready; wait", dir.path())
        .spawn()
        .unwrap();
    let other_dir = tempfile::tempdir().unwrap();
    let other = shell(&longer, "exec sleep 1000", other_dir.path())
        .spawn()
        .unwrap();
    log_when(dir.path(), |text| text.contains("ready")).await;

    assert_eq!(sweep(&id, LIMIT).await.unwrap(), 2);
    assert!(!family.reference().is_alive());
    assert!(
        other.reference().is_alive(),
        "an id that merely begins like it was hit"
    );
    assert_eq!(sweep(&id, LIMIT).await.unwrap(), 0);
    other.kill(LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_missing_program_is_named_and_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let id = unique_id("missing");
    let program = PathBuf::from("/nonexistent/vmm");
    let error = DetachedCommand::new(ProcessRole::Vmm, &id, program, dir.path().join("log"))
        .spawn()
        .unwrap_err();
    assert!(matches!(error, HypervisorError::Start { .. }), "{error}");
    assert!(
        error
            .to_string()
            .starts_with("cannot start /nonexistent/vmm: No such file"),
        "{error}"
    );
    assert_eq!(sweep(&id, LIMIT).await.unwrap(), 0);
}

#[tokio::test]
async fn another_user_and_own_namespaces_take_effect() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: changing the user needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = shell(
        &unique_id("user"),
        "id -u; id -G; readlink /proc/self/ns/net; ulimit -c; grep CapEff /proc/self/status; echo done",
        dir.path(),
    );
    command.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
    command.credentials = Some(caisson_hypervisor::Credentials {
        uid: 54321,
        gid: 54322,
        groups: vec![54323],
    });
    command.unshare = libc::CLONE_NEWNET | libc::CLONE_NEWIPC;
    command.rlimits = vec![(libc::RLIMIT_CORE, 0)];
    command.confined = true;
    let process = command.spawn().unwrap();
    let text = log_when(dir.path(), |text| text.ends_with("done\n")).await;
    process.wait().await.unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(&lines[..2], ["54321", "54322 54323"]);
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(Path::new(lines[2]), own);
    assert_eq!(lines[3], "0");
    assert!(lines[4].ends_with("0000000000000000"), "{text}");
}

#[tokio::test]
async fn a_program_below_a_directory_for_root_alone_starts_for_another_user_by_its_descriptor() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: changing the user needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(dir.path(), mode).unwrap();
    let program = dir.path().join("cat");
    fs::copy("/bin/cat", &program).unwrap();
    let command = |file| {
        let mut command = DetachedCommand::new(
            ProcessRole::Vsock,
            &unique_id("handed"),
            program.clone(),
            dir.path().join("log"),
        );
        command.args = vec!["/proc/self/status".into(), "/proc/self/cmdline".into()];
        command.confined = true;
        command.program_file = file;
        command.credentials = Some(caisson_hypervisor::Credentials {
            uid: 54321,
            gid: 54321,
            groups: Vec::new(),
        });
        command
    };
    let error = command(None).spawn().unwrap_err().to_string();
    assert!(error.contains("Permission denied"), "{error}");
    let file = OwnedFd::from(fs::File::open(&program).unwrap());
    let process = command(Some(file)).spawn().unwrap();
    assert_eq!(process.wait().await.unwrap(), Ended::Exited(0));
    let text = log_when(dir.path(), |text| text.ends_with('\0')).await;
    assert!(text.contains("Uid:\t54321\t54321\t54321\t54321"), "{text}");
    // People find the program by its name.
    assert!(
        text.contains(&format!("{}\0/proc/self/status\0", program.display())),
        "{text}"
    );
}
