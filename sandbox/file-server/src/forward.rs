//! Forwards the guest's connections to Unix sockets of the host: one at a time on each connection that the daemon has made.
//!
//! The form of what travels is in `caisson_agent_api::files`. What a connection may reach is what is mounted on `/volumes`, by number;
//! everything else of the host has no name here. A thread copies each direction, so that one that is slow holds up nothing else.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::fd::AsFd,
    os::unix::net::UnixStream,
    path::Path,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::jail;

/// Most digits of an export's number.
const MAX_NAME: usize = 8;
/// Bytes of one frame at most.
const MAX_FRAME: usize = 64 << 10;
/// Instead of a length: no more in this direction, and no more is taken in the other.
const CLOSED: u32 = u32::MAX;

/// Serves until the other side closes.
pub(crate) fn connection(mut guest: UnixStream) -> io::Result<()> {
    while let Some(name) = opened(&mut guest)? {
        match UnixStream::connect(Path::new(jail::VOLUMES).join(name)) {
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                guest.write_all(&errno.to_le_bytes())?;
            }
            Ok(host) => {
                guest.write_all(&0i32.to_le_bytes())?;
                exchange(&guest, &host)?;
            }
        }
    }
    Ok(())
}

/// The number of the export that is to be connected; nothing when there are no more.
fn opened(guest: &mut UnixStream) -> io::Result<Option<String>> {
    let mut length = [0];
    loop {
        match guest.read(&mut length) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The VM was killed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let mut name = vec![0; usize::from(length[0])];
    if !(1..=MAX_NAME).contains(&name.len()) {
        return Err(bad("the number of a socket has an impossible length"));
    }
    guest.read_exact(&mut name)?;
    if !name.iter().all(u8::is_ascii_digit) {
        return Err(bad("a socket is called by something else than a number"));
    }
    String::from_utf8(name)
        .map(Some)
        .map_err(|_| bad("a socket is called by something else than a number"))
}

fn bad(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Copies both directions until both have ended. An error is one of the guest's connection: then it is of no more use.
fn exchange(guest: &UnixStream, host: &UnixStream) -> io::Result<()> {
    std::thread::scope(|scope| {
        let back = std::thread::Builder::new()
            .name("forward".into())
            .spawn_scoped(scope, || to_guest(host, guest))?;
        let forth = to_host(guest, host);
        if forth.is_err() {
            // Wakes the other direction.
            drop(host.shutdown(Shutdown::Both));
        }
        let back = back.join().map_err(|_| bad("a thread ended without a word"))?;
        forth.and(back)
    })
}

/// Frames of the guest to the host's socket. What the socket does not take is dropped: its end is told in the other direction.
fn to_host(mut guest: &UnixStream, mut host: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; MAX_FRAME];
    let mut takes = true;
    loop {
        let mut length = [0; 4];
        guest.read_exact(&mut length)?;
        let length = match u32::from_le_bytes(length) {
            0 => {
                drop(host.shutdown(Shutdown::Write));
                return Ok(());
            }
            CLOSED => {
                drop(host.shutdown(Shutdown::Both));
                return Ok(());
            }
            length => usize::try_from(length).unwrap_or(usize::MAX),
        };
        let frame = buffer
            .get_mut(..length)
            .ok_or_else(|| bad("a frame has an impossible length"))?;
        guest.read_exact(frame)?;
        takes = takes && host.write_all(frame).is_ok();
    }
}

/// What the host's socket says, in frames; its end as what it is.
fn to_guest(mut host: &UnixStream, mut guest: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 4 + MAX_FRAME];
    loop {
        let read = match host.read(buffer.get_mut(4..).unwrap_or_default()) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        let word = match read {
            0 if is_closed(host) => CLOSED,
            // At most a frame's bytes.
            read => u32::try_from(read).unwrap_or(CLOSED),
        };
        if let Some(head) = buffer.get_mut(..4) {
            head.copy_from_slice(&word.to_le_bytes());
        }
        let sent = guest.write_all(buffer.get(..4 + read).unwrap_or_default());
        if sent.is_err() {
            drop(host.shutdown(Shutdown::Both));
        }
        if read == 0 || sent.is_err() {
            return sent;
        }
    }
}

/// Whether the other side takes no more either: not only shut down for writing, but gone.
fn is_closed(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let polled = poll(&mut fds, Some(&now));
    polled.is_err()
        || fds
            .iter()
            .any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest's end of an exchange with a host's socket, whose other end is given to `host`.
    fn exchanged(host: impl FnOnce(UnixStream) + Send, guest: impl FnOnce(&mut UnixStream)) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (socket, server) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || exchange(&ours, &socket).unwrap());
            scope.spawn(move || host(server));
            guest(&mut theirs);
        });
    }

    fn frame(bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap();
        [&length.to_le_bytes()[..], bytes].concat()
    }

    fn next(guest: &mut UnixStream) -> (u32, Vec<u8>) {
        let mut word = [0; 4];
        guest.read_exact(&mut word).unwrap();
        let word = u32::from_le_bytes(word);
        let mut bytes = vec![0; if word == CLOSED { 0 } else { word as usize }];
        guest.read_exact(&mut bytes).unwrap();
        (word, bytes)
    }

    #[test]
    fn each_direction_ends_by_itself() {
        exchanged(
            |mut server| {
                let mut said = String::new();
                server.read_to_string(&mut said).unwrap();
                assert_eq!(said, "ask");
                server.write_all(b"answer").unwrap();
            },
            |guest| {
                guest.write_all(&frame(b"ask")).unwrap();
                guest.write_all(&frame(b"")).unwrap();
                assert_eq!(next(guest), (6, b"answer".to_vec()));
                assert_eq!(next(guest).0, CLOSED);
            },
        );
    }

    #[test]
    fn a_server_that_only_stops_talking_is_still_talked_to() {
        exchanged(
            |mut server| {
                server.shutdown(Shutdown::Write).unwrap();
                let mut said = String::new();
                server.read_to_string(&mut said).unwrap();
                assert_eq!(said, "late");
            },
            |guest| {
                assert_eq!(next(guest).0, 0);
                guest.write_all(&frame(b"late")).unwrap();
                guest.write_all(&CLOSED.to_le_bytes()).unwrap();
            },
        );
    }

    #[test]
    fn what_is_sent_to_a_server_that_is_gone_is_dropped() {
        exchanged(drop, |guest| {
            assert_eq!(next(guest).0, CLOSED);
            for _ in 0..100 {
                guest.write_all(&frame(&[7; 1000])).unwrap();
            }
            guest.write_all(&frame(b"")).unwrap();
        });
    }

    #[test]
    fn only_numbers_are_names() {
        for name in ["..", "a/b", "123456789", ""] {
            let (mut ours, mut theirs) = UnixStream::pair().unwrap();
            let length = u8::try_from(name.len()).unwrap();
            theirs.write_all(&[length]).unwrap();
            theirs.write_all(name.as_bytes()).unwrap();
            assert!(opened(&mut ours).is_err(), "{name:?}");
        }
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"\x0212").unwrap();
        assert_eq!(opened(&mut ours).unwrap().as_deref(), Some("12"));
        drop(theirs);
        assert_eq!(opened(&mut ours).unwrap(), None);
    }
}
