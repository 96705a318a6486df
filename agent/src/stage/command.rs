//! The last steps: environment, working directory, finding the program, execve. The words of the errors are those that users of
//! containers know.
#![expect(unsafe_code, reason = "execve, close_range and signal have no safe form")]

use std::{
    ffi::{CString, c_char},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use rustix::{
    fs::{Access, AtFlags, Mode, accessat},
    io::Errno,
};

use super::{At, StageError};

/// What images without a PATH get.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment with PATH and HOME added where they are missing.
pub(super) fn environment(given: &[Vec<u8>], home: &str) -> Vec<Vec<u8>> {
    let mut all = given.to_vec();
    if value(&all, b"PATH").is_none() {
        all.push([b"PATH=", DEFAULT_PATH].concat());
    }
    if value(&all, b"HOME").is_none_or(<[u8]>::is_empty) {
        all.retain(|entry| !entry.starts_with(b"HOME="));
        let home = if home.is_empty() { "/" } else { home };
        all.push([b"HOME=", home.as_bytes()].concat());
    }
    all
}

/// The last value of a variable.
fn value<'a>(environment: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    environment
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))
}

/// Enters the working directory, which is made when the image lacks it.
pub(super) fn enter_directory(path: &str) -> Result<(), StageError> {
    let path = if path.is_empty() { "/" } else { path };
    if let Err(Errno::NOENT) = rustix::process::chdir(path) {
        std::fs::create_dir_all(path).at(|| format!("creating the working directory {path}"))?;
    }
    rustix::process::chdir(path).at(|| format!("entering the working directory {path}"))
}

/// Finds the program as execvp would. `lookup` says what is wrong with a path, if anything.
fn find(
    program: &[u8],
    path: &[u8],
    lookup: impl Fn(&[u8]) -> Result<(), Errno>,
) -> Result<Vec<u8>, StageError> {
    let name = String::from_utf8_lossy(program).into_owned();
    if program.is_empty() {
        return Err(StageError::Command(
            "\"\": executable file not found in $PATH".to_owned(),
        ));
    }
    if program.contains(&b'/') {
        return match lookup(program) {
            Ok(()) => Ok(program.to_vec()),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(StageError::Command(format!(
                "{name:?}: stat {name}: no such file or directory"
            ))),
            Err(error) => Err(StageError::Command(format!("{name:?}: {}", words(error)))),
        };
    }
    let mut denied = false;
    for directory in path.split(|byte| *byte == b':') {
        let directory: &[u8] = if directory.is_empty() { b"." } else { directory };
        let candidate = [directory, b"/", program].concat();
        match lookup(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ACCESS) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return Err(StageError::Command(format!("{name:?}: permission denied")));
    }
    Err(StageError::Command(format!(
        "{name:?}: executable file not found in $PATH"
    )))
}

fn words(error: Errno) -> String {
    match error {
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::ACCESS | Errno::PERM => "permission denied".to_owned(),
        Errno::NOEXEC => "exec format error".to_owned(),
        Errno::ISDIR => "is a directory".to_owned(),
        Errno::TOOBIG => "argument list too long".to_owned(),
        other => other.to_string().to_lowercase(),
    }
}

/// A file that this user may execute.
fn executable(path: &[u8]) -> Result<(), Errno> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let metadata =
        std::fs::metadata(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if metadata.is_dir() {
        return Err(Errno::ISDIR);
    }
    accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// Replaces this process; `last` is what happens right before. Returns only with an error.
pub(super) fn execute(
    arguments: &[Vec<u8>],
    environment: &[Vec<u8>],
    last: impl FnOnce() -> Result<(), StageError>,
) -> Result<(), StageError> {
    let program = arguments
        .first()
        .ok_or_else(|| StageError::Command("no command given".to_owned()))?;
    let path = value(environment, b"PATH").unwrap_or(DEFAULT_PATH);
    let found = find(program, path, executable)?;
    let file = c_string(&found)?;
    let arguments = arguments
        .iter()
        .map(|argument| c_string(argument))
        .collect::<Result<Vec<_>, _>>()?;
    let environment = environment
        .iter()
        .map(|entry| c_string(entry))
        .collect::<Result<Vec<_>, _>>()?;
    forget_signals();
    rustix::process::umask(Mode::from_raw_mode(0o022));
    close_on_exec();
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    last()?;
    // SAFETY: both arrays end with a null pointer, and every string lives until the call returns or replaces this process.
    unsafe { libc::execve(file.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let error = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    Err(StageError::Command(format!(
        "{}: {}",
        String::from_utf8_lossy(&found),
        words(error)
    )))
}

fn c_string(bytes: &[u8]) -> Result<CString, StageError> {
    CString::new(bytes)
        .map_err(|_| StageError::Invalid("an argument or variable contains a NUL byte".to_owned()))
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// All signals do what they do by default, and none is blocked.
fn forget_signals() {
    for number in 1..=64 {
        // SAFETY: SIG_DFL runs no code of ours. Numbers that cannot be changed are refused without effect.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    let none: u64 = 0;
    // SAFETY: the kernel reads eight bytes from `none`, which outlives the call, and writes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            std::ptr::from_ref(&none),
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
}

/// Nothing but 0, 1 and 2 survives, whatever was opened how.
fn close_on_exec() {
    // SAFETY: marking descriptors invalidates none of them for the code before execve.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(found: Result<Vec<u8>, StageError>) -> String {
        found.unwrap_err().to_string()
    }

    #[test]
    fn a_program_that_is_nowhere_gets_the_words_users_know() {
        let nowhere = |_: &[u8]| Err(Errno::NOENT);
        assert_eq!(
            message(find(b"x", b"/bin:/usr/bin", nowhere)),
            "exec: \"x\": executable file not found in $PATH"
        );
        assert_eq!(
            message(find(b"/x", b"/bin", nowhere)),
            "exec: \"/x\": stat /x: no such file or directory"
        );
        assert_eq!(
            message(find(b"/x", b"/bin", |_| Err(Errno::ACCESS))),
            "exec: \"/x\": permission denied"
        );
    }

    #[test]
    fn the_first_directory_that_has_the_program_wins() {
        let second = |path: &[u8]| {
            if path == b"/b/sh" {
                Ok(())
            } else {
                Err(Errno::NOENT)
            }
        };
        assert_eq!(find(b"sh", b"/a:/b:/c", second).unwrap(), b"/b/sh");
    }

    #[test]
    fn a_denied_program_is_not_reported_as_missing() {
        let denied = |path: &[u8]| {
            Err(if path == b"/a/x" {
                Errno::ACCESS
            } else {
                Errno::NOENT
            })
        };
        assert_eq!(
            message(find(b"x", b"/a:/b", denied)),
            "exec: \"x\": permission denied"
        );
    }

    #[test]
    fn home_and_path_are_added_only_when_missing() {
        let given = vec![b"PATH=/x".to_vec(), b"HOME=".to_vec()];
        assert_eq!(
            environment(&given, "/root"),
            [b"PATH=/x".to_vec(), b"HOME=/root".to_vec()]
        );
        let own = vec![b"HOME=/me".to_vec(), b"PATH=/x".to_vec()];
        assert_eq!(environment(&own, "/root"), own);
    }
}
