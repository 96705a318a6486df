//! What can be seen of VMs from outside when a test has failed: what their VMM's files say, where the vCPUs and devices of a built-in VMM stand,
//! and what KVM counts. It changes nothing but that it pauses a VM for a moment, and that debugfs is mounted where it was not.

use std::{
    collections::HashMap,
    fs,
    io::{IoSlice, IoSliceMut, Read, Seek},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
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

/// Tells on standard output of each VM that lives longer than its tests need it: one that answers no more is looked at while it is still there.
#[derive(Debug)]
pub struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Over the VMs of the daemon that runs in this directory, until it is dropped.
    #[must_use]
    pub fn start(run_dir: PathBuf, age: Duration) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let mut seen: HashMap<PathBuf, Option<Instant>> = HashMap::new();
            while stopped.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
                let vms = fs::read_dir(run_dir.join("vm")).into_iter().flatten().flatten();
                let vms: Vec<PathBuf> = vms.map(|vm| vm.path()).collect();
                seen.retain(|vm, _| vms.contains(vm));
                for vm in vms {
                    let since = seen.entry(vm.clone()).or_insert_with(|| Some(Instant::now()));
                    if since.is_some_and(|since| since.elapsed() > age) {
                        *since = None;
                        println!("{}", in_short(&vm));
                    }
                }
            }
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        // A thread that has panicked has said so.
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Where the vCPUs and the queues of a VM stand, on a few lines.
fn in_short(vm: &Path) -> String {
    let mut said = format!("=== an old VM: {}\n", vm.display());
    for file in ["console.log", "vmm.log"] {
        let text = fs::read(vm.join(file)).unwrap_or_default();
        said += &String::from_utf8_lossy(&text);
    }
    let mut all = String::new();
    let outcome = look_at_vmm(&vm.join("control.sock"), &mut all);
    let (words, state) = all.split_once("\n{").unwrap_or((&all, ""));
    said += words;
    if let Err(error) = outcome {
        said += &format!("its VMM says no more: {error:#}\n");
    }
    let Ok(state) = serde_json::from_str::<Value>(&format!("{{{state}")) else {
        return said;
    };
    for cpu in state["machine"]["cpus"].as_array().into_iter().flatten() {
        said += &cpu_in_short(cpu);
    }
    for function in state["functions"].as_array().into_iter().flatten() {
        said += &function_in_short(&function["state"]);
    }
    said
}

/// struct kvm_regs: sixteen general registers, rip, rflags. The local APIC: bits of what is served at 0x100, of what waits at 0x200.
fn cpu_in_short(cpu: &Value) -> String {
    let (registers, lapic) = (bytes(&cpu["registers"]), bytes(&cpu["lapic"]));
    let bits = |from: usize| -> String {
        let words = (0..8).map(|word| word_at(&lapic, from + 16 * word, 4));
        words.map(|word| format!("{word:08x} ")).collect()
    };
    let mut said = format!(
        "\ncpu mode {} rip {:x} flags {:x} rsp {:x} served {}waiting {}priority {:x} timer {:x} {:x} events {}",
        cpu["mode"][0],
        word_at(&registers, 128, 8),
        word_at(&registers, 136, 8),
        word_at(&registers, 48, 8),
        bits(0x100),
        bits(0x200),
        word_at(&lapic, 0x80, 4),
        word_at(&lapic, 0x320, 4),
        word_at(&lapic, 0x390, 4),
        cpu["events"],
    );
    for msr in cpu["msrs"].as_array().into_iter().flatten().map(bytes) {
        // The time stamp counter and its deadline.
        if [0x10, 0x6e0].contains(&word_at(&msr, 0, 4)) {
            said += &format!(" msr {:x} {:x}", word_at(&msr, 0, 4), word_at(&msr, 8, 8));
        }
    }
    said
}

fn function_in_short(state: &Value) -> String {
    let queues = state["transport"]["queues"].as_array().into_iter().flatten();
    let queues = queues.map(|queue| format!("{}/{} ", queue["next_available"], queue["next_used"]));
    format!(
        "\n{} status {} queues {}vectors {}",
        state["kind"],
        state["transport"]["status"],
        queues.collect::<String>(),
        state["vectors"]
    )
}

/// A structure of KVM's, which the state has as a list of numbers.
fn bytes(list: &Value) -> Vec<u8> {
    let bytes = list.as_array().into_iter().flatten();
    bytes
        .map(|byte| byte.as_u64().unwrap_or_default() as u8)
        .collect()
}

/// A number of so many bytes, little-endian; zero where there is none.
fn word_at(bytes: &[u8], at: usize, length: usize) -> u64 {
    let bytes = bytes.get(at..at + length).unwrap_or_default();
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
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
