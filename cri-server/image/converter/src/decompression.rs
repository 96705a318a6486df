//! Compressed bytes in, the archive out: hashed, counted, and never more than is allowed.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};

use sha2::{Digest as _, Sha256, Sha512};

use crate::{protocol::HashAlgorithm, verity::hex};

type Peeked<R> = Chain<Cursor<Vec<u8>>, R>;

/// Undoes the compression that the first bytes show: media types are known to be wrong about it, and the digests decide anyway.
pub(crate) fn decoder<'r>(mut input: impl BufRead + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let mut magic = Vec::new();
    (&mut input).take(4).read_to_end(&mut magic)?;
    let peeked = Cursor::new(magic.clone()).chain(input);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(peeked)),
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Box::new(zstd_decoder(peeked)?),
        _ => Box::new(BufReader::new(peeked)),
    })
}

/// libzstd refuses windows over 128 MiB by itself, so a frame header cannot ask for all memory.
fn zstd_decoder<R: BufRead>(input: Peeked<R>) -> io::Result<zstd::stream::read::Decoder<'static, Peeked<R>>> {
    zstd::stream::read::Decoder::with_buffer(input)
}

enum Hasher {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

/// The archive of a layer.
pub(crate) struct Uncompressed<R> {
    inner: R,
    hasher: Hasher,
    limit: u64,
    bytes: u64,
    exceeded: bool,
}

impl<R: Read> Uncompressed<R> {
    pub(crate) fn new(inner: R, algorithm: HashAlgorithm, limit: u64) -> Self {
        let hasher = match algorithm {
            HashAlgorithm::Sha256 => Hasher::Sha256(Sha256::new()),
            HashAlgorithm::Sha512 => Hasher::Sha512(Box::default()),
        };
        Self {
            inner,
            hasher,
            limit,
            bytes: 0,
            exceeded: false,
        }
    }

    /// Whether there was more of it than is allowed.
    pub(crate) fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// Digest, lower case digits, and number of the bytes that were read.
    pub(crate) fn finish(self) -> (String, u64) {
        let digest = match self.hasher {
            Hasher::Sha256(state) => hex(&state.finalize()),
            Hasher::Sha512(state) => hex(&state.finalize()),
        };
        (digest, self.bytes)
    }
}

impl<R: Read> Read for Uncompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes += count as u64;
        if self.bytes > self.limit {
            self.exceeded = true;
            return Err(io::Error::other("the layer is larger than an image may be"));
        }
        let read = buffer.get(..count).unwrap_or_default();
        match &mut self.hasher {
            Hasher::Sha256(state) => state.update(read),
            Hasher::Sha512(state) => state.update(read),
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn decode(packed: &[u8]) -> io::Result<Vec<u8>> {
        // Byte by byte, as a slow connection brings it.
        let mut plain = Vec::new();
        decoder(BufReader::with_capacity(1, packed))?.read_to_end(&mut plain)?;
        Ok(plain)
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
            assert_eq!(decode(&packed).unwrap(), plain);
        }
    }

    #[test]
    fn gzip_members_and_zstd_frames_follow_each_other() {
        let frames = [
            zstd::encode_all(&b"ab"[..], 1).unwrap(),
            zstd::encode_all(&b"cd"[..], 1).unwrap(),
        ];
        assert_eq!(decode(&frames.concat()).unwrap(), b"abcd");
        assert_eq!(decode(&[gzip(b"ab"), gzip(b"cd")].concat()).unwrap(), b"abcd");
    }

    #[test]
    fn what_is_shorter_than_a_magic_number_is_plain() {
        assert_eq!(decode(b"x").unwrap(), b"x");
        assert_eq!(decode(b"").unwrap(), b"");
    }

    #[test]
    fn garbage_after_the_magic_number_is_an_error() {
        assert!(decode(&[&[0x1f, 0x8b][..], &[0xff; 50]].concat()).is_err());
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        let mut content = Uncompressed::new(io::repeat(0), HashAlgorithm::Sha256, 1 << 20);
        let read = io::copy(&mut content, &mut io::sink());
        assert!(read.is_err() && content.exceeded());
        assert!(content.finish().1 <= (1 << 20) + (1 << 16));
    }

    #[test]
    fn what_was_read_is_hashed() {
        for (algorithm, digits) in [(HashAlgorithm::Sha256, 64), (HashAlgorithm::Sha512, 128)] {
            let mut content = Uncompressed::new(&b"abc"[..], algorithm, 3);
            io::copy(&mut content, &mut io::sink()).unwrap();
            let (digest, bytes) = content.finish();
            assert_eq!((digest.len(), bytes), (digits, 3));
            assert!(digest.starts_with("ba7816bf") || digest.starts_with("ddaf35a1"));
        }
    }
}
