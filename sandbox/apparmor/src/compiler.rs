//! apparmor_parser(8), which nobody else can replace: policy has no written format. It is kept from the host's kernel and caches, and
//! bounded in time and in what it prints.

use std::{
    ffi::OsStr,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    time::timeout,
};

use crate::MAX_POLICY_BYTES;

/// Where Debian, Ubuntu and SUSE have it.
const PLACES: [&str; 2] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"];

/// A profile of many hundred rules takes a second.
const LIMIT: Duration = Duration::from_secs(30);

/// Most bytes of its complaints that are kept.
const MAX_WORDS: u64 = 2048;

/// It loads nothing into the host's kernel, and neither believes nor writes caches, which are of the host's kernel.
pub(crate) const WITHOUT_KERNEL: [&str; 3] = ["--skip-kernel-load", "--skip-cache", "--quiet"];

/// Where the compiler is, if anywhere.
pub(crate) fn path(configured: Option<&Path>) -> Option<PathBuf> {
    match configured {
        Some(path) => path.exists().then(|| path.to_owned()),
        None => PLACES.iter().map(PathBuf::from).find(|path| path.exists()),
    }
}

/// A file with a kernel's features, for as long as it is held.
pub(crate) fn features(text: &str) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(text.as_bytes())?;
    Ok(file)
}

/// Runs it; answers what it printed, or its complaint.
pub(crate) async fn run(parser: &Path, arguments: &[&OsStr]) -> Result<Vec<u8>, String> {
    let child = Command::new(parser)
        .args(arguments)
        .env_clear()
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let mut child = child.map_err(|error| error.to_string())?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = async {
        let (printed, words) = tokio::join!(read(stdout, MAX_POLICY_BYTES + 1), read(stderr, MAX_WORDS));
        let status = child.wait().await?;
        Ok::<_, io::Error>((status, printed?, words?))
    };
    let (status, printed, words) = timeout(LIMIT, ended)
        .await
        .map_err(|_| format!("it did not end within {} s and was killed", LIMIT.as_secs()))?
        .map_err(|error| error.to_string())?;
    if u64::try_from(printed.len()).is_ok_and(|length| length > MAX_POLICY_BYTES) {
        return Err(format!("it printed over {MAX_POLICY_BYTES} bytes"));
    }
    if !status.success() {
        return Err(format!("{status}: {}", one_line(&words)));
    }
    Ok(printed)
}

/// Reads `most` bytes; a program that goes on writing finds the pipe closed.
async fn read(stream: Option<impl AsyncRead + Unpin>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(most).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

fn one_line(words: &[u8]) -> String {
    String::from_utf8_lossy(words)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}
