//! Judges from outside: fsck.erofs and the running kernel.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// fsck.erofs >= 1.8, if there is one: `CAISSON_FSCK_EROFS`, or what `tests/fetch-erofs-utils.sh` left in the cache.
pub(crate) fn fsck() -> Option<PathBuf> {
    let cached = || {
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/caisson"));
        let cache = std::env::var_os("CAISSON_CACHE")
            .map(PathBuf::from)
            .or_else(home)?;
        Some(cache.join("erofs-utils-1.8/fsck.erofs"))
    };
    let path = std::env::var_os("CAISSON_FSCK_EROFS")
        .map(PathBuf::from)
        .or_else(cached)?;
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no fsck.erofs >= 1.8; run tests/fetch-erofs-utils.sh or set CAISSON_FSCK_EROFS");
    None
}

/// Lets fsck.erofs check an image, its contents included.
pub(crate) fn check(fsck: &Path, image: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.erofs");
    std::fs::write(&path, image).unwrap();
    let extracted = directory.path().join("out");
    let output = Command::new(fsck)
        .arg(format!("--extract={}", extracted.display()))
        .args(["--force", "-d3"])
        .arg(&path)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "fsck.erofs: {text}");
    assert!(
        text.contains("Extracted filesystem successfully"),
        "fsck.erofs: {text}"
    );
    assert!(
        !text.contains("<E>") && !text.contains("<W>"),
        "fsck.erofs: {text}"
    );
}

/// An image that this machine's kernel has mounted, until it is dropped.
pub(crate) struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    /// Mounts the image straight from its file, or says why that is impossible here.
    pub(crate) fn new(image: &[u8]) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.erofs");
        std::fs::write(&path, image).unwrap();
        std::fs::create_dir(directory.path().join("root")).unwrap();
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return None;
        }
        match mount(
            &path,
            directory.path().join("root"),
            "erofs",
            MountFlags::RDONLY,
            None,
        ) {
            Ok(()) => Some(Self { directory }),
            // EUCLEAN, EINVAL and the like are about the image, and then the kernel's judgement is a failure of the test.
            Err(e @ (rustix::io::Errno::NODEV | rustix::io::Errno::NOTBLK | rustix::io::Errno::PERM)) => {
                eprintln!("skipped: this kernel does not mount EROFS from files: {e}");
                None
            }
            Err(e) => panic!("the kernel refuses the image: {e}"),
        }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = unmount(self.root(), UnmountFlags::DETACH) {
            eprintln!("unmount the test image: {e}");
        }
    }
}
