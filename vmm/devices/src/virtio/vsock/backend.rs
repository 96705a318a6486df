//! The host's side: a listening Unix socket, and the line `CONNECT <port>\n` with which a connection begins.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// Longest command, without its newline: `CONNECT 4294967295`.
const MAX_COMMAND: usize = 18;

/// Events that are taken at once.
const BATCH: usize = 64;

/// Marks the listener among the connections, whose tokens are their local ports.
const LISTENER: u64 = u64::MAX;

/// What happened on the host's side.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HostEvent {
    /// Someone may be waiting for [`HostSide::accept`].
    Incoming,
    /// On the connection of this local port.
    Socket { local_port: u32, ready: EventSet },
}

/// Connections that this process makes itself: it has no name to connect to.
#[derive(Debug)]
struct Inside {
    streams: Mutex<Vec<UnixStream>>,
    /// Rings when one was added.
    event: EventFd,
}

/// Reaches ports of the guest from inside of the process.
#[derive(Debug, Clone)]
pub struct VsockDialer(Arc<Inside>);

impl VsockDialer {
    /// A connection that asks for this port; the first thing to read from it is `OK <port>\n`, or its end if nobody listens there.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.write_all(format!("CONNECT {port}\n").as_bytes())?;
        theirs.set_nonblocking(true)?;
        lock(&self.0.streams).push(theirs);
        self.0.event.write(1)?;
        Ok(ours)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The listener, and what waits for all sockets. Sockets are watched edge-triggered: an event is remembered by its connection, so
/// that one without buffers or credit costs nothing while it waits; and a listener that cannot accept does not make the loop spin.
#[derive(Debug)]
pub(crate) struct HostSide {
    listener: UnixListener,
    inside: VsockDialer,
    epoll: Epoll,
}

impl HostSide {
    pub(crate) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            listener.as_raw_fd(),
            EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER),
        )?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        epoll.ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER),
        )?;
        let streams = Mutex::default();
        Ok(Self {
            listener,
            inside: VsockDialer(Arc::new(Inside { streams, event })),
            epoll,
        })
    }

    pub(crate) fn dialer(&self) -> VsockDialer {
        self.inside.clone()
    }

    /// The next connection, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        if let Some(stream) = lock(&self.inside.0.streams).pop() {
            return Ok(Some(stream));
        }
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Watches a socket until it is closed.
    pub(crate) fn watch(&self, stream: &UnixStream, local_port: u32) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(
            ControlOperation::Add,
            stream.as_raw_fd(),
            EpollEvent::new(events, u64::from(local_port)),
        )
    }

    /// What has happened; never waits.
    pub(crate) fn events(&self) -> io::Result<Vec<HostEvent>> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        let translated = events
            .iter()
            .take(count)
            .map(|event| match u32::try_from(event.data()) {
                Ok(local_port) => HostEvent::Socket {
                    local_port,
                    ready: event.event_set(),
                },
                Err(_) => HostEvent::Incoming,
            });
        Ok(translated.collect())
    }
}

impl AsRawFd for HostSide {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// A command that is being read.
#[derive(Debug, Default)]
pub(crate) struct Command {
    line: Vec<u8>,
}

/// How far a command has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    Unfinished,
    Connect(u32),
    /// Not a command, or the end of the connection.
    Invalid,
}

impl Command {
    /// Reads byte by byte: what follows the line is for the guest.
    pub(crate) fn read(&mut self, mut from: impl Read) -> Parsed {
        let mut byte = [0];
        loop {
            match from.read(&mut byte) {
                Ok(1) if byte == *b"\n" => return parse(&self.line).map_or(Parsed::Invalid, Parsed::Connect),
                Ok(1) if self.line.len() < MAX_COMMAND => self.line.extend(byte),
                Ok(_) => return Parsed::Invalid,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Parsed::Unfinished,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Parsed::Invalid,
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line.strip_prefix(b"CONNECT ")?).ok()?;
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // The highest number means "any port".
    digits.parse().ok().filter(|port| *port != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_or_refused_whole() {
        let read = |text: &str| Command::default().read(text.as_bytes());
        assert_eq!(read("CONNECT 1021\n"), Parsed::Connect(1021));
        assert_eq!(read("CONNECT 4294967294\n"), Parsed::Connect(4_294_967_294));
        for wrong in [
            "CONNECT 4294967295\n",
            "CONNECT 4294967296\n",
            "CONNECT +1\n",
            "CONNECT \n",
            "CONNECT 1 \n",
            "connect 1\n",
            "\n",
            "CONNECT 10",
            "CONNECT 000000000000000000001\n",
        ] {
            assert_eq!(read(wrong), Parsed::Invalid, "{wrong:?}");
        }
    }

    #[test]
    fn what_follows_the_command_stays_unread() {
        let mut text = &b"CONNECT 7\nhello"[..];
        assert_eq!(Command::default().read(&mut text), Parsed::Connect(7));
        assert_eq!(text, b"hello");
    }
}
