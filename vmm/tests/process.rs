//! The whole process, filters and all, with a guest of three instructions: what the control protocol does to a VM that runs. Where KVM cannot run
//! it, the test says so and is skipped.

#![expect(unsafe_code, reason = "a tap is attached by an ioctl that no library wraps")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use caisson_vmm_api::{
    control::{MESSAGE_BYTES_MAX, NEWEST_PROTOCOL, Refusal, Reply, Request, STATE_VERSION, State, Status},
    exit::{Cause, ExitRecord},
    spec::{Boot, Confinement, Descriptor, Memory, Vcpus, VmSpec, Vsock},
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recvmsg, sendmsg, socket_with, sockopt,
};

/// Nothing takes longer, however slow the machine.
const LIMIT: Duration = Duration::from_secs(60);
static STARTING: Mutex<()> = Mutex::new(());
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// An ELF file whose guest writes to a port for ever.
fn kernel() -> File {
    // mov edx, 0x80; again: out dx, al; jmp again
    const CODE: [u8; 8] = [0xba, 0x80, 0, 0, 0, 0xee, 0xeb, 0xfd];
    const PLACE: u64 = 0x100_0000;
    let mut bytes = vec![0; 0x1000];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes[24..32].copy_from_slice(&PLACE.to_le_bytes());
    (bytes[32], bytes[54], bytes[56], bytes[64]) = (64, 56, 1, 1);
    bytes[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
    bytes[88..96].copy_from_slice(&PLACE.to_le_bytes());
    for at in [96, 104] {
        bytes[at..at + 8].copy_from_slice(&(CODE.len() as u64).to_le_bytes());
    }
    bytes.extend(CODE);
    file_of(&bytes)
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

struct Vmm {
    process: Child,
    dir: tempfile::TempDir,
    record: File,
    log: File,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Descriptors that the process shall inherit, under the numbers that they have.
#[derive(Default)]
struct Passed(Vec<OwnedFd>);

impl Passed {
    fn pass(&mut self, file: impl Into<OwnedFd>) -> Descriptor {
        let file = file.into();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        let number = Descriptor(file.as_raw_fd());
        self.0.push(file);
        number
    }
}

impl Vmm {
    fn start(kvm: File) -> Self {
        // What one process shall inherit, another that is started meanwhile would have as well.
        let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let (record, log) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let control = socket();
        bind(
            &control,
            &SocketAddrUnix::new(dir.path().join("control")).unwrap(),
        )
        .unwrap();
        listen(&control, 4).unwrap();
        let vsock = UnixListener::bind(dir.path().join("vsock")).unwrap();
        let (hears, tells) = rustix::pipe::pipe().unwrap();
        let mut passed = Passed::default();
        let spec = VmSpec {
            id: "process-test".into(),
            kvm: passed.pass(kvm),
            boot: Boot {
                kernel: passed.pass(kernel()),
                initramfs: passed.pass(file_of(&[0; 512])),
                cmdline: String::new(),
            },
            vcpus: Vcpus { boot: 1, max: 2 },
            memory: Memory {
                boot_mib: 32,
                max_mib: 64,
                huge_pages: false,
            },
            console: passed.pass(tempfile::tempfile().unwrap()),
            vsock: Vsock {
                cid: 3,
                listener: passed.pass(vsock),
            },
            disks: Vec::new(),
            nics: Vec::new(),
            attach_slots: 3,
            control: passed.pass(control),
            exit_record: passed.pass(record.try_clone().unwrap()),
            started: passed.pass(tells),
            confinement: Confinement {
                user: None,
                namespaces: false,
            },
        };
        let spec = passed.pass(file_of(&spec.encode().unwrap()));
        let process = Command::new(env!("CARGO_BIN_EXE_caisson-vmm"))
            .args(["--spec-fd", &spec.0.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log.try_clone().unwrap())
            .spawn()
            .unwrap();
        drop(passed);
        let mut vmm = Self {
            process,
            dir,
            record,
            log,
        };
        let mut said = String::new();
        File::from(hears).read_to_string(&mut said).unwrap();
        assert!(said.ends_with("running\n"), "{said}{}", vmm.said());
        vmm
    }

    fn said(&mut self) -> String {
        let mut text = String::new();
        self.log.rewind().unwrap();
        self.log.read_to_string(&mut text).unwrap();
        text
    }

    fn client(&self) -> Client {
        let socket = socket();
        connect(
            &socket,
            &SocketAddrUnix::new(self.dir.path().join("control")).unwrap(),
        )
        .unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LIMIT)).unwrap();
        let client = Client(socket);
        let hello = Request::Hello {
            oldest: 1,
            newest: NEWEST_PROTOCOL,
        };
        assert!(matches!(client.ask(&hello, &[]), Reply::Welcome { .. }));
        client
    }
}

struct Client(OwnedFd);

impl Client {
    fn ask(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Reply {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
        }
        let bytes = request.encode().unwrap();
        sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut none = RecvAncillaryBuffer::default();
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(&self.0, &mut buffers, &mut none, RecvFlags::empty()).unwrap();
        Reply::decode(&bytes[..received.bytes]).unwrap()
    }

    fn does(&self, request: &Request, files: &[BorrowedFd<'_>]) {
        assert_eq!(self.ask(request, files), Reply::Done, "{request:?}");
    }

    fn refuses(&self, request: &Request, files: &[BorrowedFd<'_>]) -> (Refusal, String) {
        match self.ask(request, files) {
            Reply::Refused { kind, message } => (kind, message),
            other => panic!("{request:?}: {other:?}"),
        }
    }

    fn status(&self) -> Status {
        match self.ask(&Request::Status, &[]) {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// How often the guest has written to its port.
    fn writes(&self) -> u64 {
        let exits = self.status().exits;
        exits
            .iter()
            .filter(|(name, _)| name.contains("write"))
            .map(|(_, count)| count)
            .sum()
    }

    fn wait_for_writes_beyond(&self, seen: u64) {
        let began = Instant::now();
        while self.writes() <= seen {
            assert!(began.elapsed() < LIMIT, "the guest does nothing");
        }
    }
}

fn start() -> Option<Vmm> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => Some(Vmm::start(kvm)),
        Err(e) => {
            eprintln!("SKIPPED: no guest can run here: /dev/kvm cannot be opened: {e}");
            None
        }
    }
}

/// A tap in a network namespace of this thread's own; nothing, said aloud, where that is not allowed.
fn tap() -> Option<File> {
    if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        eprintln!("SKIPPED: no network namespace of one's own: {e}");
        return None;
    }
    let file = File::options()
        .read(true)
        .write(true)
        .open(Path::new("/dev/net/tun"))
        .unwrap();
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
        },
    };
    request.ifr_name[0] = b't' as libc::c_char;
    // SAFETY: the request reads and writes one ifreq.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
    Some(file)
}

#[test]
fn a_paused_vm_stands_still_is_saved_and_goes_on() {
    let Some(vmm) = start() else { return };
    let client = vmm.client();
    client.wait_for_writes_beyond(0);
    let file = tempfile::tempfile().unwrap();
    let save = Request::SaveState { msrs: vec![0x10] };
    assert_eq!(
        client.refuses(&save, &[file.as_fd()]).0,
        Refusal::Invalid,
        "it runs"
    );
    let mut before = 0;
    for round in 0..3 {
        client.does(&Request::Pause, &[]);
        client.does(&Request::Pause, &[]);
        assert_eq!(client.status().state, State::Paused);
        let writes = client.writes();
        assert!(writes > before);
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        assert_eq!(
            client.refuses(&save, &[pipe.as_fd()]).0,
            Refusal::Invalid,
            "a pipe"
        );
        client.does(&save, &[file.as_fd()]);
        let mut text = String::new();
        let mut copy = &file;
        copy.rewind().unwrap();
        copy.read_to_string(&mut text).unwrap();
        copy.rewind().unwrap();
        let state: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(state["version"], STATE_VERSION);
        assert_eq!(state["machine"]["cpus"].as_array().unwrap().len(), 1);
        let kinds: Vec<_> = state["functions"].as_array().unwrap().iter().collect();
        let kinds: Vec<_> = kinds
            .iter()
            .map(|function| function["state"]["kind"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["vsock", "rng", "balloon", "mem"], "round {round}");
        assert_eq!(client.writes(), writes, "nothing happens meanwhile");
        client.does(&Request::Resume, &[]);
        client.does(&Request::Resume, &[]);
        client.wait_for_writes_beyond(writes);
        before = writes;
    }
    let unknown = Request::SaveState {
        msrs: vec![0xdead_beef],
    };
    client.does(&Request::Pause, &[]);
    let (kind, message) = client.refuses(&unknown, &[file.as_fd()]);
    assert!(
        kind == Refusal::Failed && message.contains("0xdeadbeef"),
        "{message}"
    );
}

#[test]
fn disks_nics_and_persistent_memory_come_and_go_while_the_guest_runs() {
    let Some(mut vmm) = start() else { return };
    let Some(tap) = tap() else { return };
    let client = vmm.client();
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 << 20).unwrap();
    let file = file.as_fd();
    let disk = Request::AddDisk {
        serial: "d".into(),
        read_only: false,
    };
    let nic = Request::AddNic {
        name: "n".into(),
        mac: MAC,
        mtu: 1500,
        queues: 1,
    };
    let pmem = Request::AddPmem {
        name: "p".into(),
        read_only: true,
    };
    let [no_disk, no_nic, no_pmem] = [
        Request::RemoveDisk { serial: "d".into() },
        Request::RemoveNic { name: "n".into() },
        Request::RemovePmem { name: "p".into() },
    ];
    for _ in 0..3 {
        client.does(&disk, &[file]);
        client.does(&nic, &[tap.as_fd()]);
        client.does(&pmem, &[file]);
        let status = client.status();
        assert_eq!(
            (status.disks, status.nics, status.pmems),
            (vec!["d".into()], vec!["n".into()], vec!["p".into()])
        );
        assert_eq!(status.free_slots, 0);
        let more = Request::AddPmem {
            name: "q".into(),
            read_only: true,
        };
        assert_eq!(client.refuses(&more, &[file]).0, Refusal::NoSlot);
        assert_eq!(client.refuses(&nic, &[tap.as_fd()]).0, Refusal::Exists);
        // They are in the state, and leave while the VM stands still as well.
        client.does(&Request::Pause, &[]);
        let state = tempfile::tempfile().unwrap();
        client.does(&Request::SaveState { msrs: Vec::new() }, &[state.as_fd()]);
        client.does(&no_pmem, &[]);
        client.does(&Request::Resume, &[]);
        client.does(&no_nic, &[]);
        client.does(&no_disk, &[]);
        assert_eq!(client.refuses(&no_nic, &[]).0, Refusal::NotFound);
        assert_eq!(client.status().free_slots, 3);
        client.wait_for_writes_beyond(client.writes());
    }
    let odd = tempfile::tempfile().unwrap();
    odd.set_len(4096).unwrap();
    let (kind, message) = client.refuses(&pmem, &[odd.as_fd()]);
    assert!(
        kind == Refusal::Failed && message.contains("multiples"),
        "{message}"
    );
    let (kind, message) = client.refuses(&nic, &[file]);
    assert!(kind == Refusal::Failed && message.contains("tap"), "{message}");
    assert_eq!(client.status().free_slots, 3);
    assert_eq!(vmm.said(), "", "nothing to complain about");
}

#[test]
fn a_guest_that_does_not_listen_is_not_waited_for_and_a_hard_stop_ends_it_with_a_record() {
    let Some(mut vmm) = start() else { return };
    let client = vmm.client();
    let (kind, message) = client.refuses(&Request::Shutdown { port: 1020 }, &[]);
    assert!(
        kind == Refusal::Busy && message.contains("did not answer"),
        "{message}"
    );
    client.does(&Request::Pause, &[]);
    assert_eq!(
        client.refuses(&Request::Shutdown { port: 1020 }, &[]).0,
        Refusal::Invalid
    );
    client.does(&Request::Kill, &[]);
    assert!(vmm.process.wait().unwrap().success());
    let mut bytes = Vec::new();
    vmm.record.rewind().unwrap();
    vmm.record.read_to_end(&mut bytes).unwrap();
    assert_eq!(ExitRecord::decode(&bytes).unwrap().cause, Cause::Killed);
}
