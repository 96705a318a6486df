//! The request with its descriptors, from the socket that is the standard input.

use std::{
    fs::File,
    io::{self, IoSliceMut, Read},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::protocol::{DESCRIPTORS_MAX, DOCUMENT_BYTES_MAX};

/// Waits for the request. The socket comes back as a file: an answer is written to it, no more.
pub(crate) fn receive() -> io::Result<(File, Vec<u8>, Vec<File>)> {
    let mut socket = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut bytes = vec![0; DOCUMENT_BYTES_MAX];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        recvmsg(&socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?
    };
    let mut files = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors.map(|descriptor: OwnedFd| File::from(descriptor)));
        }
    }
    bytes.truncate(received.bytes);
    let room = DOCUMENT_BYTES_MAX.saturating_sub(bytes.len()) as u64;
    (&mut socket).take(room).read_to_end(&mut bytes)?;
    Ok((socket, bytes, files))
}
