//! The client of the control protocol: a connection for each conversation, blocking calls on a thread of their own, every wait with a bound.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::HypervisorError;
use caisson_vmm_api::control::{
    DESCRIPTORS_MAX, MESSAGE_BYTES_MAX, NEWEST_PROTOCOL, OLDEST_PROTOCOL, RELEASE_SECONDS, Refusal, Reply,
    Request,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with, sockopt,
};

/// How long each reply may take: the longest that the VMM may need, and as much again for a loaded host.
pub(crate) const REPLY_DEADLINE: Duration = Duration::from_secs(2 * RELEASE_SECONDS);

/// Why a request was not fulfilled.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The VMM said no.
    Refused(Refusal, String),
    /// It said nothing in time.
    Silent,
    /// It could not be talked to.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Io(error),
        }
    }
}

impl Failure {
    /// For whoever asked for `verb`.
    pub(crate) fn of(self, verb: &'static str) -> HypervisorError {
        match self {
            Self::Refused(_, reason) => HypervisorError::Refused {
                command: verb.to_owned(),
                reason,
            },
            Self::Silent => HypervisorError::Deadline {
                what: format!("the VMM's answer to {verb}"),
                limit: REPLY_DEADLINE,
            },
            Self::Io(source) => HypervisorError::Io {
                what: format!("ask the VMM for {verb}"),
                source,
            },
        }
    }
}

/// Asks once, on a thread where it may block.
pub(crate) async fn ask(socket: &Path, request: Request, files: Vec<OwnedFd>) -> Result<Reply, Failure> {
    let socket: PathBuf = socket.to_owned();
    let asking = tokio::task::spawn_blocking(move || {
        let session = Session::open(&socket)?;
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        session.ask(&request, &files)
    });
    asking
        .await
        .unwrap_or_else(|e| Err(Failure::Io(io::Error::other(e))))
}

/// A connection that has been greeted.
pub(crate) struct Session(OwnedFd);

impl Session {
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let error = |e: rustix::io::Errno| Failure::from(io::Error::from(e));
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(error)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(REPLY_DEADLINE)).map_err(error)?;
        // Also bounds the connection itself, which waits while the VMM's backlog is full.
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(REPLY_DEADLINE)).map_err(error)?;
        connect(&socket, &SocketAddrUnix::new(path).map_err(error)?).map_err(error)?;
        let session = Self(socket);
        let hello = Request::Hello {
            oldest: OLDEST_PROTOCOL,
            newest: NEWEST_PROTOCOL,
        };
        match session.ask(&hello, &[])? {
            Reply::Welcome { .. } => Ok(session),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a request, with the descriptors that it takes, and waits for its reply; a refusal is an error.
    pub(crate) fn ask(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Result<Reply, Failure> {
        let bytes = request.encode().map_err(io::Error::other)?;
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        // More than the VMM takes cannot be pushed, and then nothing is sent.
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many files for one request").into());
        }
        retry(|| {
            sendmsg(
                &self.0,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )
        })?;
        match Reply::decode(&self.receive()?).map_err(io::Error::other)? {
            Reply::Refused { kind, message } => Err(Failure::Refused(kind, message)),
            reply => Ok(reply),
        }
    }

    fn receive(&self) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        // No room: descriptors that nobody asked for are closed by the kernel.
        let mut ancillary = RecvAncillaryBuffer::default();
        let received = retry(|| {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            recvmsg(&self.0, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })?;
        if received.bytes == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a reply longer than any").into());
        }
        bytes.truncate(received.bytes);
        Ok(bytes)
    }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, rustix::io::Errno>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// An answer to another question.
pub(crate) fn unexpected(reply: &Reply) -> Failure {
    let text: String = format!("{reply:?}").chars().take(200).collect();
    Failure::Io(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the VMM answered something else: {text}"),
    ))
}
