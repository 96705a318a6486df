//! A small QMP client (QEMU Machine Protocol, docs/interop/qmp-spec.rst): one command at a time, every wait bounded.
//!
//! QEMU may have been taken over by its guest, so what it says is hostile: lines are capped, events are counted and bounded, and a connection on
//! which anything odd was seen, or whose command was abandoned half-way, is dropped; the next command opens a new one. Must not
//! know what the commands are for.

mod message;

use std::{
    collections::VecDeque,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::HypervisorError;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{Mutex, MutexGuard},
    time::{Instant, timeout_at},
};

use message::{LineBuffer, Message};

/// How long one command may take. QEMU's main loop answers in milliseconds, on a loaded machine in seconds.
pub(crate) const COMMAND_DEADLINE: Duration = Duration::from_secs(15);

/// Unplug notices that are remembered while nobody asks for them.
const NOTICES_MAX: usize = 256;

/// Messages that are taken without a pause while only a stop is waited for.
const MESSAGES_WITHOUT_PAUSE: usize = 64;
const PAUSE: Duration = Duration::from_millis(100);

/// Messages (events, stale replies) that may come before the reply to a command.
const MESSAGES_BEFORE_REPLY: usize = 4096;

/// A control socket. Connects when needed; QEMU serves one client at a time.
#[derive(Debug)]
pub(crate) struct Qmp {
    path: PathBuf,
    connection: Mutex<Option<Connection>>,
}

/// Exclusive use of the control socket.
pub(crate) struct Session<'a> {
    path: &'a Path,
    slot: MutexGuard<'a, Option<Connection>>,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    lines: LineBuffer,
    next_id: u64,
    unplugged: VecDeque<String>,
    /// Whether a stop was heard that nobody has asked for yet.
    stopped: bool,
}

/// How a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// QEMU refused it; the connection is fine.
    Refused {
        /// `GenericError`, `DeviceNotFound`, ...
        class: String,
        /// For people.
        reason: String,
    },
    /// No answer in time.
    Late(Duration),
    /// The connection broke, or something was said that is no QMP.
    Broken(io::Error),
}

impl Failure {
    /// As the caller's error.
    pub(crate) fn of(self, command: &str) -> HypervisorError {
        match self {
            Self::Refused { reason, .. } => HypervisorError::Refused {
                command: command.into(),
                reason,
            },
            Self::Late(limit) => HypervisorError::Deadline {
                what: format!("QMP {command}"),
                limit,
            },
            Self::Broken(source) => HypervisorError::Io {
                what: format!("do QMP {command}"),
                source,
            },
        }
    }

    /// Whether QEMU says that the named thing does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { class, .. } if class == "DeviceNotFound")
    }
}

fn garbage(what: impl Into<String>) -> Failure {
    Failure::Broken(io::Error::new(io::ErrorKind::InvalidData, what.into()))
}

impl Qmp {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            connection: Mutex::new(None),
        }
    }

    /// Waits for its turn. Bounded, since every holder is.
    pub(crate) async fn session(&self) -> Session<'_> {
        Session {
            path: &self.path,
            slot: self.connection.lock().await,
        }
    }
}

impl Session<'_> {
    /// Opens the connection if there is none: greeting and capabilities.
    pub(crate) async fn connect(&mut self, limit: Duration) -> Result<(), Failure> {
        if self.slot.is_none() {
            let until = Instant::now() + limit;
            let connected = timeout_at(until, Connection::open(self.path)).await;
            *self.slot = Some(connected.map_err(|_| Failure::Late(limit))??);
        }
        Ok(())
    }

    /// Runs a command.
    pub(crate) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.run(command, arguments, None).await
    }

    /// Runs a command that takes a descriptor along (SCM_RIGHTS).
    pub(crate) async fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, Failure> {
        self.run(command, arguments, Some(fd)).await
    }

    async fn run(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Failure> {
        self.connect(COMMAND_DEADLINE).await?;
        // Taken out: when this future is dropped half-way, so is the connection, with whatever was under way on it.
        let Some(mut connection) = self.slot.take() else {
            return Err(garbage("no connection"));
        };
        let until = Instant::now() + COMMAND_DEADLINE;
        let answer = match timeout_at(until, connection.command(command, arguments, fd)).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::Late(COMMAND_DEADLINE)),
        };
        if matches!(answer, Ok(_) | Err(Failure::Refused { .. })) {
            *self.slot = Some(connection);
        }
        answer
    }

    /// Waits for the notice that a device was unplugged; `false` when it did not come in time.
    pub(crate) async fn unplugged(&mut self, device: &str, limit: Duration) -> Result<bool, Failure> {
        let Some(mut connection) = self.slot.take() else {
            return Err(garbage("no connection"));
        };
        match timeout_at(Instant::now() + limit, connection.unplugged(device)).await {
            Ok(Ok(())) => {
                *self.slot = Some(connection);
                Ok(true)
            }
            Ok(Err(failure)) => Err(failure),
            // Reading whole lines is cancel-safe: what was read stays in the buffer.
            Err(_) => {
                *self.slot = Some(connection);
                Ok(false)
            }
        }
    }
}

impl Session<'_> {
    /// Waits for the notice that the VM was stopped; with a limit, `false` when it did not come in time.
    pub(crate) async fn stopped(&mut self, limit: Option<Duration>) -> Result<bool, Failure> {
        let Some(mut connection) = self.slot.take() else {
            return Err(garbage("no connection"));
        };
        let heard = match limit {
            Some(limit) => timeout_at(Instant::now() + limit, connection.stopped()).await,
            None => Ok(connection.stopped().await),
        };
        let came = match heard {
            Ok(outcome) => outcome.map(|()| true)?,
            Err(_) => false,
        };
        *self.slot = Some(connection);
        Ok(came)
    }
}

impl Connection {
    async fn open(path: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(path).await.map_err(Failure::Broken)?;
        let mut connection = Self {
            stream,
            lines: LineBuffer::default(),
            next_id: 0,
            unplugged: VecDeque::new(),
            stopped: false,
        };
        match connection.message().await? {
            Message::Greeting => {}
            other => return Err(garbage(format!("expected the greeting of QMP, heard {other:?}"))),
        }
        connection.command("qmp_capabilities", Value::Null, None).await?;
        Ok(connection)
    }

    async fn command(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Failure> {
        self.next_id += 1;
        let id = self.next_id;
        let mut request = json!({"execute": command, "id": id});
        if let (false, Some(object)) = (arguments.is_null(), request.as_object_mut()) {
            object.insert("arguments".into(), arguments);
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        self.send(&line, fd).await.map_err(Failure::Broken)?;
        for _ in 0..MESSAGES_BEFORE_REPLY {
            match self.message().await? {
                Message::Return {
                    id: Some(heard),
                    value,
                } if heard == id => return Ok(value),
                Message::Error {
                    id: Some(heard),
                    class,
                    reason,
                } if heard == id => {
                    return Err(Failure::Refused { class, reason });
                }
                // Without an id QEMU answers only what it could not parse.
                Message::Error { id: None, reason, .. } => return Err(garbage(reason)),
                Message::Unplugged { device } => self.remember(device),
                Message::Stopped => self.stopped = true,
                Message::Event | Message::Greeting | Message::Return { .. } | Message::Error { .. } => {}
            }
        }
        Err(garbage("too many messages before the reply"))
    }

    fn remember(&mut self, device: String) {
        if self.unplugged.len() >= NOTICES_MAX {
            self.unplugged.pop_front();
        }
        self.unplugged.push_back(device);
    }

    async fn unplugged(&mut self, device: &str) -> Result<(), Failure> {
        loop {
            if let Some(at) = self.unplugged.iter().position(|known| known == device) {
                self.unplugged.remove(at);
                return Ok(());
            }
            match self.message().await? {
                Message::Unplugged { device } => self.remember(device),
                Message::Stopped => self.stopped = true,
                _ => {}
            }
        }
    }

    async fn stopped(&mut self) -> Result<(), Failure> {
        let mut idle = 0;
        while !std::mem::take(&mut self.stopped) {
            match self.message().await? {
                Message::Stopped => self.stopped = true,
                // Who talks without end shall not keep the daemon busy.
                _ if idle >= MESSAGES_WITHOUT_PAUSE => {
                    idle = 0;
                    tokio::time::sleep(PAUSE).await;
                }
                _ => idle += 1,
            }
        }
        Ok(())
    }

    async fn send(&self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .stream
                .async_io(Interest::WRITABLE, || {
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut ancillary = SendAncillaryBuffer::new(&mut space);
                    let fds: &[BorrowedFd<'_>] = fd.as_slice();
                    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                        return Err(io::Error::other("no room for a descriptor"));
                    }
                    let parts = [io::IoSlice::new(bytes)];
                    Ok(sendmsg(
                        self.stream.as_fd(),
                        &parts,
                        &mut ancillary,
                        SendFlags::NOSIGNAL,
                    )?)
                })
                .await?;
            fd = None;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// The next message. Cancel-safe.
    async fn message(&mut self) -> Result<Message, Failure> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return Message::parse(&line).map_err(|e| garbage(e.to_string()));
            }
            self.stream.readable().await.map_err(Failure::Broken)?;
            match self
                .stream
                .try_read(self.lines.space().map_err(|e| garbage(e.to_string()))?)
            {
                Ok(0) => return Err(Failure::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => self.lines.filled(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(Failure::Broken(e)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, future::Future, io::Write};

    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::UnixListener,
    };

    use super::*;

    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    /// Runs a fake QEMU that serves one connection after another with `serve`.
    fn fake<F, Fut>(serve: F) -> (tempfile::TempDir, Qmp)
    where
        F: Fn(BufReader<UnixStream>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(BufReader::new(stream)).await;
            }
        });
        (dir, Qmp::new(path))
    }

    async fn request(stream: &mut BufReader<UnixStream>) -> Option<Value> {
        let mut line = String::new();
        (stream.read_line(&mut line).await.unwrap_or(0) > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    /// Greets, and answers every command with its own arguments after an event and a stale reply.
    async fn echo(mut stream: BufReader<UnixStream>) {
        stream.write_all(GREETING).await.unwrap();
        while let Some(request) = request(&mut stream).await {
            let event = json!({"event": "RESUME", "timestamp": {}});
            let stale = json!({"return": {}, "id": 999_999});
            let reply = json!({"return": request["arguments"], "id": request["id"]});
            if stream
                .write_all(format!("{event}\r\n{stale}\r\n{reply}\r\n").as_bytes())
                .await
                .is_err()
            {
                return;
            }
        }
    }

    #[tokio::test]
    async fn the_reply_is_found_by_its_id_among_other_messages() {
        let (_dir, qmp) = fake(echo);
        let mut session = qmp.session().await;
        assert_eq!(
            session.execute("one", json!({"a": 1})).await.unwrap(),
            json!({"a": 1})
        );
        assert_eq!(
            session.execute("two", json!({"b": 2})).await.unwrap(),
            json!({"b": 2})
        );
    }

    #[tokio::test]
    async fn a_descriptor_may_travel_with_a_command() {
        let (dir, qmp) = fake(echo);
        let mut file = File::create(dir.path().join("file")).unwrap();
        file.write_all(b"x").unwrap();
        let answer = qmp
            .session()
            .await
            .execute_with("add-fd", json!({"fdset-id": 1}), file.as_fd())
            .await;
        assert_eq!(answer.unwrap(), json!({"fdset-id": 1}));
    }

    #[tokio::test]
    async fn a_refusal_keeps_the_words_and_the_connection() {
        let (_dir, qmp) = fake(|mut stream| async move {
            stream.write_all(GREETING).await.unwrap();
            while let Some(request) = request(&mut stream).await {
                let reply = match request["execute"].as_str() {
                    Some("bad") => {
                        json!({"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": request["id"]})
                    }
                    _ => json!({"return": {}, "id": request["id"]}),
                };
                stream.write_all(format!("{reply}\n").as_bytes()).await.unwrap();
            }
        });
        let mut session = qmp.session().await;
        let failure = session.execute("bad", Value::Null).await.unwrap_err();
        assert!(failure.is_not_found());
        assert_eq!(
            failure.of("bad").to_string(),
            "bad was refused by the hypervisor: Device 'x' not found"
        );
        session.execute("good", Value::Null).await.unwrap();
    }

    #[tokio::test]
    async fn garbage_ends_the_connection_and_the_next_command_opens_another() {
        let served = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = served.clone();
        let (_dir, qmp) = fake(move |mut stream| {
            let first = counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
            async move {
                if first {
                    stream.write_all(GREETING).await.unwrap();
                    request(&mut stream).await;
                    stream.write_all(b"{]\n").await.unwrap();
                } else {
                    echo(stream).await;
                }
            }
        });
        let mut session = qmp.session().await;
        assert!(matches!(
            session.execute("x", Value::Null).await,
            Err(Failure::Broken(_))
        ));
        session.execute("x", Value::Null).await.unwrap();
        assert_eq!(served.load(std::sync::atomic::Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn an_endless_line_is_given_up() {
        let (_dir, qmp) =
            fake(|mut stream| async move { while stream.write_all(&[b' '; 65536]).await.is_ok() {} });
        let failure = qmp.session().await.execute("x", Value::Null).await.unwrap_err();
        assert!(matches!(failure, Failure::Broken(e) if e.to_string().contains("longer than")));
    }

    #[tokio::test]
    async fn a_silent_peer_is_a_deadline() {
        let (_dir, qmp) = fake(|mut stream| async move {
            stream.write_all(GREETING).await.unwrap();
            while request(&mut stream).await.is_some() {}
        });
        let failure = qmp
            .session()
            .await
            .connect(Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(matches!(failure, Failure::Late(_)), "{failure:?}");
    }

    #[tokio::test]
    async fn notices_of_unplugged_devices_wait_until_they_are_asked_for() {
        let (_dir, qmp) = fake(|mut stream| async move {
            stream.write_all(GREETING).await.unwrap();
            while let Some(request) = request(&mut stream).await {
                let notice = json!({"event": "DEVICE_DELETED", "data": {"device": "hot1", "path": "/x"}});
                let reply = json!({"return": {}, "id": request["id"]});
                stream
                    .write_all(format!("{notice}\n{reply}\n").as_bytes())
                    .await
                    .unwrap();
            }
        });
        let mut session = qmp.session().await;
        session.execute("device_del", Value::Null).await.unwrap();
        assert!(session.unplugged("hot1", COMMAND_DEADLINE).await.unwrap());
        assert!(
            !session
                .unplugged("hot2", Duration::from_millis(20))
                .await
                .unwrap()
        );
        session.execute("still", Value::Null).await.unwrap();
    }
}
