//! What can be seen of VMs from outside when a test has failed: what their VMM's files say, where the vCPUs and devices of a built-in VMM stand,
//! and what KVM counts. It changes nothing but that it pauses a VM for a moment, and that debugfs is mounted where it was not.

use std::{
    fs,
    io::{IoSlice, IoSliceMut, Read, Seek},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::Result;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

/// How long a VMM may take to answer.
const ANSWER_SECONDS: i64 = 10;

/// Of every VM of the daemon that runs in this directory, as text for people.
#[must_use]
pub fn of(run_dir: &Path) -> String {
    let mut said = String::new();
    for entry in fs::read_dir(run_dir.join("vm")).into_iter().flatten().flatten() {
        let dir = entry.path();
        said += &format!("=== VM {}\n", dir.display());
        for file in ["console.log", "vmm.log", "exit.json"] {
            let text = fs::read(dir.join(file)).unwrap_or_default();
            said += &format!("--- {file}\n{}\n", String::from_utf8_lossy(&text));
        }
        if let Err(error) = look_at_vmm(&dir.join("control.sock"), &mut said) {
            said += &format!("its VMM says no more: {error:#}\n");
        }
    }
    let counted = Command::new("sh").args(["-c", COUNTS]).output();
    said += &counted.map_or_else(
        |e| e.to_string(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    said
}

/// Threads of VMMs, and KVM's counters that are not zero.
const COUNTS: &str = "for p in $(pgrep caisson-vmm); do for t in /proc/$p/task/*; do \
    echo \"$p $(cat $t/comm) $(cut -d' ' -f3,14,15 $t/stat) $(cat $t/wchan)\"; done; done; \
    mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; grep -r . /sys/kernel/debug/kvm/ 2>/dev/null | grep -v ':0$'";

/// Adds what it learns as it learns it: a VM that has failed may not answer all of it.
fn look_at_vmm(socket: &Path, said: &mut String) -> Result<()> {
    let session = Session::open(socket)?;
    // Counters that have moved in between tell whether the guest runs.
    for _ in 0..2 {
        *said += &format!("status: {}\n", session.ask(&json!({"verb": "status"}), None)?);
        std::thread::sleep(Duration::from_secs(1));
    }
    *said += &format!("pause: {}\n", session.ask(&json!({"verb": "pause"}), None)?);
    let mut state = tempfile::tempfile()?;
    let save = json!({"verb": "save_state", "msrs": []});
    let saved = session.ask(&save, Some(state.as_raw_fd()));
    let resumed = session.ask(&json!({"verb": "resume"}), None);
    *said += &format!("save_state: {}\nresume: {}\n", saved?, resumed?);
    state.rewind()?;
    state.read_to_string(said)?;
    Ok(())
}

/// A conversation with a VMM.
struct Session(OwnedFd);

impl Session {
    fn open(path: &Path) -> Result<Self> {
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let limit = TimeVal::new(ANSWER_SECONDS, 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
        setsockopt(&fd, sockopt::SendTimeout, &limit)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        let session = Self(fd);
        session.ask(&json!({"verb": "hello", "oldest": 2, "newest": 2}), None)?;
        Ok(session)
    }

    fn ask(&self, request: &Value, file: Option<RawFd>) -> Result<Value> {
        let bytes = serde_json::to_vec(request)?;
        let files: Vec<RawFd> = file.into_iter().collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let control = if files.is_empty() { &[][..] } else { &rights[..] };
        let data = [IoSlice::new(&bytes)];
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &data, control, MsgFlags::empty(), None)?;
        let mut answer = vec![0; 64 << 10];
        let mut space = [IoSliceMut::new(&mut answer)];
        let length = recvmsg::<UnixAddr>(self.0.as_raw_fd(), &mut space, None, MsgFlags::empty())?.bytes;
        Ok(serde_json::from_slice(&answer[..length])?)
    }
}
