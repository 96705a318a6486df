//! Name/value header blocks of SPDY/3.1, section 2.6.10: one zlib stream for each direction of a session, primed with a dictionary,
//! flushed at the end of each block. Pure: no sockets.
//!
//! Every block must pass through, even when its stream is refused: later ones depend on it. A block is capped before and after
//! decompression.

use std::sync::OnceLock;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Longest decompressed block that is taken, in bytes.
pub const MAX_BLOCK: usize = 16 << 10;

/// Most headers in one block.
pub const MAX_HEADERS: usize = 64;

/// 2.6.10.1: these words, each behind its length in 32 bits, then the tail.
const WORDS: [&str; 65] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];

const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found\
500 Internal Server Error501 Not Implemented503 Service Unavailable\
Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,\
publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> &'static [u8] {
    static DICTIONARY: OnceLock<Vec<u8>> = OnceLock::new();
    DICTIONARY.get_or_init(|| {
        let mut bytes = Vec::new();
        for word in WORDS {
            // The words are short.
            bytes.put_u32(u32::try_from(word.len()).unwrap_or(0));
            bytes.put_slice(word.as_bytes());
        }
        bytes.put_slice(TAIL.as_bytes());
        bytes
    })
}

/// Names and values in the order of the block. Names are lower case; a header that came several times is one value, its parts
/// separated by NUL.
pub type Headers = Vec<(String, String)>;

/// The first part of the value of a header.
#[must_use]
pub fn value<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    let (_, value) = headers.iter().find(|(known, _)| known == name)?;
    value.split('\0').next()
}

/// Why a block is none. The session cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// zlib says so, or the stream has come to its end.
    #[error("header block is not compressed as SPDY/3.1 wants")]
    Compression,
    /// Over [`MAX_BLOCK`] or [`MAX_HEADERS`].
    #[error("header block is over the limit of {MAX_BLOCK} bytes and {MAX_HEADERS} headers")]
    TooLong,
    /// Lengths that do not add up, names that are empty, in upper case or there twice, or text that is not UTF-8.
    #[error("header block is malformed: {0}")]
    Malformed(&'static str),
}

/// The receiving direction.
#[derive(Debug)]
pub struct Inflater {
    zlib: Decompress,
}

impl Default for Inflater {
    fn default() -> Self {
        Self {
            zlib: Decompress::new(true),
        }
    }
}

impl Inflater {
    /// Reads one block.
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, BlockError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Bytes, BlockError> {
        // One byte more than may come, so that too much is seen.
        let mut plain = Vec::with_capacity(MAX_BLOCK + 1);
        let begin = self.zlib.total_in();
        loop {
            let taken = usize::try_from(self.zlib.total_in() - begin).unwrap_or(usize::MAX);
            let left = block.get(taken..).unwrap_or_default();
            let before = plain.len();
            match self.zlib.decompress_vec(left, &mut plain, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => return Err(BlockError::Compression),
                Ok(Status::Ok | Status::BufError) => {}
                Err(error) => {
                    if error.needs_dictionary().is_none() || self.zlib.set_dictionary(dictionary()).is_err() {
                        return Err(BlockError::Compression);
                    }
                    continue;
                }
            }
            if plain.len() > MAX_BLOCK {
                return Err(BlockError::TooLong);
            }
            let taken = usize::try_from(self.zlib.total_in() - begin).unwrap_or(usize::MAX);
            if taken >= block.len() {
                return Ok(plain.into());
            }
            // Neither input nor output moves: these bytes will never be a block.
            if plain.len() == before && left.len() == block.len() - taken {
                return Err(BlockError::Compression);
            }
        }
    }
}

fn parse(mut plain: &[u8]) -> Result<Headers, BlockError> {
    let cut_short = BlockError::Malformed("it is cut short");
    let count = plain.try_get_u32().map_err(|_| cut_short)?;
    if usize::try_from(count).map_or(true, |count| count > MAX_HEADERS) {
        return Err(BlockError::TooLong);
    }
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut plain)?;
        let value = text(&mut plain)?;
        if name.is_empty() || name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(BlockError::Malformed("a name is empty or in upper case"));
        }
        if headers.iter().any(|(known, _)| *known == name) {
            return Err(BlockError::Malformed("a name is there twice"));
        }
        headers.push((name, value));
    }
    if plain.is_empty() {
        Ok(headers)
    } else {
        Err(BlockError::Malformed("bytes are left over"))
    }
}

fn text(plain: &mut &[u8]) -> Result<String, BlockError> {
    let cut_short = BlockError::Malformed("it is cut short");
    let length = plain.try_get_u32().map_err(|_| cut_short)?;
    let length = usize::try_from(length).map_err(|_| cut_short)?;
    let (bytes, rest) = plain.split_at_checked(length).ok_or(cut_short)?;
    *plain = rest;
    String::from_utf8(bytes.to_vec()).map_err(|_| BlockError::Malformed("text is not UTF-8"))
}

/// The sending direction.
#[derive(Debug)]
pub struct Deflater {
    zlib: Compress,
}

impl Deflater {
    /// Begins the stream.
    pub fn new() -> Result<Self, BlockError> {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(dictionary())
            .map_err(|_| BlockError::Compression)?;
        Ok(Self { zlib })
    }

    /// Makes one block. Names are expected as [`Headers`] has them.
    pub fn write(&mut self, headers: &Headers) -> Result<Bytes, BlockError> {
        let mut plain = BytesMut::new();
        let number = |length: usize| u32::try_from(length).map_err(|_| BlockError::TooLong);
        plain.put_u32(number(headers.len())?);
        for (name, value) in headers {
            for part in [name, value] {
                plain.put_u32(number(part.len())?);
                plain.put_slice(part.as_bytes());
            }
        }
        if plain.len() > MAX_BLOCK {
            return Err(BlockError::TooLong);
        }
        // Room for a block that does not compress, so that one call does it all.
        let mut block = Vec::with_capacity(plain.len() + 128);
        let begin = self.zlib.total_in();
        let done = self
            .zlib
            .compress_vec(&plain, &mut block, FlushCompress::Sync)
            .map_err(|_| BlockError::Compression)?;
        let taken = self.zlib.total_in() - begin;
        if done != Status::Ok || taken != plain.len() as u64 || block.len() == block.capacity() {
            return Err(BlockError::Compression);
        }
        Ok(block.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers() -> impl Strategy<Value = Headers> {
        prop::collection::btree_map("[a-z][a-z0-9-]{0,20}", "[ -~\\x00]{0,200}", 0..20)
            .prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn blocks_survive_one_after_the_other(blocks in prop::collection::vec(headers(), 1..8)) {
            let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::default());
            for headers in blocks {
                let block = deflater.write(&headers).unwrap();
                prop_assert_eq!(inflater.read(&block).unwrap(), headers);
            }
        }

        #[test]
        fn no_bytes_make_the_inflater_panic(
            begin in any::<bool>(),
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut inflater = Inflater::default();
            if begin {
                inflater.read(&Deflater::new().unwrap().write(&Headers::new()).unwrap()).unwrap();
            }
            drop(inflater.read(&bytes));
        }

        #[test]
        fn no_plain_block_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(parse(&bytes));
        }
    }

    /// The checksum that every implementation's streams begin with.
    #[test]
    fn the_dictionary_is_that_of_the_specification() {
        assert_eq!(dictionary().len(), 1423);
        let block = Deflater::new().unwrap().write(&Headers::new()).unwrap();
        assert_eq!(&block[2..6], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    #[test]
    fn a_block_that_inflates_to_more_than_the_limit_is_refused() {
        let mut zlib = Compress::new(Compression::best(), true);
        zlib.set_dictionary(dictionary()).unwrap();
        let mut block = Vec::with_capacity(4096);
        zlib.compress_vec(&vec![0; 10 * MAX_BLOCK], &mut block, FlushCompress::Sync)
            .unwrap();
        assert!(block.len() < 4096);
        assert_eq!(Inflater::default().read(&block), Err(BlockError::TooLong));
    }

    #[test]
    fn malformed_blocks_are_refused_by_name() {
        let block = |parts: &[&str]| {
            let mut plain = Vec::new();
            plain.put_u32(u32::try_from(parts.len() / 2).unwrap());
            for part in parts {
                plain.put_u32(u32::try_from(part.len()).unwrap());
                plain.put_slice(part.as_bytes());
            }
            plain
        };
        assert!(parse(&block(&["a", "1", "b", "2"])).is_ok());
        for parts in [["a", "1", "a", "2"], ["A", "1", "b", "2"], ["", "1", "b", "2"]] {
            assert!(matches!(parse(&block(&parts)), Err(BlockError::Malformed(_))));
        }
        let whole = block(&["a", "1"]);
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).is_err(), "{cut}");
        }
        assert_eq!(
            parse(&[whole, vec![0]].concat()),
            Err(BlockError::Malformed("bytes are left over"))
        );
        assert_eq!(parse(&u32::MAX.to_be_bytes()), Err(BlockError::TooLong));
    }
}
