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
        through_the_cache(header.opcode, message);
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

/// Takes O_DIRECT off a message: the guest's cache is passed by all the same, and the host would want the memory of this process aligned
/// as the container's was.
fn through_the_cache(opcode: u32, message: &mut [u8]) {
    let is = |one: Opcode| one as u32 == opcode;
    // Where struct fuse_open_in and fuse_create_in, fuse_read_in and fuse_write_in have the flags of the file.
    let at = if is(Opcode::Open) || is(Opcode::Create) {
        0
    } else if is(Opcode::Read) || is(Opcode::Write) {
        32
    } else {
        return;
    };
    let at = size_of::<InHeader>() + at;
    if let Some(flags) = message
        .get_mut(at..at + 4)
        .and_then(|bytes| <&mut [u8; 4]>::try_from(bytes).ok())
    {
        *flags = (u32::from_ne_bytes(*flags) & !libc::O_DIRECT.cast_unsigned()).to_ne_bytes();
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
    fn files_are_never_opened_past_the_host_s_cache() {
        let flags = (libc::O_DIRECT | libc::O_RDWR | libc::O_SYNC).cast_unsigned();
        let after = |opcode: Opcode, at: usize| {
            let mut message = vec![0; 40 + 40];
            message[40 + at..44 + at].copy_from_slice(&flags.to_ne_bytes());
            through_the_cache(opcode as u32, &mut message);
            u32::from_ne_bytes(message[40 + at..44 + at].try_into().unwrap())
        };
        let kept = (libc::O_RDWR | libc::O_SYNC).cast_unsigned();
        for (opcode, at) in [
            (Opcode::Open, 0),
            (Opcode::Create, 0),
            (Opcode::Read, 32),
            (Opcode::Write, 32),
        ] {
            assert_eq!(after(opcode, at), kept);
        }
        assert_eq!(after(Opcode::Setattr, 0), flags);
        // One that is cut off is for the library to refuse.
        through_the_cache(Opcode::Write as u32, &mut [0; 60]);
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
