//! The checkpoint: how far a log has come, in a file of two slots that are written in turn.
//!
//! It survives the death of the daemon at any instant: a slot that was being written fails its checksum, and the other one still
//! holds. It does not survive a crash of the host: nothing is synced, and neither do the pods survive that.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::GuestError;

use super::format::Tag;

/// magic, sequence number, device, inode, size, two offsets, checksum: each 8 bytes.
const SLOT_BYTES: usize = 64;
const MAGIC: u64 = u64::from_le_bytes(*b"CSNLOG01");

/// How long a former copy of the same log may take to let go.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Stream offsets behind the last byte that is in the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Offsets {
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
}

impl Offsets {
    pub(crate) fn of(self, tag: Tag) -> u64 {
        match tag {
            Tag::Stdout => self.stdout,
            Tag::Stderr => self.stderr,
        }
    }
}

/// How far a log has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// Device and inode of the log file; zero without one.
    pub(crate) file: (u64, u64),
    /// Bytes of it that are whole records.
    pub(crate) size: u64,
    pub(crate) offsets: Offsets,
}

/// The open checkpoint file; locked, so that a log has one writer.
#[derive(Debug)]
pub(crate) struct CheckpointFile {
    file: File,
    path: PathBuf,
    sequence: u64,
}

impl CheckpointFile {
    /// Opens or makes the file. The checkpoint is absent when there is none that is whole. Blocks.
    pub(crate) fn open(path: &Path) -> Result<(Self, Option<Checkpoint>), GuestError> {
        let failed = |action| {
            move |source| GuestError::Log {
                action,
                path: path.to_owned(),
                source,
            }
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed("create the directory of"))?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed("open"))?;
        lock(&file).map_err(failed("lock"))?;
        let mut slots = Vec::new();
        for index in 0..2 {
            let mut slot = [0; SLOT_BYTES];
            if file.read_exact_at(&mut slot, index * SLOT_BYTES as u64).is_ok() {
                slots.extend(decode(&slot));
            }
        }
        let newest = slots.into_iter().max_by_key(|(sequence, _)| *sequence);
        let opened = Self {
            file,
            path: path.to_owned(),
            sequence: newest.map_or(0, |(sequence, _)| sequence),
        };
        Ok((opened, newest.map(|(_, checkpoint)| checkpoint)))
    }

    /// Writes over the older slot. Blocks.
    pub(crate) fn save(&mut self, checkpoint: &Checkpoint) -> Result<(), GuestError> {
        let sequence = self.sequence.wrapping_add(1);
        let position = (sequence % 2) * SLOT_BYTES as u64;
        self.file
            .write_all_at(&encode(sequence, checkpoint), position)
            .map_err(|source| GuestError::Log {
                action: "write",
                path: self.path.clone(),
                source,
            })?;
        self.sequence = sequence;
        Ok(())
    }
}

/// Waits for a former copy within this process, whose last write may still be under way.
fn lock(file: &File) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_LIMIT => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::ResourceBusy.into()),
            Err(TryLockError::Error(e)) => return Err(e),
        }
    }
}

fn encode(sequence: u64, checkpoint: &Checkpoint) -> [u8; SLOT_BYTES] {
    let words = [
        MAGIC,
        sequence,
        checkpoint.file.0,
        checkpoint.file.1,
        checkpoint.size,
        checkpoint.offsets.stdout,
        checkpoint.offsets.stderr,
    ];
    let mut slot = [0; SLOT_BYTES];
    let sum = checksum(&words);
    for (bytes, word) in slot.chunks_exact_mut(8).zip(words.into_iter().chain([sum])) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    slot
}

fn decode(slot: &[u8; SLOT_BYTES]) -> Option<(u64, Checkpoint)> {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(slot.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let [magic, sequence, device, inode, size, stdout, stderr, sum] = words;
    let whole = magic == MAGIC && sum == checksum(&[magic, sequence, device, inode, size, stdout, stderr]);
    whole.then_some((
        sequence,
        Checkpoint {
            file: (device, inode),
            size,
            offsets: Offsets { stdout, stderr },
        },
    ))
}

/// FNV-1a, enough to tell a torn slot from a whole one.
fn checksum(words: &[u64; 7]) -> u64 {
    words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(size: u64) -> Checkpoint {
        Checkpoint {
            file: (7, 9),
            size,
            offsets: Offsets {
                stdout: size / 2,
                stderr: 3,
            },
        }
    }

    #[test]
    fn the_newest_checkpoint_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/checkpoint");
        let (mut file, none) = CheckpointFile::open(&path).unwrap();
        assert_eq!(none, None);
        for size in 1..6 {
            file.save(&checkpoint(size)).unwrap();
        }
        drop(file);
        assert_eq!(CheckpointFile::open(&path).unwrap().1, Some(checkpoint(5)));
    }

    #[test]
    fn a_torn_slot_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        let (mut file, _) = CheckpointFile::open(&path).unwrap();
        file.save(&checkpoint(1)).unwrap();
        file.save(&checkpoint(2)).unwrap();
        drop(file);
        let raw = OpenOptions::new().write(true).open(&path).unwrap();
        raw.write_all_at(&[0xff; 9], 30).unwrap();
        assert_eq!(CheckpointFile::open(&path).unwrap().1, Some(checkpoint(1)));
    }

    #[test]
    fn a_second_writer_waits_for_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint");
        let (mut first, _) = CheckpointFile::open(&path).unwrap();
        let second = std::thread::spawn({
            let path = path.clone();
            move || CheckpointFile::open(&path).unwrap().1
        });
        first.save(&checkpoint(8)).unwrap();
        drop(first);
        assert_eq!(second.join().unwrap(), Some(checkpoint(8)));
    }
}
