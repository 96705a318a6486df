//! Bounds what a VM can write to the host's disk through its log files.
//!
//! The console is written by the guest without limit, and the other logs could be provoked. All are opened for appending, so that
//! cutting them under the writer's feet is safe. The bound holds while a daemon runs.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

/// A log that has grown beyond this is cut.
const LIMIT_BYTES: u64 = 4 * 1024 * 1024;
/// What is kept of it, in a file beside it with `.1` appended.
const KEPT_BYTES: u64 = 256 * 1024;
const INTERVAL: Duration = Duration::from_secs(5);

/// Cuts the logs for ever; the owner aborts the task.
pub async fn keep_bounded(logs: Vec<PathBuf>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for log in &logs {
            match cut(log, LIMIT_BYTES, KEPT_BYTES) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(log = %log.display(), %error, "cannot cut the log of a VM"),
            }
        }
    }
}

fn cut(log: &Path, limit: u64, kept: u64) -> io::Result<()> {
    let length = std::fs::symlink_metadata(log)?.len();
    if length <= limit {
        return Ok(());
    }
    let mut file = OpenOptions::new().read(true).write(true).open(log)?;
    file.seek(SeekFrom::Start(length.saturating_sub(kept)))?;
    let mut older = log.as_os_str().to_owned();
    older.push(".1");
    io::copy(&mut (&file).take(kept), &mut File::create(older)?)?;
    file.set_len(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_over_the_limit_is_cut_keeps_its_end_and_the_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let mut writer = OpenOptions::new().append(true).create(true).open(&log).unwrap();
        writer.write_all(b"0123456789").unwrap();
        cut(&log, 10, 4).unwrap();
        assert_eq!(
            std::fs::read(&log).unwrap(),
            b"0123456789",
            "at the limit is not over it"
        );
        writer.write_all(b"abc").unwrap();
        cut(&log, 10, 4).unwrap();
        assert_eq!(std::fs::read(dir.path().join("console.log.1")).unwrap(), b"9abc");
        writer.write_all(b"next").unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"next");
    }
}
