//! Compressed layers in, one EROFS file out, with every digest checked on the way.
//!
//! Runs on a blocking thread. Hashes the compressed bytes towards the manifest's digest and the uncompressed ones towards the config's
//! diff id, and counts both. The archive itself is read by `caisson-erofs`, the only tar parser there is.

use std::{
    error::Error,
    fs::File,
    io::{self, BufRead, BufReader, Chain, Cursor, Read},
};

use bytes::Bytes;
use caisson_erofs::{ErofsError, ErrorKind, ImageBuilder, Limits};
use tokio::sync::mpsc;

use crate::{
    digest::{Digest, Hasher},
    error::is_storage_full,
    manifest::Blob,
    transfer::Feed,
};

/// One layer as manifest and config describe it.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) blob: Blob,
    pub(crate) diff_id: Digest,
}

/// Why there is no EROFS file.
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
    /// The file could not be finished.
    Output(Box<dyn Error + Send + Sync>),
}

/// Converts the layers that arrive through `feed` into `output`, and makes it durable. Answers the file's length in bytes.
pub(crate) fn convert(
    output: File,
    layers: &[Layer],
    mut feed: mpsc::Receiver<Feed>,
    max_image_bytes: u64,
) -> Result<u64, Failure> {
    let limits = Limits {
        max_image_bytes,
        ..Limits::default()
    };
    let mut builder = ImageBuilder::new(output, limits).map_err(output_failure)?;
    let mut budget = max_image_bytes;
    for layer in layers {
        budget = convert_layer(&mut builder, layer, &mut feed, budget, max_image_bytes)?;
    }
    let summary = builder.finish().map_err(|error| match error.is_hostile() {
        true => Failure::Refused(crate::error::describe(&error)),
        false => output_failure(error),
    })?;
    summary.file.sync_all().map_err(output_failure)?;
    Ok(summary.bytes)
}

fn output_failure(error: impl Error + Send + Sync + 'static) -> Failure {
    if is_storage_full(&error) {
        Failure::Full(Box::new(error))
    } else {
        Failure::Output(Box::new(error))
    }
}

/// Converts one layer; answers how many uncompressed bytes the others may have.
fn convert_layer(
    builder: &mut ImageBuilder,
    layer: &Layer,
    feed: &mut mpsc::Receiver<Feed>,
    budget: u64,
    max_image_bytes: u64,
) -> Result<u64, Failure> {
    let mut blob = Incoming::new(feed, layer.blob.digest.hasher());
    let (outcome, counted) = read_layer(builder, layer, &mut blob, budget);
    let Counted {
        left,
        exceeded,
        diff_id,
    } = counted;
    if exceeded {
        let digest = &layer.blob.digest;
        return Err(Failure::Refused(format!(
            "its layers are larger than {max_image_bytes} bytes when uncompressed, at layer {digest}"
        )));
    }
    let outcome = match outcome {
        Err(error) if is_storage_full(error.as_ref()) => return Err(Failure::Full(error)),
        // More of it would only cost more.
        Err(source) if erofs_kind(source.as_ref()) == Some(ErrorKind::Limit) => {
            return Err(Failure::Layer {
                digest: layer.blob.digest.clone(),
                hostile: true,
                source,
            });
        }
        outcome => outcome,
    };
    // A layer that cannot be read may be another one than the manifest names; then that is what is wrong with it.
    blob.drain();
    if blob.cut {
        return Err(Failure::Cut);
    }
    let found = blob.hasher.finish();
    if found != layer.blob.digest {
        let reason = format!("layer {} has the digest {found}", layer.blob.digest);
        return Err(Failure::Refused(reason));
    }
    if let Err(source) = outcome {
        let hostile = erofs_kind(source.as_ref()) != Some(ErrorKind::Host);
        return Err(Failure::Layer {
            digest: found,
            hostile,
            source,
        });
    }
    if diff_id != layer.diff_id {
        let reason = format!(
            "layer {found} has the diff id {diff_id} instead of {}",
            layer.diff_id
        );
        return Err(Failure::Refused(reason));
    }
    Ok(left)
}

fn erofs_kind(error: &(dyn Error + 'static)) -> Option<ErrorKind> {
    error.downcast_ref::<ErofsError>().map(ErofsError::kind)
}

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

struct Counted {
    left: u64,
    exceeded: bool,
    diff_id: Digest,
}

fn read_layer(
    builder: &mut ImageBuilder,
    layer: &Layer,
    blob: &mut Incoming<'_>,
    budget: u64,
) -> (Outcome, Counted) {
    let hasher = layer.diff_id.hasher();
    let decoder = match decoder(blob) {
        Ok(decoder) => decoder,
        Err(error) => {
            let counted = Counted {
                left: budget,
                exceeded: false,
                diff_id: hasher.finish(),
            };
            return (Err(Box::new(error)), counted);
        }
    };
    let mut content = Uncompressed {
        inner: decoder,
        hasher,
        left: budget,
        exceeded: false,
    };
    let outcome = builder.layer(&mut content).map_err(Into::into).and_then(|_| {
        // What follows the archive's end counts for the digest.
        io::copy(&mut content, &mut io::sink())?;
        Ok(())
    });
    let counted = Counted {
        left: content.left,
        exceeded: content.exceeded,
        diff_id: content.hasher.finish(),
    };
    (outcome, counted)
}

type Peeked<'a, 'f> = Chain<Cursor<Vec<u8>>, &'a mut Incoming<'f>>;

/// Undoes the compression that the first bytes show: media types are known to be wrong about it, and the digests decide anyway.
fn decoder<'a>(blob: &'a mut Incoming<'_>) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    (&mut *blob).take(4).read_to_end(&mut magic)?;
    let peeked = Cursor::new(magic.clone()).chain(blob);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(peeked)),
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Box::new(zstd_decoder(peeked)?),
        _ => Box::new(BufReader::new(peeked)),
    })
}

/// libzstd refuses windows over 128 MiB by itself, so a frame header cannot ask for all memory.
fn zstd_decoder<'a, 'f>(
    input: Peeked<'a, 'f>,
) -> io::Result<zstd::stream::read::Decoder<'static, Peeked<'a, 'f>>> {
    zstd::stream::read::Decoder::with_buffer(input)
}

/// The compressed bytes of one layer.
struct Incoming<'f> {
    feed: &'f mut mpsc::Receiver<Feed>,
    current: Bytes,
    hasher: Hasher,
    ended: bool,
    /// The other side went away before the layer's end.
    cut: bool,
}

impl<'f> Incoming<'f> {
    fn new(feed: &'f mut mpsc::Receiver<Feed>, hasher: Hasher) -> Self {
        Self {
            feed,
            current: Bytes::new(),
            hasher,
            ended: false,
            cut: false,
        }
    }

    /// Reads and hashes what the decoder left.
    fn drain(&mut self) {
        while let Ok(true) = self.fill_buf().map(|bytes| !bytes.is_empty()) {
            self.current.clear();
        }
    }
}

impl BufRead for Incoming<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() && !self.ended {
            match self.feed.blocking_recv() {
                Some(Feed::Chunk(chunk)) => {
                    self.hasher.update(&chunk);
                    self.current = chunk;
                }
                Some(Feed::End) => self.ended = true,
                None => {
                    self.ended = true;
                    self.cut = true;
                }
            }
        }
        if self.cut {
            return Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "the download ended early",
            ));
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        drop(self.current.split_to(amount.min(self.current.len())));
    }
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let amount = available.len().min(buffer.len());
        buffer[..amount].copy_from_slice(&available[..amount]);
        self.consume(amount);
        Ok(amount)
    }
}

/// The archive of one layer: hashed, and not larger than what is left of the image's budget.
struct Uncompressed<R> {
    inner: R,
    hasher: Hasher,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Uncompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let amount = self.inner.read(buffer)?;
        match self.left.checked_sub(amount as u64) {
            Some(left) => self.left = left,
            None => {
                self.exceeded = true;
                return Err(io::Error::other("the image is larger than is allowed"));
            }
        }
        self.hasher.update(&buffer[..amount]);
        Ok(amount)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn decode(pieces: Vec<Vec<u8>>) -> (io::Result<Vec<u8>>, Digest) {
        let (sender, mut feed) = mpsc::channel(64);
        for piece in pieces {
            sender.blocking_send(Feed::Chunk(piece.into())).unwrap();
        }
        sender.blocking_send(Feed::End).unwrap();
        let mut incoming = Incoming::new(&mut feed, Digest::of(b"").hasher());
        let mut plain = Vec::new();
        let result = decoder(&mut incoming).and_then(|mut decoder| decoder.read_to_end(&mut plain));
        incoming.drain();
        (result.map(|_| plain), incoming.hasher.finish())
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn compression_is_recognized_by_content_even_byte_by_byte() {
        let plain = b"some archive".repeat(100);
        for packed in [
            plain.clone(),
            gzip(&plain),
            zstd::encode_all(plain.as_slice(), 3).unwrap(),
        ] {
            let digest = Digest::of(&packed);
            let pieces = packed
                .chunks(packed.len().div_ceil(60))
                .map(<[u8]>::to_vec)
                .collect();
            let (decoded, found) = decode(pieces);
            assert_eq!(decoded.unwrap(), plain);
            assert_eq!(found, digest);
        }
    }

    #[test]
    fn gzip_members_and_zstd_frames_follow_each_other() {
        let frames = [
            zstd::encode_all(&b"ab"[..], 1).unwrap(),
            zstd::encode_all(&b"cd"[..], 1).unwrap(),
        ];
        assert_eq!(decode(vec![frames.concat()]).0.unwrap(), b"abcd");
        assert_eq!(
            decode(vec![[gzip(b"ab"), gzip(b"cd")].concat()]).0.unwrap(),
            b"abcd"
        );
    }

    #[test]
    fn what_is_shorter_than_a_magic_number_is_plain() {
        assert_eq!(decode(vec![b"x".to_vec()]).0.unwrap(), b"x");
        assert_eq!(decode(vec![]).0.unwrap(), b"");
    }

    #[test]
    fn garbage_after_the_magic_number_is_an_error_and_still_hashed() {
        let packed = [&[0x1f, 0x8b][..], &[0xff; 50]].concat();
        let (decoded, found) = decode(vec![packed.clone()]);
        assert!(decoded.is_err());
        assert_eq!(found, Digest::of(&packed));
    }

    #[test]
    fn a_download_that_goes_away_is_no_end() {
        let (sender, mut feed) = mpsc::channel(4);
        sender
            .blocking_send(Feed::Chunk(Bytes::from_static(b"half")))
            .unwrap();
        drop(sender);
        let mut incoming = Incoming::new(&mut feed, Digest::of(b"").hasher());
        let mut read = Vec::new();
        assert!(incoming.read_to_end(&mut read).is_err());
        assert!(incoming.cut);
    }

    #[test]
    fn a_bomb_is_stopped_at_the_budget() {
        let inner = io::repeat(0);
        let mut content = Uncompressed {
            inner,
            hasher: Digest::of(b"").hasher(),
            left: 1 << 20,
            exceeded: false,
        };
        let read = io::copy(&mut content, &mut io::sink());
        assert!(read.is_err() && content.exceeded);
        assert!(content.left <= 1 << 20);
    }
}
