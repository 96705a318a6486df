//! The confined process that reads layers, seen from the daemon: started for one job, fed, believed as far as it can be checked.
//!
//! The compressed bytes are hashed here, on their way into the process; what it says of the uncompressed ones is compared with the image's
//! config. Must not know registries and the store.

mod restoration;

use std::{
    error::Error,
    fs::File,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use caisson_layer_converter::protocol::{
    Composed, Converted, DESCRIPTORS_MAX, DOCUMENT_BYTES_MAX, Fault, HashAlgorithm, JobLimits, Reply, Request,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    process::{Child, Command},
    sync::mpsc,
    time::timeout,
};

use crate::{
    digest::{Digest, Hasher},
    manifest::Blob,
    transfer::Feed,
};

/// How long the process may take for one chunk, or for what is left to do after the last: a layer's metadata, or an image's.
const PROGRESS_DEADLINE: Duration = Duration::from_secs(600);
/// Wanted size of the pipe into the process: fewer changes between the two.
const PIPE_BYTES: usize = 1 << 20;

/// One layer as manifest and config describe it.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) blob: Blob,
    pub(crate) diff_id: Digest,
}

/// Why there is no converted layer, or no image of them.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The download ended early; its side knows why.
    Cut,
    /// The disk is full.
    Full(Box<dyn Error + Send + Sync>),
    /// A layer's content is refused for this reason.
    Refused(String),
    /// A layer is refused or could not be converted.
    Layer {
        digest: Digest,
        hostile: bool,
        source: Box<dyn Error + Send + Sync>,
    },
    /// The process could not be started, or did not answer.
    Process(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Process(error)
    }
}

/// What the process said of a failure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Said(String);

/// Starts converters.
#[derive(Debug, Clone)]
pub(crate) struct Converters {
    program: PathBuf,
    max_image_bytes: u64,
}

impl Converters {
    pub(crate) fn new(program: PathBuf, max_image_bytes: u64) -> Self {
        Self {
            program,
            max_image_bytes,
        }
    }

    /// Converts the layer that arrives through `feed` into the empty file `output`.
    pub(crate) async fn convert(
        &self,
        layer: &Layer,
        mut feed: mpsc::Receiver<Feed>,
        output: &File,
    ) -> Result<Converted, Failure> {
        let (read_end, write_end) = pipe_into_process()?;
        let request = Request::Convert {
            limits: self.limits(),
            diff_id: match layer.diff_id.sha256_hex() {
                Some(_) => HashAlgorithm::Sha256,
                None => HashAlgorithm::Sha512,
            },
        };
        let mut process = self.start(&request, &[read_end.as_fd(), output.as_fd()])?;
        drop(read_end);
        let mut pump = Pump {
            hasher: layer.blob.digest.hasher(),
            process: Some(write_end),
        };
        let fed = pump.run(&mut feed, &mut process).await;
        let reply = match fed {
            Fed::Cut => return Err(Failure::Cut),
            Fed::Stopped(reply) => reply,
            Fed::Whole(early) => {
                // A layer that cannot be read may be another one than the manifest names; then that is what is wrong with it.
                let found = pump.hasher.finish();
                if found != layer.blob.digest {
                    let reason = format!("layer {} has the digest {found}", layer.blob.digest);
                    return Err(Failure::Refused(reason));
                }
                match early {
                    Some(reply) => reply,
                    None => process.reply().await?,
                }
            }
        };
        self.settle(layer, reply, output)
    }

    /// Judges what the process answered.
    fn settle(&self, layer: &Layer, reply: Reply, output: &File) -> Result<Converted, Failure> {
        let converted = match reply {
            Reply::Converted(converted) => converted,
            Reply::Failed { fault, message, .. } => {
                return Err(self.failure(&layer.blob.digest, fault, message));
            }
            Reply::Composed(_) | Reply::Restored(_) => {
                return Err(strange("another question was answered"));
            }
        };
        let diff_id = Digest::parse(&format!("{}:{}", layer.diff_id.algorithm(), converted.diff_id))
            .ok_or_else(|| strange("its diff id is none"))?;
        if diff_id != layer.diff_id {
            let reason = format!(
                "layer {} has the diff id {diff_id} instead of {}",
                layer.blob.digest, layer.diff_id
            );
            return Err(Failure::Refused(reason));
        }
        check_length(output, converted.bytes)?;
        Ok(converted)
    }

    /// Composes the metadata of an image of these converted layers into the empty file `output`.
    pub(crate) async fn compose(
        &self,
        layers: &[(Digest, File)],
        output: &File,
    ) -> Result<Composed, Failure> {
        let mut files = vec![output.as_fd()];
        files.extend(layers.iter().map(|(_, file)| file.as_fd()));
        let request = Request::Compose {
            limits: self.limits(),
        };
        let mut process = self.start(&request, &files)?;
        match process.reply().await? {
            Reply::Composed(composed) => {
                check_length(output, composed.bytes)?;
                Ok(composed)
            }
            Reply::Failed {
                fault,
                layer,
                message,
            } => Err(self.failure_of(layers, layer, fault, message)),
            Reply::Converted(_) | Reply::Restored(_) => Err(strange("another question was answered")),
        }
    }

    fn limits(&self) -> JobLimits {
        JobLimits {
            max_image_bytes: self.max_image_bytes,
        }
    }

    /// Of a request about these layers, of which the process names one; a number that none of them has blames the process.
    fn failure_of(&self, layers: &[(Digest, File)], layer: usize, fault: Fault, message: String) -> Failure {
        match layers.get(layer) {
            Some((digest, _)) => self.failure(digest, fault, message),
            None => Failure::Process(io::Error::other(message)),
        }
    }

    fn failure(&self, digest: &Digest, fault: Fault, message: String) -> Failure {
        let source = Box::new(Said(message));
        match fault {
            Fault::TooLarge => Failure::Refused(too_large(self.max_image_bytes, digest)),
            Fault::Full => Failure::Full(source),
            Fault::Layer | Fault::Limit | Fault::Host => Failure::Layer {
                digest: digest.clone(),
                hostile: fault != Fault::Host,
                source,
            },
        }
    }

    fn start(&self, request: &Request, files: &[BorrowedFd<'_>]) -> Result<Process, Failure> {
        let started = |error: io::Error| {
            Failure::Process(io::Error::new(
                error.kind(),
                format!("start {}: {error}", self.program.display()),
            ))
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let child = Command::new(&self.program)
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(started)?;
        send(&ours, request, files)?;
        ours.shutdown(std::net::Shutdown::Write)?;
        ours.set_nonblocking(true)?;
        Ok(Process {
            socket: UnixStream::from_std(ours)?,
            _child: child,
        })
    }
}

/// Why a layer is too much.
pub(crate) fn too_large(max_image_bytes: u64, digest: &Digest) -> String {
    format!("its layers are larger than {max_image_bytes} bytes when uncompressed, at layer {digest}")
}

/// The file system is believed more than the process.
fn check_length(output: &File, said: u64) -> Result<(), Failure> {
    if output.metadata()?.len() == said {
        Ok(())
    } else {
        Err(strange("it wrote another number of bytes than it says"))
    }
}

fn strange(what: &str) -> Failure {
    Failure::Process(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the converter's answer is unusable: {what}"),
    ))
}

fn pipe_into_process() -> io::Result<(OwnedFd, pipe::Sender)> {
    let (read_end, write_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // Only for speed; an unprivileged daemon may be over its user's limit.
    rustix::pipe::fcntl_setpipe_size(&write_end, PIPE_BYTES).ok();
    Ok((read_end, pipe::Sender::from_owned_fd(write_end)?))
}

fn send(
    socket: &std::os::unix::net::UnixStream,
    request: &Request,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(request)?;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if files.len() > DESCRIPTORS_MAX || !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} files for one converter", files.len()),
        ));
    }
    // The socket is empty, and the request is far smaller than its buffer.
    let sent = sendmsg(
        socket,
        &[IoSlice::new(&bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// One converter. It is killed when this is dropped.
struct Process {
    socket: UnixStream,
    _child: Child,
}

impl Process {
    /// Waits for the answer, which is the end of the process.
    async fn reply(&mut self) -> Result<Reply, Failure> {
        let mut bytes = Vec::new();
        let mut answer = (&mut self.socket).take(DOCUMENT_BYTES_MAX as u64);
        match timeout(PROGRESS_DEADLINE, answer.read_to_end(&mut bytes)).await {
            Ok(read) => read?,
            Err(_) => return Err(late()),
        };
        if bytes.is_empty() {
            return Err(strange("it ended without one"));
        }
        serde_json::from_slice(&bytes).map_err(|error| strange(&error.to_string()))
    }
}

fn late() -> Failure {
    Failure::Process(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the converter made no progress in {PROGRESS_DEADLINE:?}"),
    ))
}

/// How feeding a process ended.
enum Fed {
    /// The download went away.
    Cut,
    /// All of the layer has come. The answer, if the process did not want all of it.
    Whole(Option<Reply>),
    /// More of it would only cost more.
    Stopped(Reply),
}

/// The way of compressed bytes into the process.
struct Pump {
    hasher: Hasher,
    /// Closed when there is no more, or when the process wants no more.
    process: Option<pipe::Sender>,
}

impl Pump {
    async fn run(&mut self, feed: &mut mpsc::Receiver<Feed>, process: &mut Process) -> Fed {
        let mut early = None;
        loop {
            let chunk = match feed.recv().await {
                Some(Feed::Chunk(chunk)) => chunk,
                Some(Feed::End) => {
                    self.process = None;
                    return Fed::Whole(early);
                }
                None => return Fed::Cut,
            };
            self.hasher.update(&chunk);
            let Some(pipe) = &mut self.process else {
                continue;
            };
            match timeout(PROGRESS_DEADLINE, pipe.write_all(&chunk)).await {
                Ok(Ok(())) => continue,
                // It takes no more: its answer says why.
                Ok(Err(_)) => self.process = None,
                Err(_) => return Fed::Stopped(gone(&late())),
            }
            let reply = process.reply().await.unwrap_or_else(|failure| gone(&failure));
            match reply {
                Reply::Failed {
                    fault: Fault::Limit | Fault::TooLarge | Fault::Full | Fault::Host,
                    ..
                } => return Fed::Stopped(reply),
                reply => early = Some(reply),
            }
        }
    }
}

fn gone(failure: &Failure) -> Reply {
    let message = match failure {
        Failure::Process(error) => error.to_string(),
        other => format!("{other:?}"),
    };
    Reply::Failed {
        fault: Fault::Host,
        layer: 0,
        message,
    }
}
