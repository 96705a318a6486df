//! One connection: a message, its answer, the next message. What is on several connections runs at the same time.
//!
//! Messages are FUSE's own (linux/fuse.h), which begin with their length. What comes is a guest's: lengths are checked here, contents by
//! the library; what it cannot parse ends the process, since the guest's kernel would wait for the answer for ever.

use std::{
    io::{self, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::Arc,
    time::Duration,
};

use fuse_backend_rs::{
    abi::fuse_abi::{InHeader, Opcode, OutHeader},
    api::server::Server,
    passthrough::{CachePolicy, Config, PassthroughFs},
    transport::{FuseBuf, FuseDevWriter, Reader, Writer},
};

use crate::{handshake, jail};

/// The largest message in either direction: a transfer, and a header with its arguments.
const MAX_MESSAGE: usize = handshake::MAX_TRANSFER + 4096;

/// For how long a guest may believe what it has seen: the host changes files as well.
const BELIEF: Duration = Duration::from_millis(250);

/// What is served, and how far it may be cached.
pub(crate) fn configuration() -> Config {
    Config {
        root_dir: jail::VOLUMES.to_owned(),
        entry_timeout: BELIEF,
        attr_timeout: BELIEF,
        cache_policy: CachePolicy::Auto,
        xattr: true,
        ..Config::default()
    }
}

/// Serves until the other side closes.
pub(crate) fn connection(
    fs: &PassthroughFs,
    server: &Server<Arc<PassthroughFs>>,
    mut socket: UnixStream,
) -> io::Result<()> {
    let (mut request, mut answer) = (vec![0; MAX_MESSAGE], vec![0; MAX_MESSAGE]);
    loop {
        let Some(length) = receive(&mut socket, &mut request)? else {
            return Ok(());
        };
        let message = request.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
        let header = parse(message)?;
        if header.opcode == Opcode::Init as u32 {
            let body = message.get(size_of::<InHeader>()..).unwrap_or_default();
            socket.write_all(&handshake::answer(fs, &header, body)?)?;
            continue;
        }
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{error}"));
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(message))
            .map_err(|error| io::Error::other(format!("{error}")))?;
        // The socket blocks, so an answer goes out whole.
        let writer = FuseDevWriter::new(socket.as_raw_fd(), &mut answer)
            .map_err(|error| io::Error::other(format!("{error}")))?;
        let handled = server.handle_message(reader, Writer::FuseDev(writer), None, None);
        if let Err(error) = handled
            && !is_without_answer(header.opcode)
        {
            return Err(invalid(error));
        }
    }
}

/// Messages that are not answered (linux/fuse.h).
fn is_without_answer(opcode: u32) -> bool {
    [
        Opcode::Forget,
        Opcode::BatchForget,
        Opcode::Interrupt,
        Opcode::Destroy,
        Opcode::NotifyReply,
    ]
    .into_iter()
    .any(|other| other as u32 == opcode)
}

/// Reads one message; its length, or `None` when there are no more.
fn receive(socket: &mut UnixStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason);
    let (first, rest) = buffer.split_at_mut_checked(4).ok_or_else(|| bad("no room"))?;
    let mut read = 0;
    while read < 4 {
        match socket.read(first.get_mut(read..).unwrap_or_default()) {
            Ok(0) if read == 0 => return Ok(None),
            Ok(0) => return Err(bad("a message was cut off")),
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The VM was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let length = u32::from_ne_bytes([
        first.first().copied().unwrap_or(0),
        first.get(1).copied().unwrap_or(0),
        first.get(2).copied().unwrap_or(0),
        first.get(3).copied().unwrap_or(0),
    ]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if !(size_of::<InHeader>()..=MAX_MESSAGE).contains(&length) {
        return Err(bad("a message has an impossible length"));
    }
    let rest = rest.get_mut(..length - 4).ok_or_else(|| bad("no room"))?;
    socket.read_exact(rest)?;
    Ok(Some(length))
}

fn parse(message: &[u8]) -> io::Result<InHeader> {
    let word = |at: usize| -> io::Result<u32> {
        message
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u32::from_ne_bytes)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    Ok(InHeader {
        len: word(0)?,
        opcode: word(4)?,
        unique: u64::from(word(8)?) | u64::from(word(12)?) << 32,
        ..InHeader::default()
    })
}

const _: () = assert!(size_of::<OutHeader>() < 4096);

#[cfg(test)]
mod tests {
    use super::*;

    fn received(bytes: &[u8]) -> io::Result<Option<usize>> {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        drop(theirs);
        receive(&mut ours, &mut vec![0; MAX_MESSAGE])
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        assert_eq!(received(&[]).unwrap(), None);
        received(&[1, 0]).unwrap_err();
        for length in [0, 39, u32::try_from(MAX_MESSAGE).unwrap() + 1, u32::MAX] {
            received(&length.to_ne_bytes()).unwrap_err();
        }
        let mut whole = 40u32.to_ne_bytes().to_vec();
        whole.resize(39, 0);
        received(&whole).unwrap_err();
        whole.push(0);
        assert_eq!(received(&whole).unwrap(), Some(40));
    }
}
