//! Volumes that stay on the host: a FUSE file system whose messages travel over connections that the host has made.
//!
//! Carries messages between `/dev/fuse` and the connections; what they say is the kernel's and the file server's. When a connection ends,
//! the server is gone: from then on every request is answered here, with EIO, so that nothing waits for it. See
//! `caisson_agent_api::files`.

use std::{
    collections::HashMap,
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use caisson_agent_api::{
    files::{MAX_CONNECTIONS, MAX_MESSAGE, MAX_SESSIONS, TAKEN},
    v1,
};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, mount},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    sync::Mutex as Turn,
};

use crate::{
    error::{AgentError, At},
    guest::Guest,
    listen::Connection,
    service::blocking,
    watch_fd::watched,
};

const DIRECTORY: &str = "/run/shared";

/// The kernel's door to a file system in user space.
const DEVICE: &str = "/dev/fuse";

/// How long a connection may take to say which session it is for.
const OPEN_BOUND: Duration = Duration::from_secs(10);

/// struct fuse_in_header and fuse_out_header of linux/fuse.h: bytes, and the opcodes that are not answered.
const REQUEST_HEADER: usize = 40;
const ANSWER_HEADER: usize = 16;
const WITHOUT_ANSWER: [u32; 4] = [2, 36, 41, 42];
/// FUSE_DESTROY: the kernel waits for an answer that servers do not give.
const DESTROY: u32 = 38;

/// The sessions there are.
#[derive(Default)]
pub(crate) struct Shared {
    sessions: Mutex<HashMap<u64, Session>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({} sessions)", self.sessions().len())
    }
}

enum Session {
    /// Connections that have been made so far.
    Connecting(Vec<Box<dyn Connection>>),
    Mounted,
}

/// Where an export of a session is.
pub(crate) fn path(session: u64, export: &str) -> PathBuf {
    root(session).join(export)
}

fn root(session: u64) -> PathBuf {
    Path::new(DIRECTORY).join(session.to_string())
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, HashMap<u64, Session>> {
        // Each change is one insertion: whoever panicked left it whole.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the session's file system is mounted.
    pub(crate) fn is_mounted(&self, session: u64) -> bool {
        matches!(self.sessions().get(&session), Some(Session::Mounted))
    }

    /// Keeps a connection until its session is mounted; false when there is no room for it.
    fn keep(&self, session: u64, connection: Box<dyn Connection>) -> bool {
        let mut sessions = self.sessions();
        if !sessions.contains_key(&session) && sessions.len() >= MAX_SESSIONS {
            return false;
        }
        let entry = sessions
            .entry(session)
            .or_insert_with(|| Session::Connecting(Vec::new()));
        match entry {
            Session::Connecting(kept) if kept.len() < MAX_CONNECTIONS => {
                kept.push(connection);
                true
            }
            _ => false,
        }
    }

    fn take(&self, session: u64, count: usize) -> Result<Vec<Box<dyn Connection>>, AgentError> {
        let mut sessions = self.sessions();
        match sessions.get_mut(&session) {
            Some(Session::Connecting(kept)) if kept.len() == count => Ok(std::mem::take(kept)),
            Some(Session::Connecting(kept)) => Err(AgentError::invalid(
                "connections",
                format!("{} of {count} have been made", kept.len()),
            )),
            _ => Err(AgentError::Unknown {
                what: "session",
                id: session.to_string(),
            }),
        }
    }
}

/// Serves the beginning of a connection: which session it is for.
pub(crate) async fn accept(guest: Arc<Guest>, mut connection: Box<dyn Connection>) -> io::Result<()> {
    let mut session = [0; 8];
    tokio::time::timeout(OPEN_BOUND, connection.read_exact(&mut session)).await??;
    // Before it is kept: whoever mounts must not find it without its byte. Without room, the connection just ends.
    connection.write_all(&[TAKEN]).await?;
    connection.flush().await?;
    guest.shared.keep(u64::from_le_bytes(session), connection);
    Ok(())
}

/// `MountShared`.
pub(crate) async fn mount_session(
    guest: Arc<Guest>,
    request: v1::MountSharedRequest,
) -> Result<(), AgentError> {
    let session = request.session;
    if guest.shared.is_mounted(session) {
        return Ok(());
    }
    let count = usize::try_from(request.connections).unwrap_or(usize::MAX);
    if !(1..=MAX_CONNECTIONS).contains(&count) {
        let reason = format!("{count} is not between 1 and {MAX_CONNECTIONS}");
        return Err(AgentError::invalid("connections", reason));
    }
    let forwards = usize::try_from(request.forwards).unwrap_or(usize::MAX);
    let Some(messages) = count.checked_sub(forwards).filter(|messages| *messages > 0) else {
        let reason = format!("{forwards} of {count} connections leave none for messages");
        return Err(AgentError::invalid("forwards", reason));
    };
    let mut connections = guest.shared.take(session, count)?;
    guest
        .socket_forwards
        .add(session, connections.split_off(messages.min(connections.len())));
    let device = blocking(move || mount_file_system(session)).await?;
    let device = Arc::new(watched(device).at(|| format!("watching {DEVICE}"))?);
    let turn = Arc::new(Turn::new(()));
    for connection in connections {
        tokio::spawn(carry(Arc::clone(&device), Arc::clone(&turn), connection));
    }
    guest.shared.sessions().insert(session, Session::Mounted);
    Ok(())
}

fn mount_file_system(session: u64) -> Result<OwnedFd, AgentError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open(DEVICE, flags, Mode::empty()).at(|| format!("opening {DEVICE}"))?;
    let place = root(session);
    fs::create_dir_all(&place).at(|| format!("creating {}", place.display()))?;
    // Permissions are checked here, by the users and groups of the pod; every user of the pod may come.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    let options = CString::new(options)
        .map_err(io::Error::other)
        .at(|| "formatting mount options")?;
    // The numbers of a host's devices mean others here.
    mount("caisson", &place, "fuse", MountFlags::NODEV, options.as_c_str())
        .at(|| format!("mounting shared volumes on {}", place.display()))?;
    Ok(device)
}

/// Carries one message after the other between the kernel and one connection, as long as the file system is mounted.
async fn carry(device: Arc<AsyncFd<OwnedFd>>, turn: Arc<Turn<()>>, connection: Box<dyn Connection>) {
    let mut connection = Some(connection);
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let request = {
            // One asks the kernel at a time; the others would only be woken for nothing.
            let _turn = turn.lock().await;
            match receive(&device, &mut buffer).await {
                Ok(request) => request,
                // Unmounted.
                Err(_) => return,
            }
        };
        let Some(request) = request else { continue };
        let answered = match connection.as_mut() {
            Some(connection) => exchange(connection, &request, &mut buffer).await,
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        let length = match answered {
            Ok(0) => continue,
            Ok(length) => length,
            Err(_) => {
                connection = None;
                if request.is_without_answer() {
                    continue;
                }
                fail(&request, &mut buffer)
            }
        };
        // A request that was given up meanwhile is refused with ENOENT, and is over either way.
        let answer = buffer.get(..length).unwrap_or_default();
        if let Err(Errno::NODEV) = rustix::io::write(&*device, answer) {
            return;
        }
    }
}

/// What has to be known of a request; its bytes are in the buffer.
struct Request {
    length: usize,
    opcode: u32,
    unique: u64,
}

impl Request {
    /// `None` for what the kernel does not write.
    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < REQUEST_HEADER {
            return None;
        }
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            length: bytes.len(),
            opcode: word(4)?,
            unique: u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?),
        })
    }

    fn is_without_answer(&self) -> bool {
        WITHOUT_ANSWER.contains(&self.opcode)
    }
}

/// The kernel's next request; `None` when there was none after all.
async fn receive(device: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<Option<Request>> {
    loop {
        let mut ready = device.readable().await?;
        let read = ready.try_io(|device| Ok(rustix::io::read(device.get_ref(), &mut *buffer)?));
        match read {
            Ok(Ok(length)) => return Ok(buffer.get(..length).and_then(Request::parse)),
            // Given up before it was read.
            Ok(Err(error))
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN)
                ) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// Sends a request and receives its answer into the same buffer; the answer's length, 0 for none.
async fn exchange(
    connection: &mut Box<dyn Connection>,
    request: &Request,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    connection
        .write_all(buffer.get(..request.length).ok_or_else(bad)?)
        .await?;
    connection.flush().await?;
    if request.is_without_answer() {
        return Ok(0);
    }
    if request.opcode == DESTROY {
        return Ok(answer(request, 0, buffer));
    }
    let head = buffer.get_mut(..ANSWER_HEADER).ok_or_else(bad)?;
    connection.read_exact(head).await?;
    let length = u32::from_ne_bytes(head.get(..4).and_then(|l| l.try_into().ok()).ok_or_else(bad)?);
    let unique = u64::from_ne_bytes(head.get(8..16).and_then(|u| u.try_into().ok()).ok_or_else(bad)?);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if unique != request.unique || !(ANSWER_HEADER..=buffer.len()).contains(&length) {
        return Err(bad());
    }
    connection
        .read_exact(buffer.get_mut(ANSWER_HEADER..length).ok_or_else(bad)?)
        .await?;
    Ok(length)
}

fn fail(request: &Request, buffer: &mut [u8]) -> usize {
    answer(request, -libc::EIO, buffer)
}

/// Writes an answer without content; its length.
fn answer(request: &Request, error: i32, buffer: &mut [u8]) -> usize {
    let mut bytes = Vec::with_capacity(ANSWER_HEADER);
    bytes.extend(16u32.to_ne_bytes());
    bytes.extend(error.to_ne_bytes());
    bytes.extend(request.unique.to_ne_bytes());
    if let Some(place) = buffer.get_mut(..ANSWER_HEADER) {
        place.copy_from_slice(&bytes);
    }
    ANSWER_HEADER
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, unique: u64) -> Vec<u8> {
        let mut bytes = vec![0; 44];
        bytes[..4].copy_from_slice(&44u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        bytes
    }

    async fn exchanged(opcode: u32, answer: Vec<u8>) -> io::Result<(usize, Vec<u8>)> {
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        let mut ours: Box<dyn Connection> = Box::new(ours);
        theirs.write_all(&answer).await.unwrap();
        let mut buffer = request(opcode, 9);
        let parsed = Request::parse(&buffer).unwrap();
        buffer.resize(MAX_MESSAGE, 0);
        let length = exchange(&mut ours, &parsed, &mut buffer).await?;
        buffer.truncate(length);
        Ok((length, buffer))
    }

    fn reply(length: u32, unique: u64, content: &[u8]) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(unique.to_ne_bytes());
        bytes.extend(content);
        bytes
    }

    #[tokio::test]
    async fn an_answer_is_taken_only_when_it_is_the_request_s() {
        let (length, bytes) = exchanged(1, reply(18, 9, b"ok")).await.unwrap();
        assert_eq!((length, &bytes[16..]), (18, b"ok".as_slice()));
        for wrong in [
            reply(18, 8, b"ok"),
            reply(15, 9, b""),
            reply(u32::MAX, 9, b""),
            reply(u32::try_from(MAX_MESSAGE).unwrap() + 1, 9, b""),
        ] {
            exchanged(1, wrong).await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn what_has_no_answer_is_not_waited_for() {
        for opcode in WITHOUT_ANSWER {
            assert_eq!(exchanged(opcode, Vec::new()).await.unwrap().0, 0);
        }
        assert_eq!(exchanged(DESTROY, Vec::new()).await.unwrap().0, ANSWER_HEADER);
    }

    #[test]
    fn a_failed_request_is_answered_with_eio() {
        let mut buffer = vec![0; 64];
        let length = fail(&Request::parse(&request(1, 77)).unwrap(), &mut buffer);
        assert_eq!(length, 16);
        assert_eq!(buffer[4..8], (-libc::EIO).to_ne_bytes());
        assert_eq!(buffer[8..16], 77u64.to_ne_bytes());
    }

    #[test]
    fn connections_beyond_the_session_s_room_are_dropped() {
        let shared = Shared::default();
        let one = || Box::new(tokio::io::duplex(1).0) as Box<dyn Connection>;
        assert!((0..MAX_CONNECTIONS).all(|_| shared.keep(1, one())));
        assert!(!shared.keep(1, one()));
        assert!((2..=MAX_SESSIONS as u64).all(|session| shared.keep(session, one())));
        assert!(!shared.keep(MAX_SESSIONS as u64 + 1, one()));
        assert!(shared.take(1, 3).is_err() && shared.take(99, 1).is_err());
        assert_eq!(shared.take(1, MAX_CONNECTIONS).unwrap().len(), MAX_CONNECTIONS);
    }
}
