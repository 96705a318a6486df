//! For tests: behaves as a VMM towards whoever starts it, or misbehaves as one word of the kernel's command line says.
//!
//! `fake.die` ends before it says anything; `fake.fail` leaves an exit record and ends; `fake.mute` says nothing; `fake.babble` says nonsense;
//! `fake.fork` goes on in a child; `fake.deaf` never answers on the control socket; `fake.refuse` refuses every disk. A disk
//! whose serial begins with `full` waits for space from its start to its end.

#![expect(
    unsafe_code,
    reason = "descriptors are taken over by number, and one mode forks"
)]
#![expect(clippy::unwrap_used, reason = "a program of tests fails like a test")]

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::fd::{FromRawFd, OwnedFd},
    process::exit,
};

use caisson_vmm_api::{
    control::{MESSAGE_BYTES_MAX, Refusal, Reply, Request, State, Status},
    exit::{Cause, ExitRecord},
    spec::{Descriptor, Started, VmSpec},
};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, accept_with, recvmsg,
    sendmsg,
};

const FULL: &str = "full";

fn own(descriptor: Descriptor) -> OwnedFd {
    // SAFETY: inherited for this process to own, and taken once.
    unsafe { OwnedFd::from_raw_fd(descriptor.0) }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("caisson-vmm 0.0.0-fake");
        return;
    }
    let mut file = File::from(own(Descriptor(arguments[1].parse().unwrap())));
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let spec = VmSpec::decode(&bytes).unwrap();
    let mode = spec
        .boot
        .cmdline
        .split(' ')
        .find_map(|word| word.strip_prefix("fake."));
    let mode = mode.unwrap_or_default().to_owned();
    let mut started = File::from(own(spec.started));
    match mode.as_str() {
        "die" => {
            eprintln!("nobody knows why");
            exit(3);
        }
        "fail" => fail(&spec),
        "huge" if !spec.memory.huge_pages => exit(4),
        "mute" => sleep(),
        "babble" => {
            started.write_all(b"hello?\n").unwrap();
            sleep();
        }
        "fork" => {
            let (mut told, tells) = std::io::pipe().unwrap();
            // SAFETY: one thread; the child shares nothing that is being changed.
            let pid =
                unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) };
            if pid > 0 {
                let line = Started::Process(i32::try_from(pid).unwrap()).line();
                started.write_all(line.as_bytes()).unwrap();
                exit(0);
            }
            // Goes on when the other has told of it and ended.
            drop(tells);
            told.read_to_end(&mut Vec::new()).unwrap();
        }
        _ => {}
    }
    if mode != "fork" {
        let pid = std::process::id().cast_signed();
        started
            .write_all(Started::Process(pid).line().as_bytes())
            .unwrap();
    }
    started.write_all(Started::Running.line().as_bytes()).unwrap();
    drop(started);
    serve(&spec, &mode);
}

fn fail(spec: &VmSpec) {
    let record = ExitRecord {
        cause: Cause::Failure {
            message: "KVM refuses to set MSR 0x10a".into(),
        },
        ran_ms: 0,
        exits: Vec::new(),
    };
    let mut file = File::from(own(spec.exit_record));
    file.write_all(&record.encode().unwrap()).unwrap();
    exit(1);
}

fn sleep() {
    loop {
        std::thread::park();
    }
}

fn serve(spec: &VmSpec, mode: &str) {
    let listener = own(spec.control);
    let mut disks: Vec<String> = Vec::new();
    if mode == "deaf" {
        sleep();
    }
    loop {
        let client = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
        loop {
            let mut bytes = vec![0; MESSAGE_BYTES_MAX];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &client,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::empty(),
            );
            let Ok(received) = received else { break };
            if received.bytes == 0 {
                break;
            }
            let reply = answer(
                Request::decode(&bytes[..received.bytes]).unwrap(),
                mode,
                &mut disks,
            );
            let mut none = SendAncillaryBuffer::default();
            let bytes = reply.encode().unwrap();
            sendmsg(&client, &[IoSlice::new(&bytes)], &mut none, SendFlags::NOSIGNAL).unwrap();
        }
    }
}

fn answer(request: Request, mode: &str, disks: &mut Vec<String>) -> Reply {
    match request {
        Request::Hello { newest, .. } => Reply::Welcome {
            protocol: newest,
            vmm: "fake".into(),
            id: "fake".into(),
        },
        Request::AddDisk { .. } if mode == "refuse" => Reply::Refused {
            kind: Refusal::Failed,
            message: "cannot attach it: no addresses are left".into(),
        },
        Request::AddDisk { serial, .. } => {
            if serial.starts_with(FULL) {
                eprintln!("no space on the host for disk {serial}");
            }
            disks.push(serial);
            Reply::Done
        }
        Request::RemoveDisk { serial } => {
            disks.retain(|held| *held != serial);
            Reply::Done
        }
        Request::Status => Reply::Status(Status {
            state: State::Running,
            vcpus: 1,
            vcpus_max: 1,
            memory_mib: 64,
            disks: disks.clone(),
            nics: Vec::new(),
            pmems: Vec::new(),
            full_disks: disks
                .iter()
                .filter(|serial| serial.starts_with(FULL))
                .cloned()
                .collect(),
            free_slots: 3,
            exits: Vec::new(),
        }),
        _ => Reply::Done,
    }
}
