//! Messages with file descriptors over a pair of sequenced-packet sockets, between the agent and a stage that it started.
//!
//! Must not know what the messages mean.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg,
        socketpair,
    },
};

/// Largest message in bytes.
pub(crate) const MAX_MESSAGE: usize = 32 << 10;

/// Most descriptors in one message.
pub(crate) const MAX_FDS: usize = 8;

/// Two ends, both closed on exec.
pub(crate) fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Sends one message; it must not be empty, since an empty one reads as the end.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    if bytes.is_empty() || bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(Errno::MSGSIZE);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message; `None` when the other end is closed.
pub(crate) fn receive(socket: impl AsFd) -> rustix::io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Errno::MSGSIZE);
    }
    bytes.truncate(got.bytes);
    Ok((got.bytes > 0).then_some((bytes, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_travel_with_their_message() {
        let (a, b) = pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        send(&a, b"hello", &[writer.as_fd()]).unwrap();
        drop(writer);
        let (bytes, fds) = receive(&b).unwrap().unwrap();
        assert_eq!(bytes, b"hello");
        rustix::io::write(&fds[0], b"x").unwrap();
        let mut read = [0; 4];
        assert_eq!(rustix::io::read(&reader, &mut read).unwrap(), 1);
    }

    #[test]
    fn a_closed_end_reads_as_none() {
        let (a, b) = pair().unwrap();
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn an_empty_or_oversized_message_is_refused() {
        let (a, _b) = pair().unwrap();
        assert_eq!(send(&a, b"", &[]), Err(Errno::MSGSIZE));
        assert_eq!(send(&a, &vec![0; MAX_MESSAGE + 1], &[]), Err(Errno::MSGSIZE));
    }
}
