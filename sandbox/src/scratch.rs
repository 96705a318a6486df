//! The pod's writable disk: a sparse copy of an ext4 file system that was made once.
//!
//! The template is made by mkfs.ext4, one for each size, with inode tables known to be zero, so that the guest's kernel has nothing
//! to initialize later. A copy shares the template's blocks where the file system can (FICLONE), and else copies only its data.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, ioctl_ficlone, seek};

use crate::{SandboxError, journal::private_dir};

/// virtio serial of the disk.
pub(crate) const SERIAL: &str = "scratch";

/// Changes when the options of mkfs change.
const LAYOUT: u32 = 1;

/// Making a file system writes a few megabytes; a disk that takes longer is no disk to run pods on.
const MKFS_LIMIT: Duration = Duration::from_secs(60);

/// Makes the template for `bytes` unless it is there. Blocking.
pub(crate) fn template(root: &Path, bytes: u64) -> Result<PathBuf, SandboxError> {
    let dir = root.join("templates");
    let path = dir.join(format!("ext4-v{LAYOUT}-{bytes}.img"));
    if path.exists() {
        return Ok(path);
    }
    private_dir(&dir)?;
    let temporary = dir.join(format!(
        "ext4-v{LAYOUT}-{bytes}.img.tmp-{}",
        uuid::Uuid::new_v4().simple()
    ));
    let made = make(&temporary, bytes).and_then(|()| {
        fs::rename(&temporary, &path).map_err(SandboxError::io(format!("rename {}", temporary.display())))
    });
    if made.is_err()
        && let Err(error) = fs::remove_file(&temporary)
    {
        tracing::debug!(path = %temporary.display(), %error, "temporary template not removed");
    }
    made.map(|()| path)
}

/// Deletes templates that an earlier daemon did not finish. Blocking.
pub(crate) fn sweep(root: &Path) -> Result<(), SandboxError> {
    let dir = root.join("templates");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(SandboxError::io(format!("list {}", dir.display()))(error)),
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().contains(".img.tmp-") {
            let path = entry.path();
            fs::remove_file(&path).map_err(SandboxError::io(format!("delete {}", path.display())))?;
        }
    }
    Ok(())
}

fn make(path: &Path, bytes: u64) -> Result<(), SandboxError> {
    let what = || format!("make disk template {}", path.display());
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(SandboxError::io(what()))?;
    file.set_len(bytes).map_err(SandboxError::io(what()))?;
    let output = Command::new("mkfs.ext4")
        // The file is new, so a discard leaves inode tables and journal as zeroes, without writing them.
        .args(["-q", "-F", "-m", "0", "-J", "size=16"])
        .args([
            "-E",
            "lazy_itable_init=0,lazy_journal_init=1,discard,root_owner=0:0",
        ])
        .arg(path)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(|child| output_within(child, MKFS_LIMIT))
        .map_err(SandboxError::io("run mkfs.ext4 (package e2fsprogs)"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("No space left on device") {
            return Err(SandboxError::io(what())(std::io::ErrorKind::StorageFull.into()));
        }
        return Err(SandboxError::Program {
            program: "mkfs.ext4",
            reason: format!("{}: {}", output.status, said.trim()),
        });
    }
    file.sync_all().map_err(SandboxError::io(what()))
}

/// What a program printed, once it has ended; one that takes too long is killed.
fn output_within(mut child: Child, limit: Duration) -> std::io::Result<Output> {
    let wait = || -> std::io::Result<bool> {
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .ok_or(std::io::ErrorKind::InvalidInput)?;
        let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let end = Instant::now() + limit;
        loop {
            let left = rustix::event::Timespec::try_from(end.saturating_duration_since(Instant::now()))
                .map_err(std::io::Error::other)?;
            let mut fds = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&left)) {
                Ok(ended) => return Ok(ended > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    };
    let ended = wait();
    if !matches!(ended, Ok(true)) {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    if ended? {
        Ok(output)
    } else {
        Err(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("it did not end within {} s and was killed", limit.as_secs()),
        ))
    }
}

/// Copies the template to `path`, which must not exist. Blocking.
pub(crate) fn copy(template: &Path, path: &Path) -> Result<(), SandboxError> {
    let source =
        fs::File::open(template).map_err(SandboxError::io(format!("open {}", template.display())))?;
    let copied = (|| {
        let target = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        if ioctl_ficlone(&target, &source).is_ok() {
            return Ok(());
        }
        copy_data(&source, &target)
    })();
    copied.map_err(SandboxError::io(format!(
        "copy disk template to {}",
        path.display()
    )))
}

fn copy_data(source: &fs::File, target: &fs::File) -> std::io::Result<()> {
    let len = source.metadata()?.len();
    ftruncate(target, len)?;
    let mut at = 0;
    while at < len {
        let start = match seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(start))?;
        let (mut from, mut to) = (start, start);
        while from < end {
            let want = usize::try_from(end - from).unwrap_or(usize::MAX).min(1 << 30);
            if copy_file_range(source, Some(&mut from), target, Some(&mut to), want)? == 0 {
                return Err(std::io::Error::new(
                    std::io::ErrorKind::UnexpectedEof,
                    "the template shrank",
                ));
            }
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_is_sparse_equal_and_a_clean_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let size = 256 << 20;
        let template_path = template(dir.path(), size).unwrap();
        assert_eq!(template(dir.path(), size).unwrap(), template_path);
        let path = dir.path().join("scratch.img");
        copy(&template_path, &path).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), size);
        assert!(meta.blocks() * 512 < 16 << 20, "{} blocks", meta.blocks());
        assert!(fs::read(&path).unwrap() == fs::read(&template_path).unwrap());
        let check = Command::new("e2fsck").arg("-fn").arg(&path).output().unwrap();
        assert!(
            check.status.success(),
            "{}",
            String::from_utf8_lossy(&check.stdout)
        );
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_at_its_deadline() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        let error = output_within(child, Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "{error}");
        assert!(!process.exists());
        let child = Command::new("true").spawn().unwrap();
        assert!(
            output_within(child, Duration::from_secs(60))
                .unwrap()
                .status
                .success()
        );
    }

    #[test]
    fn a_size_that_mkfs_refuses_leaves_no_template() {
        let dir = tempfile::tempdir().unwrap();
        let error = template(dir.path(), 1024).unwrap_err();
        assert!(error.to_string().starts_with("mkfs.ext4 failed"), "{error}");
        assert_eq!(fs::read_dir(dir.path().join("templates")).unwrap().count(), 0);
    }
}
