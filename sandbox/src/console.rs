//! The end of a VM's console for error messages. What a guest prints is hostile: control characters never reach a log or terminal.

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

/// Most bytes of console in an error.
const TAIL_BYTES: u64 = 4096;

/// Last lines of the console, one line, cleaned; `None` when there is no file. Blocking, but small.
pub(crate) fn tail(path: &Path) -> Option<String> {
    let mut file = fs::File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    Some(clean(&String::from_utf8_lossy(&bytes)))
}

fn clean(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' if chars.peek() == Some(&'[') => {
                // A control sequence ends with a byte from @ to ~ after the bracket.
                chars.next();
                for c in chars.by_ref() {
                    if ('@'..='~').contains(&c) {
                        break;
                    }
                }
            }
            '\n' if !out.is_empty() && !out.ends_with(" | ") => out.push_str(" | "),
            '\t' => out.push(' '),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out.trim_end_matches(" | ").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_one_clean_line() {
        assert_eq!(
            clean("\x1b[2J\x1b[1;1Hboot\r\n\r\nKernel panic\x07 - not syncing\r\n"),
            "boot | Kernel panic - not syncing"
        );
        assert_eq!(clean("\x1b["), "");
    }

    #[test]
    fn only_the_end_of_a_long_console_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        fs::write(&path, format!("{}the end", "x".repeat(10_000))).unwrap();
        let tail = tail(&path).unwrap();
        assert!(tail.ends_with("the end") && tail.len() == 4096);
        assert_eq!(super::tail(&dir.path().join("absent")), None);
    }
}
