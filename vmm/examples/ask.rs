//! Asks a running `caisson-vmm` one thing: `ask CONTROL-SOCKET REQUEST [FILE...]` prints its reply, JSON as the request is, for instance
//! `ask control.sock '{"verb":"save_state","msrs":[]}' state.json`. The files go along, opened to be read and written, and made if they are not there.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a tool for developers")]

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
};

use caisson_vmm_api::control::{MESSAGE_BYTES_MAX, NEWEST_PROTOCOL, OLDEST_PROTOCOL, Reply, Request};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketType, connect, recvmsg, sendmsg, socket,
};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, request, files @ ..] = &args[..] else {
        panic!("usage: ask CONTROL-SOCKET REQUEST [FILE...]");
    };
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(path.as_str()).unwrap()).unwrap();
    let hello = Request::Hello {
        oldest: OLDEST_PROTOCOL,
        newest: NEWEST_PROTOCOL,
    };
    ask(socket.as_fd(), &hello, &[]);
    let open = |path| {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        options.open(path).unwrap()
    };
    let files: Vec<File> = files.iter().map(open).collect();
    let reply = ask(
        socket.as_fd(),
        &Request::decode(request.as_bytes()).unwrap(),
        &files,
    );
    println!("{}", String::from_utf8_lossy(&reply.encode().unwrap()));
    if matches!(reply, Reply::Refused { .. }) {
        std::process::exit(1);
    }
}

fn ask(socket: BorrowedFd<'_>, request: &Request, files: &[File]) -> Reply {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    if !files.is_empty() {
        assert!(
            ancillary.push(SendAncillaryMessage::ScmRights(&files)),
            "too many files"
        );
    }
    let bytes = request.encode().unwrap();
    sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut none = RecvAncillaryBuffer::default();
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(socket, &mut buffers, &mut none, RecvFlags::empty()).unwrap();
    Reply::decode(&bytes[..received.bytes]).unwrap()
}
