//! FUSE_INIT, answered here and not by the library: what it answers for a file system that stands alone allows 4 KiB for each write.
//!
//! Numbers and layout: linux/fuse.h, protocol 7.27 and later.

use std::io;

use fuse_backend_rs::{
    abi::fuse_abi::{FsOptions, InHeader, InitOut, OutHeader},
    api::filesystem::FileSystem,
    passthrough::PassthroughFs,
};

/// Pages of 4 KiB in the largest read or write.
const MAX_PAGES: u16 = 64;

/// Bytes of the largest read or write.
pub(crate) const MAX_TRANSFER: usize = MAX_PAGES as usize * 4096;

/// Protocol that the library speaks.
const MAJOR: u32 = 7;
const MINOR: u32 = 33;
/// The oldest that has all that is used here.
const OLDEST_MINOR: u32 = 28;

/// What a kernel may do on its own account. Not among them: writeback caching, which would hide the host's changes, and locks, which the
/// pod's containers take among themselves in their kernel.
fn wanted() -> FsOptions {
    FsOptions::ASYNC_READ
        | FsOptions::ATOMIC_O_TRUNC
        | FsOptions::AUTO_INVAL_DATA
        | FsOptions::BIG_WRITES
        | FsOptions::MAX_PAGES
        | FsOptions::PARALLEL_DIROPS
}

/// The answer to an INIT message, headers included. An error of the file system is answered as such.
pub(crate) fn answer(fs: &PassthroughFs, header: &InHeader, body: &[u8]) -> io::Result<Vec<u8>> {
    let word = |at: usize| -> io::Result<u32> {
        body.get(at * 4..at * 4 + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u32::from_ne_bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an INIT message is too short"))
    };
    let (major, minor, max_readahead, flags) = (word(0)?, word(1)?, word(2)?, word(3)?);
    let mut capable = u64::from(flags);
    if FsOptions::from_bits_truncate(capable).contains(FsOptions::INIT_EXT) {
        capable |= u64::from(word(4)?) << 32;
    }
    if major != MAJOR || minor < OLDEST_MINOR {
        return Ok(error(header, libc::EPROTO));
    }
    let capable = FsOptions::from_bits_truncate(capable);
    let chosen = match fs.init(capable) {
        Ok(own) => capable & (own | wanted()) & !FsOptions::PERFILE_DAX,
        Err(cause) => return Ok(error(header, cause.raw_os_error().unwrap_or(libc::EIO))),
    };
    let out = InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead,
        flags: (chosen.bits() & u64::from(u32::MAX)) as u32,
        max_background: 64,
        congestion_threshold: 48,
        max_write: u32::from(MAX_PAGES) * 4096,
        time_gran: 1,
        max_pages: MAX_PAGES,
        flags2: 0,
        ..InitOut::default()
    };
    let mut message = head(header, size_of::<OutHeader>() + size_of::<InitOut>(), 0);
    message.extend(out.major.to_ne_bytes());
    message.extend(out.minor.to_ne_bytes());
    message.extend(out.max_readahead.to_ne_bytes());
    message.extend(out.flags.to_ne_bytes());
    message.extend(out.max_background.to_ne_bytes());
    message.extend(out.congestion_threshold.to_ne_bytes());
    message.extend(out.max_write.to_ne_bytes());
    message.extend(out.time_gran.to_ne_bytes());
    message.extend(out.max_pages.to_ne_bytes());
    message.extend(out.map_alignment.to_ne_bytes());
    message.extend(out.flags2.to_ne_bytes());
    message.resize(size_of::<OutHeader>() + size_of::<InitOut>(), 0);
    Ok(message)
}

fn error(header: &InHeader, errno: i32) -> Vec<u8> {
    head(header, size_of::<OutHeader>(), -errno)
}

fn head(header: &InHeader, length: usize, error: i32) -> Vec<u8> {
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend(error.to_ne_bytes());
    message.extend(header.unique.to_ne_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(major: u32, minor: u32, flags: u64) -> Vec<u8> {
        let mut body = Vec::new();
        for word in [major, minor, 131_072, flags as u32, (flags >> 32) as u32] {
            body.extend(word.to_ne_bytes());
        }
        body
    }

    fn file_system(root: &std::path::Path) -> PassthroughFs {
        let mut configuration = crate::serve::configuration();
        configuration.root_dir = root.to_str().unwrap().to_owned();
        PassthroughFs::new(configuration).unwrap()
    }

    #[test]
    fn writes_are_large_and_nothing_is_cached_for_writing() {
        let dir = tempfile::tempdir().unwrap();
        let header = InHeader {
            unique: 7,
            ..InHeader::default()
        };
        let all = (FsOptions::all() & !FsOptions::INIT_EXT).bits();
        let message = answer(&file_system(dir.path()), &header, &init(7, 41, all)).unwrap();
        assert_eq!(message.len(), size_of::<OutHeader>() + size_of::<InitOut>());
        let word = |at: usize| u32::from_ne_bytes(message[at * 4..at * 4 + 4].try_into().unwrap());
        assert_eq!((word(0) as usize, word(1), word(2)), (message.len(), 0, 7));
        assert_eq!((word(4), word(5)), (MAJOR, MINOR));
        let chosen = FsOptions::from_bits_truncate(u64::from(word(7)));
        assert!(chosen.contains(FsOptions::MAX_PAGES | FsOptions::AUTO_INVAL_DATA));
        assert!(!chosen.intersects(FsOptions::WRITEBACK_CACHE | FsOptions::POSIX_LOCKS));
        assert_eq!(word(9) as usize, MAX_TRANSFER);
    }

    #[test]
    fn another_protocol_is_refused_and_a_torn_message_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let fs = file_system(dir.path());
        let header = InHeader::default();
        let message = answer(&fs, &header, &init(6, 41, 0)).unwrap();
        assert_eq!(message[4..8], (-libc::EPROTO).to_ne_bytes());
        answer(&fs, &header, &[0; 8]).unwrap_err();
    }
}
