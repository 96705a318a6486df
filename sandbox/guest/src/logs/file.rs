//! The log file and its checkpoint, kept in step. Everything here blocks and runs on a blocking thread.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::GuestError;

use super::checkpoint::{Checkpoint, CheckpointFile, Offsets};

/// Runs work that blocks; a panic there is an error here.
pub(crate) async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, GuestError> + Send + 'static,
) -> Result<T, GuestError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(GuestError::Log {
            action: "finish work on",
            path: PathBuf::from("the log"),
            source: io::Error::other(e),
        })
    })
}

/// An open log with its checkpoint.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: Option<PathBuf>,
    file: Option<File>,
    checkpoint: CheckpointFile,
    at: Checkpoint,
}

impl LogFile {
    /// Opens or makes the log, and cuts off what a crash left behind the checkpoint.
    pub(crate) fn open(path: Option<PathBuf>, checkpoint: &Path) -> Result<Self, GuestError> {
        let (checkpoint, last) = CheckpointFile::open(checkpoint)?;
        let mut log = Self {
            path,
            file: None,
            checkpoint,
            at: last.unwrap_or_default(),
        };
        if let Some(path) = &log.path
            && last.is_some()
        {
            trim(path, &log.at)?;
        }
        log.reopen()?;
        Ok(log)
    }

    pub(crate) fn offsets(&self) -> Offsets {
        self.at.offsets
    }

    /// Opens the path anew, and notes the file that is there now.
    pub(crate) fn reopen(&mut self) -> Result<(), GuestError> {
        if let Some(path) = &self.path {
            let (file, identity, size) = open_append(path)?;
            self.file = Some(file);
            self.at.file = identity;
            self.at.size = size;
        }
        self.checkpoint.save(&self.at)
    }

    /// Appends whole records and notes that they are there. After an error nothing of them is.
    pub(crate) fn append(&mut self, records: &[u8], offsets: Offsets) -> Result<(), GuestError> {
        let mut next = Checkpoint { offsets, ..self.at };
        if let (Some(file), Some(path)) = (self.file.as_mut(), &self.path)
            && !records.is_empty()
        {
            if let Err(source) = file.write_all(records) {
                // Best effort: if the cut fails too, opening the log cuts at the checkpoint.
                if let Err(error) = file.set_len(self.at.size) {
                    tracing::warn!(path = %path.display(), %error, "half a record stays in the log");
                }
                return Err(GuestError::Log {
                    action: "write",
                    path: path.clone(),
                    source,
                });
            }
            next.size = next.size.saturating_add(records.len() as u64);
        }
        // From here on the records stay: only the checkpoint can be late, and is saved with the next ones.
        self.at = next;
        self.checkpoint.save(&self.at)
    }

    /// Saves the checkpoint again, after an error.
    pub(crate) fn save(&mut self) -> Result<(), GuestError> {
        self.checkpoint.save(&self.at)
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> GuestError + 'a {
    move |source| GuestError::Log {
        action,
        path: path.to_owned(),
        source,
    }
}

fn open_append(path: &Path) -> Result<(File, (u64, u64), u64), GuestError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed("create the directory of", path))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
        .map_err(failed("open", path))?;
    let metadata = file.metadata().map_err(failed("examine", path))?;
    Ok((file, (metadata.dev(), metadata.ino()), metadata.len()))
}

/// Cuts what was written behind the checkpoint off the file it was written to, which rotation may have renamed meanwhile.
fn trim(path: &Path, at: &Checkpoint) -> Result<(), GuestError> {
    let Some(path) = find(path, at.file) else {
        return Ok(());
    };
    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(failed("open", &path))?;
    let length = file.metadata().map_err(failed("examine", &path))?.len();
    if length > at.size {
        tracing::info!(path = %path.display(), bytes = length - at.size, "cutting unfinished records off the log");
        file.set_len(at.size).map_err(failed("cut", &path))?;
    }
    Ok(())
}

/// The file of this identity: at its path, or renamed in its directory.
fn find(path: &Path, identity: (u64, u64)) -> Option<PathBuf> {
    let is_it = |path: &Path| {
        std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && (m.dev(), m.ino()) == identity)
    };
    if is_it(path) {
        return Some(path.to_owned());
    }
    std::fs::read_dir(path.parent()?)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| is_it(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(stdout: u64) -> Offsets {
        Offsets { stdout, stderr: 0 }
    }

    #[test]
    fn a_torn_record_is_cut_off_and_whole_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (path, checkpoint) = (dir.path().join("0.log"), dir.path().join("checkpoint"));
        let mut log = LogFile::open(Some(path.clone()), &checkpoint).unwrap();
        log.append(b"whole\n", at(6)).unwrap();
        drop(log);
        std::fs::write(&path, "whole\nto").unwrap();
        let log = LogFile::open(Some(path.clone()), &checkpoint).unwrap();
        assert_eq!(log.offsets(), at(6));
        assert_eq!(std::fs::read(&path).unwrap(), b"whole\n");
    }

    #[test]
    fn a_torn_record_in_a_file_that_was_renamed_meanwhile_is_cut_off_there() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("0.log"), dir.path().join("0.log.20260101"));
        let checkpoint = dir.path().join("state/checkpoint");
        let mut log = LogFile::open(Some(path.clone()), &checkpoint).unwrap();
        log.append(b"whole\n", at(6)).unwrap();
        drop(log);
        std::fs::rename(&path, &old).unwrap();
        OpenOptions::new()
            .append(true)
            .open(&old)
            .unwrap()
            .write_all(b"to")
            .unwrap();
        let mut log = LogFile::open(Some(path.clone()), &checkpoint).unwrap();
        log.append(b"next\n", at(11)).unwrap();
        assert_eq!(std::fs::read(&old).unwrap(), b"whole\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"next\n");
    }

    #[test]
    fn a_log_that_was_emptied_by_another_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let (path, checkpoint) = (dir.path().join("0.log"), dir.path().join("checkpoint"));
        let mut log = LogFile::open(Some(path.clone()), &checkpoint).unwrap();
        log.append(b"whole\n", at(6)).unwrap();
        drop(log);
        std::fs::write(&path, "").unwrap();
        let mut log = LogFile::open(Some(path.clone()), &checkpoint).unwrap();
        log.append(b"next\n", at(11)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"next\n");
    }

    #[test]
    fn a_full_disk_leaves_no_half_record() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = dir.path().join("checkpoint");
        let mut log = LogFile::open(Some("/dev/full".into()), &checkpoint).unwrap();
        let error = log.append(b"line\n", at(5)).unwrap_err();
        assert!(error.to_string().contains("/dev/full"), "{error}");
        assert_eq!(log.offsets(), at(0));
    }

    #[test]
    fn the_log_is_readable_by_its_group_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pod/c/0.log");
        drop(LogFile::open(Some(path.clone()), &dir.path().join("checkpoint")).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o137, 0);
    }
}
