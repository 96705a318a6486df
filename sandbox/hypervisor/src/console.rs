//! The end of a guest's console, made fit for an error message.
//!
//! Console bytes come from the guest: any length, any byte. Must not know where the text will be shown.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

/// Longest answer of [`console_tail`] whatever is asked for, bytes.
pub const CONSOLE_TAIL_MAX: usize = 64 * 1024;

/// The last whole lines of the file at `path`, `bytes` at most ([`CONSOLE_TAIL_MAX`] in any case), without control sequences.
/// Empty when nothing was printed.
pub fn console_tail(path: &Path, bytes: usize) -> io::Result<String> {
    let limit = bytes.min(CONSOLE_TAIL_MAX);
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(limit as u64);
    file.seek(SeekFrom::Start(start))?;
    let mut raw = Vec::with_capacity(limit);
    file.take(limit as u64).read_to_end(&mut raw)?;
    let text = sanitize(&raw);
    // The first line is probably a torn one, unless it is all there is.
    let whole = match text.split_once('\n') {
        Some((_, rest)) if start > 0 && !rest.is_empty() => rest,
        _ => text.as_str(),
    };
    Ok(whole.trim_end().to_owned())
}

/// The last `lines` lines of [`console_tail`], joined by line feeds.
pub fn last_lines(path: &Path, lines: usize) -> io::Result<String> {
    let text = console_tail(path, 8 * 1024)?;
    let all: Vec<&str> = text.lines().collect();
    Ok(all
        .get(all.len().saturating_sub(lines)..)
        .unwrap_or_default()
        .join("\n"))
}

/// Text without terminal control sequences (ECMA-48 CSI and OSC), carriage returns, other control characters and empty lines.
#[must_use]
pub fn sanitize(raw: &[u8]) -> String {
    let text = String::from_utf8_lossy(raw);
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => skip_sequence(&mut chars),
            '\n' if clean.is_empty() || clean.ends_with('\n') => {}
            '\n' => clean.push('\n'),
            '\t' => clean.push(' '),
            c if c.is_control() || is_invisible(c) => {}
            c => clean.push(c),
        }
    }
    clean
}

/// Reordering and zero-width characters, with which a guest could forge what an admin reads.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{fffd}')
}

fn skip_sequence(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    match chars.peek() {
        // CSI: parameters and intermediates, then one byte of 0x40..0x7e.
        Some('[') => {
            chars.next();
            while let Some(&c) = chars.peek() {
                if c == '\n' {
                    break;
                }
                chars.next();
                if ('@'..='~').contains(&c) {
                    break;
                }
            }
        }
        // OSC: until BEL or ESC \; a line feed ends it too, so that no more than a line can be hidden.
        Some(']') => {
            while let Some(&c) = chars.peek() {
                if c == '\n' {
                    break;
                }
                chars.next();
                if c == '\u{7}' {
                    break;
                }
            }
        }
        Some(&c) if c != '\n' => {
            chars.next();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::io::Write;

    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn control_sequences_and_carriage_returns_disappear() {
        let raw = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1)\r\n\r\n\x1b]0;title\x07[    0.1] Linux\x00\t6.12\r\n";
        assert_eq!(sanitize(raw), "SeaBIOS (version 1)\n[    0.1] Linux 6.12\n");
    }

    #[test]
    fn the_tail_starts_at_a_whole_line() {
        let log = file(b"first line\nsecond line\nthird line\n");
        assert_eq!(console_tail(log.path(), 15).unwrap(), "third line");
        assert_eq!(
            console_tail(log.path(), 1000).unwrap(),
            "first line\nsecond line\nthird line"
        );
        assert_eq!(last_lines(log.path(), 2).unwrap(), "second line\nthird line");
        assert_eq!(
            last_lines(log.path(), 20).unwrap(),
            "first line\nsecond line\nthird line"
        );
    }

    #[test]
    fn one_endless_line_still_shows_its_end() {
        let log = file(&[b'x'; 5000]);
        assert_eq!(console_tail(log.path(), 10).unwrap(), "xxxxxxxxxx");
        assert_eq!(console_tail(file(b"").path(), 10).unwrap(), "");
    }

    #[test]
    fn a_huge_console_is_not_read_as_a_whole() {
        let log = file(&vec![b'a'; CONSOLE_TAIL_MAX * 2]);
        assert_eq!(
            console_tail(log.path(), usize::MAX).unwrap().len(),
            CONSOLE_TAIL_MAX
        );
    }

    proptest! {
        #[test]
        fn whatever_the_guest_prints_stays_printable(raw in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let text = sanitize(&raw);
            prop_assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
            prop_assert!(!text.contains("\n\n"));
        }
    }
}
