//! Packets of the control socket: SOCK_SEQPACKET of unix(7), descriptors by SCM_RIGHTS, every wait with a bound.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use caisson_vmm_api::control::{DESCRIPTORS_MAX, IDLE_SECONDS, MESSAGE_BYTES_MAX};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
    SocketFlags, accept_with, recvmsg, sendmsg, sockopt,
};

/// A connection of a client.
#[derive(Debug)]
pub(crate) struct Connection(OwnedFd);

/// A packet.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// The next client.
    pub(crate) fn accept(listener: impl AsFd) -> io::Result<Self> {
        let socket = loop {
            match accept_with(&listener, SocketFlags::CLOEXEC) {
                Ok(socket) => break socket,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(e) => return Err(e.into()),
            }
        };
        let idle = Some(Duration::from_secs(IDLE_SECONDS));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, idle)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, idle)?;
        Ok(Self(socket))
    }

    /// The next packet; `None` at the end of the connection.
    pub(crate) fn receive(&self) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        // The kernel's room for them is rounded up.
        if descriptors.len() > DESCRIPTORS_MAX
            || received
                .flags
                .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a packet is longer, or has more descriptors, than any request",
            ));
        }
        bytes.truncate(received.bytes);
        Ok((received.bytes > 0).then_some(Packet { bytes, descriptors }))
    }

    /// Sends a packet.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut ancillary = SendAncillaryBuffer::default();
        loop {
            match sendmsg(
                &self.0,
                &[IoSlice::new(bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
