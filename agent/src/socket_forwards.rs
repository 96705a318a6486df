//! Unix sockets of the host in the guest: a socket of our own stands where the host's would be, as a volume or below one, and each
//! connection to it takes one of the session's connections to the host for as long as it lasts.
//!
//! Must not know what is on the host: an export has a number. The form of what travels is in `caisson_agent_api::files`.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener as Listening,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use caisson_agent_api::{
    files::{FORWARD_CLOSED, MAX_SOCKETS_BELOW},
    v1::{self, mount::Source},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Mutex as Turn, mpsc},
};

use crate::{
    error::{AgentError, At},
    listen::Connection,
    names, shared,
    stage_spec::StageSocket,
    volumes,
};

const DIRECTORY: &str = "/run/sockets";

/// Bytes of one frame at most.
const MAX_FRAME: usize = 64 << 10;

/// Sessions with their idle connections, and the sockets that stand.
#[derive(Default)]
pub(crate) struct SocketForwards {
    sessions: Mutex<HashMap<u64, Session>>,
}

struct Session {
    pool: Arc<Pool>,
    exports: HashSet<String>,
}

/// Connections to the host that nobody uses. It ends with the last of them: each holds the way back.
struct Pool {
    idle: Turn<mpsc::Receiver<Idle>>,
}

struct Idle {
    connection: Box<dyn Connection>,
    back: mpsc::Sender<Idle>,
}

impl std::fmt::Debug for SocketForwards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketForwards").finish_non_exhaustive()
    }
}

/// What can be known to be wrong with the sockets below a mount.
pub(crate) fn check(mount: &v1::Mount) -> Result<(), AgentError> {
    const FIELD: &str = "spec.mounts.sockets";
    let is_directory = matches!(&mount.source, Some(Source::Shared(shared)) if !shared.socket);
    if !mount.sockets.is_empty() && !is_directory {
        let reason = format!("{} is no shared directory", mount.destination);
        return Err(AgentError::invalid(FIELD, reason));
    }
    if mount.sockets.len() > MAX_SOCKETS_BELOW {
        let reason = format!(
            "there are more than {MAX_SOCKETS_BELOW} below {}",
            mount.destination
        );
        return Err(AgentError::invalid(FIELD, reason));
    }
    for socket in &mount.sockets {
        if socket.path.is_empty() || !volumes::is_below(&socket.path) {
            let path = String::from_utf8_lossy(&socket.path);
            return Err(AgentError::invalid(FIELD, format!("{path:?} is not below")));
        }
        match &socket.source {
            Some(source) if source.socket => names::id("spec.mounts.sockets.source.export", &source.export)?,
            _ => return Err(AgentError::invalid(FIELD, "one has no source that is a socket")),
        }
    }
    Ok(())
}

/// What is to be mounted over sockets below a mount.
pub(crate) fn stage_sockets(mount: &v1::Mount) -> Vec<StageSocket> {
    let stage = |socket: &v1::SocketBelow| {
        let source = socket.source.as_ref()?;
        Some(StageSocket {
            path: socket.path.clone(),
            source: path(source).to_string_lossy().into_owned(),
            same_as: shared::path(source.session, &source.export)
                .to_string_lossy()
                .into_owned(),
        })
    };
    mount.sockets.iter().filter_map(stage).collect()
}

/// Where the socket of an export stands.
pub(crate) fn path(source: &v1::SharedSource) -> PathBuf {
    Path::new(DIRECTORY)
        .join(source.session.to_string())
        .join(&source.export)
}

impl SocketForwards {
    /// Takes the connections of a session.
    pub(crate) fn add(&self, session: u64, connections: Vec<Box<dyn Connection>>) {
        let (back, idle) = mpsc::channel(connections.len().max(1));
        for connection in connections {
            let idle = Idle {
                connection,
                back: back.clone(),
            };
            // There is room for each.
            drop(back.try_send(idle));
        }
        let pool = Arc::new(Pool {
            idle: Turn::new(idle),
        });
        let session_of = Session {
            pool,
            exports: HashSet::new(),
        };
        self.lock().insert(session, session_of);
    }

    /// Puts a socket where `source` says, with the owner and the mode of the host's, unless it stands already. Blocking.
    pub(crate) fn provide(&self, source: &v1::SharedSource) -> Result<(), AgentError> {
        let pool = {
            let sessions = self.lock();
            let session = sessions.get(&source.session).ok_or_else(|| AgentError::Unknown {
                what: "session of sockets",
                id: source.session.to_string(),
            })?;
            if session.exports.contains(&source.export) {
                return Ok(());
            }
            Arc::clone(&session.pool)
        };
        let listener = stand(source)?;
        tokio::spawn(listen(listener, pool, source.export.clone()));
        if let Some(session) = self.lock().get_mut(&source.session) {
            session.exports.insert(source.export.clone());
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Session>> {
        // Each change is one insertion.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stand(source: &v1::SharedSource) -> Result<UnixListener, AgentError> {
    let host = shared::path(source.session, &source.export);
    let step = || format!("making a socket for {}", host.display());
    let metadata = fs::symlink_metadata(&host).at(step)?;
    if !metadata.file_type().is_socket() {
        return Err(AgentError::invalid(
            "spec.mounts.shared.socket",
            "it is no socket",
        ));
    }
    let place = path(source);
    if let Some(directory) = place.parent() {
        fs::create_dir_all(directory).at(step)?;
    }
    // A failed attempt may have left one.
    match fs::remove_file(&place) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).at(step),
        _ => {}
    }
    let listener = Listening::bind(&place).at(step)?;
    std::os::unix::fs::chown(&place, Some(metadata.uid()), Some(metadata.gid())).at(step)?;
    fs::set_permissions(&place, fs::Permissions::from_mode(metadata.mode() & 0o7777)).at(step)?;
    listener.set_nonblocking(true).at(step)?;
    UnixListener::from_std(listener).at(step)
}

async fn listen(listener: UnixListener, pool: Arc<Pool>, export: String) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(serve(client, Arc::clone(&pool), export.clone()));
            }
            // Out of descriptors, say: others need the time to give some back.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
}

/// One connection of a container's. When all of the session's are in use it waits for one; a host that refuses closes it.
async fn serve(client: UnixStream, pool: Arc<Pool>, export: String) {
    loop {
        // Nothing: the server on the host is gone.
        let Some(mut idle) = pool.idle.lock().await.recv().await else {
            return;
        };
        match open(&mut idle.connection, &export).await {
            Ok(true) => {
                if exchange(client, &mut idle.connection).await.is_ok() {
                    give_back(idle).await;
                }
                return;
            }
            Ok(false) => {
                give_back(idle).await;
                return;
            }
            // This one is broken; another may do.
            Err(_) => {}
        }
    }
}

async fn give_back(idle: Idle) {
    let back = idle.back.clone();
    // There is room for each; without anybody to take it, the session has ended.
    drop(back.send(idle).await);
}

/// Whether the host connects.
async fn open(connection: &mut Box<dyn Connection>, export: &str) -> io::Result<bool> {
    let length = u8::try_from(export.len()).map_err(io::Error::other)?;
    let message = [&[length], export.as_bytes()].concat();
    connection.write_all(&message).await?;
    connection.flush().await?;
    let mut errno = [0; 4];
    connection.read_exact(&mut errno).await?;
    Ok(i32::from_le_bytes(errno) == 0)
}

/// Copies both directions until both have ended. An error is one of the connection to the host.
async fn exchange(client: UnixStream, connection: &mut Box<dyn Connection>) -> io::Result<()> {
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let forth = send(&client, &mut to_host);
    let back = receive(&mut from_host, &client);
    tokio::try_join!(forth, back).map(|_| ())
}

/// What the client says, in frames; its end as what it is.
async fn send(client: &UnixStream, host: &mut (impl tokio::io::AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; 4 + MAX_FRAME];
    loop {
        client.readable().await?;
        let read = match client.try_read(buffer.get_mut(4..).unwrap_or_default()) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => 0,
        };
        let word = match read {
            0 if is_closed(client) => FORWARD_CLOSED,
            read => u32::try_from(read).unwrap_or(FORWARD_CLOSED),
        };
        if let Some(head) = buffer.get_mut(..4) {
            head.copy_from_slice(&word.to_le_bytes());
        }
        host.write_all(buffer.get(..4 + read).unwrap_or_default()).await?;
        host.flush().await?;
        if read == 0 {
            return Ok(());
        }
    }
}

/// Frames of the host to the client. What the client does not take is dropped.
async fn receive(host: &mut (impl tokio::io::AsyncRead + Unpin), client: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; MAX_FRAME];
    let mut takes = true;
    loop {
        let length = match host.read_u32_le().await? {
            0 => return shut(client, rustix::net::Shutdown::Write),
            FORWARD_CLOSED => return shut(client, rustix::net::Shutdown::Both),
            length => usize::try_from(length).unwrap_or(usize::MAX),
        };
        let frame = buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
        host.read_exact(frame).await?;
        takes = takes && write_all(client, frame).await.is_ok();
    }
}

async fn write_all(client: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        client.writable().await?;
        match client.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A client that is gone already needs no word.
fn shut(client: &UnixStream, how: rustix::net::Shutdown) -> io::Result<()> {
    match rustix::net::shutdown(client, how) {
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether the client takes no more either.
fn is_closed(client: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_err()
        || fds
            .iter()
            .any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The container's end of a connection, and the host's.
    fn pair() -> (UnixStream, Box<dyn Connection>, UnixStream, UnixStream) {
        let (client, app) = UnixStream::pair().unwrap();
        let (connection, host) = UnixStream::pair().unwrap();
        (client, Box::new(connection), app, host)
    }

    #[test]
    fn sockets_are_below_a_shared_directory_and_nowhere_else() {
        let source = |socket| v1::SharedSource {
            session: 1,
            export: "7".into(),
            socket,
        };
        let below = |path: &[u8], socket| v1::SocketBelow {
            path: path.to_vec(),
            source: Some(source(socket)),
        };
        let mount = |shared, sockets| v1::Mount {
            destination: "/run".into(),
            source: Some(Source::Shared(source(shared))),
            sockets,
            ..v1::Mount::default()
        };
        let odd = || below(b".caisson-unfinished/\xff \n", true);
        assert!(check(&mount(false, vec![odd()])).is_ok());
        assert!(check(&mount(false, vec![odd(); MAX_SOCKETS_BELOW + 1])).is_err());
        assert!(check(&mount(true, vec![odd()])).is_err());
        assert!(check(&mount(false, vec![below(b"a", false)])).is_err());
        for bad in ["", "/a", "..", "a/../b", "a//b", "./a", "a/", "a\0"] {
            assert!(
                check(&mount(false, vec![below(bad.as_bytes(), true)])).is_err(),
                "{bad:?}"
            );
        }
        let staged = stage_sockets(&mount(false, vec![odd()]));
        assert_eq!(staged[0].source, "/run/sockets/1/7");
        assert_eq!(staged[0].same_as, "/run/shared/1/7");
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_the_connection_is_free_again() {
        let (client, connection, mut app, mut host) = pair();
        let (back, idle) = mpsc::channel(1);
        back.try_send(Idle {
            connection,
            back: back.clone(),
        })
        .ok()
        .unwrap();
        drop(back);
        let pool = Arc::new(Pool {
            idle: Turn::new(idle),
        });
        let serving = tokio::spawn(serve(client, Arc::clone(&pool), "7".into()));
        let mut opened = [0; 2];
        host.read_exact(&mut opened).await.unwrap();
        assert_eq!(&opened, b"\x017");
        host.write_all(&0i32.to_le_bytes()).await.unwrap();
        app.write_all(b"ask").await.unwrap();
        app.shutdown().await.unwrap();
        assert_eq!(host.read_u32_le().await.unwrap(), 3);
        let mut asked = [0; 3];
        host.read_exact(&mut asked).await.unwrap();
        assert_eq!((&asked, host.read_u32_le().await.unwrap()), (b"ask", 0));
        host.write_all(&[6, 0, 0, 0]).await.unwrap();
        host.write_all(b"answer").await.unwrap();
        host.write_all(&FORWARD_CLOSED.to_le_bytes()).await.unwrap();
        let mut answer = String::new();
        app.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        serving.await.unwrap();
        assert!(pool.idle.lock().await.try_recv().is_ok());
    }

    #[tokio::test]
    async fn a_host_that_refuses_or_is_gone_closes_the_client() {
        for gone in [false, true] {
            let (client, connection, mut app, mut host) = pair();
            let (back, idle) = mpsc::channel(1);
            back.try_send(Idle {
                connection,
                back: back.clone(),
            })
            .ok()
            .unwrap();
            drop(back);
            let pool = Arc::new(Pool {
                idle: Turn::new(idle),
            });
            let serving = tokio::spawn(serve(client, pool, "7".into()));
            if gone {
                drop(host);
            } else {
                host.write_all(&111i32.to_le_bytes()).await.unwrap();
            }
            let mut said = Vec::new();
            drop(app.read_to_end(&mut said).await);
            assert!(said.is_empty());
            serving.await.unwrap();
        }
    }
}
