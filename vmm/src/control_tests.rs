//! The server against clients that keep the protocol, and such that do not.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    sync::Mutex,
};

use caisson_vmm_api::control::{DESCRIPTORS_MAX, MESSAGE_BYTES_MAX, State};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recvmsg, sendmsg, socket_with,
};

use super::*;

/// Writes down what is done to it.
#[derive(Default)]
struct Noted(Mutex<Vec<String>>);

impl Noted {
    fn note(&self, what: String) -> Result<(), Refused> {
        self.0.lock().unwrap().push(what);
        Ok(())
    }
}

impl Operations for Noted {
    fn id(&self) -> &str {
        "0a"
    }
    fn status(&self) -> Status {
        Status {
            state: State::Running,
            vcpus: 1,
            vcpus_max: 2,
            memory_mib: 64,
            disks: Vec::new(),
            nics: Vec::new(),
            pmems: Vec::new(),
            full_disks: Vec::new(),
            free_slots: 1,
            exits: Vec::new(),
        }
    }
    fn add(&self, device: Added, files: Vec<OwnedFd>) -> Result<(), Refused> {
        self.note(match device {
            Added::Disk { serial, read_only } => format!("add {serial} {} {read_only}", files.len()),
            Added::Nic { name, queues, .. } => format!("add {name} {} for {queues}", files.len()),
            Added::Pmem { name, read_only } => format!("add {name} {} {read_only}", files.len()),
        })
    }
    fn remove(&self, kind: Kind, name: &str) -> Result<(), Refused> {
        if kind != Kind::Disk {
            return self.note(format!("remove {kind:?} {name}"));
        }
        Err(Refused::new(
            Refusal::NotFound,
            format!("there is no disk {name}"),
        ))
    }
    fn save(&self, _file: OwnedFd, msrs: &[u32]) -> Result<(), Refused> {
        self.note(format!("save {msrs:?}"))
    }
    fn resize_disk(&self, serial: &str) -> Result<(), Refused> {
        self.note(format!("resize {serial}"))
    }
    fn resize(&self, what: Resize) -> Result<(), Refused> {
        self.note(format!("{what:?}"))
    }
    fn pause(&self, paused: bool) -> Result<(), Refused> {
        self.note(format!("paused {paused}"))
    }
    fn end(&self, how: Ending) -> Result<(), Refused> {
        self.note(format!("{how:?}"))
    }
}

/// A server on a thread that ends with the test's process.
struct Server {
    path: PathBuf,
    noted: &'static Noted,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let listener = socket();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 4).unwrap();
        let noted: &'static Noted = Box::leak(Box::default());
        std::thread::spawn(move || serve(listener, noted));
        Self {
            path,
            noted,
            _dir: dir,
        }
    }

    fn client(&self) -> Client {
        let socket = socket();
        connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        Client(socket)
    }

    fn greeted(&self) -> Client {
        let client = self.client();
        let hello = Request::Hello {
            oldest: OLDEST_PROTOCOL,
            newest: NEWEST_PROTOCOL + 7,
        };
        let welcome = client.ask(&hello, &[]).unwrap();
        assert!(
            matches!(&welcome, Reply::Welcome { protocol: NEWEST_PROTOCOL, id, .. } if id == "0a"),
            "{welcome:?}"
        );
        client
    }

    fn noted(&self) -> Vec<String> {
        self.noted.0.lock().unwrap().clone()
    }
}

fn socket() -> OwnedFd {
    socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap()
}

struct Client(OwnedFd);

impl Client {
    /// `None` when the server has hung up.
    fn ask(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Option<Reply> {
        self.send(&request.encode().unwrap(), files);
        self.hear()
    }

    fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(128))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    fn hear(&self) -> Option<Reply> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut none = RecvAncillaryBuffer::default();
        let received = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut none,
            RecvFlags::empty(),
        );
        let length = received.map_or(0, |received| received.bytes);
        (length > 0).then(|| Reply::decode(&bytes[..length]).unwrap())
    }
}

fn refusal(reply: Option<Reply>) -> (Refusal, String) {
    match reply {
        Some(Reply::Refused { kind, message }) => (kind, message),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn requests_reach_the_machine_and_disks_bring_their_files() {
    let server = Server::start();
    let client = server.greeted();
    let disk = Request::AddDisk {
        serial: "img-1".into(),
        read_only: true,
    };
    let file = tempfile::tempfile().unwrap();
    assert_eq!(
        client.ask(&disk, &[file.as_fd(), file.as_fd()]),
        Some(Reply::Done)
    );
    assert_eq!(
        client.ask(&Request::ResizeVcpus { count: 2 }, &[]),
        Some(Reply::Done)
    );
    assert_eq!(client.ask(&Request::Pause, &[]), Some(Reply::Done));
    assert_eq!(client.ask(&Request::Resume, &[]), Some(Reply::Done));
    assert!(matches!(
        client.ask(&Request::Status, &[]),
        Some(Reply::Status(_))
    ));
    let (kind, message) = refusal(client.ask(&Request::RemoveDisk { serial: "x".into() }, &[]));
    assert_eq!(
        (kind, message.as_str()),
        (Refusal::NotFound, "there is no disk x")
    );
    let nic = Request::AddNic {
        name: "eth1".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        queues: 2,
    };
    let four = [file.as_fd(), file.as_fd(), file.as_fd(), file.as_fd()];
    assert_eq!(client.ask(&nic, &four), Some(Reply::Done));
    for too_few in [&four[..1], &[]] {
        assert_eq!(refusal(client.ask(&nic, too_few)).0, Refusal::Invalid);
    }
    let pmem = Request::AddPmem {
        name: "p".into(),
        read_only: true,
    };
    assert_eq!(client.ask(&pmem, &four[..1]), Some(Reply::Done));
    let gone = [
        Request::RemoveNic { name: "eth1".into() },
        Request::RemovePmem { name: "p".into() },
        Request::Shutdown { port: 7 },
    ];
    for request in &gone {
        assert_eq!(client.ask(request, &[]), Some(Reply::Done));
    }
    let save = Request::SaveState { msrs: vec![1] };
    assert_eq!(refusal(client.ask(&save, &four[..2])).0, Refusal::Invalid);
    assert_eq!(client.ask(&save, &four[..1]), Some(Reply::Done));
    assert_eq!(client.ask(&Request::Kill, &[]), Some(Reply::Done));
    // The next answer comes after the end of the one before.
    drop(client.ask(&Request::Status, &[]));
    assert_eq!(
        server.noted(),
        [
            "add img-1 2 true",
            "Vcpus(2)",
            "paused true",
            "paused false",
            "add eth1 4 for 2",
            "add p 1 true",
            "remove Nic eth1",
            "remove Pmem p",
            "ByTheGuest(7)",
            "save [1]",
            "Now"
        ]
    );
}

#[test]
fn nothing_is_done_for_a_client_that_has_not_agreed_on_a_version() {
    let server = Server::start();
    let (kind, _) = refusal(server.client().ask(&Request::Kill, &[]));
    assert_eq!(kind, Refusal::Invalid);
    let client = server.client();
    let future = Request::Hello {
        oldest: NEWEST_PROTOCOL + 1,
        newest: NEWEST_PROTOCOL + 2,
    };
    assert_eq!(refusal(client.ask(&future, &[])).0, Refusal::Version);
    assert_eq!(client.hear(), None, "and the connection ends");
    assert!(server.noted().is_empty());
}

#[test]
fn nonsense_is_refused_and_an_oversized_packet_ends_the_connection_only() {
    let server = Server::start();
    let client = server.greeted();
    client.send(b"{\"verb\":\"format_host\"}", &[]);
    assert_eq!(refusal(client.hear()).0, Refusal::Invalid);
    let file = tempfile::tempfile().unwrap();
    assert_eq!(
        refusal(client.ask(&Request::Pause, &[file.as_fd()])).0,
        Refusal::Invalid
    );
    let no_file = Request::AddDisk {
        serial: "a".into(),
        read_only: false,
    };
    assert_eq!(refusal(client.ask(&no_file, &[])).0, Refusal::Invalid);
    client.send(&vec![b' '; MESSAGE_BYTES_MAX + 1], &[]);
    assert_eq!(client.hear(), None);
    let client = server.greeted();
    client.send(
        &Request::Pause.encode().unwrap(),
        &vec![file.as_fd(); DESCRIPTORS_MAX + 1],
    );
    assert_eq!(client.hear(), None, "more descriptors than any request has");
    drop(server.greeted());
    assert!(server.noted().is_empty());
}
