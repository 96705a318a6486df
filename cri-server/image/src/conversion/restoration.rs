//! The way out of the confined process: the archive of a layer, made again, chunk by chunk. Nothing of it is believed before whoever takes the chunks has
//! hashed them.

use std::{fs::File, io, os::fd::AsFd};

use bytes::{Bytes, BytesMut};
use caisson_layer_converter::protocol::{ModeBits, Reply, Request, Restored};
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::mpsc, time::timeout};

use super::{Converters, Failure, PIPE_BYTES, PROGRESS_DEADLINE, late, strange};
use crate::digest::Digest;

/// Bytes that are taken at once.
const CHUNK_BYTES: usize = 128 << 10;

impl Converters {
    /// Has the archive of the last of these layers made, which lies on the others, bottom first. What comes goes into `sink`; it is whole when
    /// this succeeds. `Failure::Cut` when nobody takes it any more.
    pub(crate) async fn restore(
        &self,
        layers: &[(Digest, File)],
        modes: ModeBits,
        sink: mpsc::Sender<Bytes>,
    ) -> Result<Restored, Failure> {
        let (read_end, write_end) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        // Only for speed; an unprivileged user may be over its limit.
        rustix::pipe::fcntl_setpipe_size(&write_end, PIPE_BYTES).ok();
        let mut output = pipe::Receiver::from_owned_fd(read_end)?;
        let mut files = vec![write_end.as_fd()];
        files.extend(layers.iter().map(|(_, file)| file.as_fd()));
        let request = Request::Restore {
            limits: self.limits(),
            modes,
        };
        let mut process = self.start(&request, &files)?;
        drop(write_end);
        let mut bytes = 0_u64;
        loop {
            let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
            let read = timeout(PROGRESS_DEADLINE, output.read_buf(&mut chunk)).await;
            match read.map_err(|_| late())?? {
                0 => break,
                read => bytes = bytes.saturating_add(read as u64),
            }
            if sink.send(chunk.freeze()).await.is_err() {
                return Err(Failure::Cut);
            }
        }
        match process.reply().await? {
            Reply::Restored(restored) if restored.bytes == bytes => Ok(restored),
            Reply::Restored(_) => Err(strange("it wrote another number of bytes than it says")),
            Reply::Failed {
                fault,
                layer,
                message,
            } => Err(self.failure_of(layers, layer, fault, message)),
            Reply::Converted(_) | Reply::Composed(_) => Err(strange("another question was answered")),
        }
    }
}
