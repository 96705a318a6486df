//! The CRI log format: `2016-10-06T00:17:09.669794202Z stdout F line`, cut into records as containerd cuts them.
//!
//! Pure: bytes and times in, bytes out.

use std::time::{SystemTime, UNIX_EPOCH};

/// Longest content of a record; a longer line becomes several, all but the last tagged `P`. As containerd's default.
pub(crate) const MAX_RECORD: usize = 16 << 10;

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const SECONDS_PER_DAY: u64 = 86_400;

/// Which stream a record names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    Stdout,
    Stderr,
}

impl Tag {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Cuts one stream into records. Holds back the beginning of an unfinished line, at most [`MAX_RECORD`] bytes of it.
#[derive(Debug)]
pub(crate) struct Cutter {
    tag: Tag,
    held: Vec<u8>,
    /// Stream offset behind the last byte that went into a record.
    written: u64,
}

impl Cutter {
    pub(crate) fn new(tag: Tag, offset: u64) -> Self {
        Self {
            tag,
            held: Vec::new(),
            written: offset,
        }
    }

    /// Stream offset behind the last byte that went into a record.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Takes the stream's next bytes and appends the records that are complete to `out`. Bytes that were taken before are left out;
    /// before a gap the held bytes become a record of their own.
    pub(crate) fn push(&mut self, start: u64, bytes: &[u8], time: SystemTime, out: &mut Vec<u8>) {
        let expected = self.written.saturating_add(self.held.len() as u64);
        if start > expected {
            self.finish(time, out);
            self.written = start;
        }
        let known = usize::try_from(expected.saturating_sub(start)).unwrap_or(usize::MAX);
        let Some(fresh) = bytes.get(known..) else { return };
        let stamp = timestamp(time);

        let mut rest = fresh;
        while let Some(newline) = rest.iter().position(|&b| b == b'\n') {
            let (line, behind) = rest.split_at(newline);
            self.line(line, &stamp, out);
            rest = behind.get(1..).unwrap_or_default();
        }
        self.hold(rest, &stamp, out);
    }

    /// The stream has ended: an unterminated line becomes a full record.
    pub(crate) fn finish(&mut self, time: SystemTime, out: &mut Vec<u8>) {
        if !self.held.is_empty() {
            let held = std::mem::take(&mut self.held);
            self.record(&held, 'F', &timestamp(time), out);
        }
    }

    /// The rest of a line whose newline follows.
    fn line(&mut self, line: &[u8], stamp: &str, out: &mut Vec<u8>) {
        if self.held.is_empty() && line.len() <= MAX_RECORD {
            self.record(line, 'F', stamp, out);
        } else {
            self.hold(line, stamp, out);
            let held = std::mem::take(&mut self.held);
            self.record(&held, 'F', stamp, out);
        }
        // The newline itself.
        self.written = self.written.saturating_add(1);
    }

    /// Adds to the unfinished line, and writes what is too long to hold. What is left is never empty unless nothing was there, so
    /// that a line's last record is an `F` with content.
    fn hold(&mut self, bytes: &[u8], stamp: &str, out: &mut Vec<u8>) {
        self.held.extend_from_slice(bytes);
        while self.held.len() > MAX_RECORD {
            let rest = self.held.split_off(MAX_RECORD);
            let full = std::mem::replace(&mut self.held, rest);
            self.record(&full, 'P', stamp, out);
        }
    }

    fn record(&mut self, content: &[u8], tag: char, stamp: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{stamp} {} {tag} ", self.tag.name()).as_bytes());
        out.extend_from_slice(content);
        out.push(b'\n');
        self.written = self.written.saturating_add(content.len() as u64);
    }
}

/// RFC 3339 in UTC with nine digits of the second. Times before 1970 are shown as 1970.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (
        since.as_secs() / SECONDS_PER_DAY,
        since.as_secs() % SECONDS_PER_DAY,
    );
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let nanos = u64::from(since.subsec_nanos()) % NANOS_PER_SECOND;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// Gregorian date of a day since 1970-01-01. Counts in years that begin in March, so that the leap day is the last.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_PER_ERA: u64 = 146_097;
    // 0000-03-01 lies 719468 days before 1970-01-01.
    let day = days.saturating_add(719_468);
    let (era, day) = (day / DAYS_PER_ERA, day % DAYS_PER_ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + carry, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64, nanos: u32) -> SystemTime {
        UNIX_EPOCH + Duration::new(seconds, nanos)
    }

    fn cut(pieces: &[&[u8]]) -> String {
        let mut cutter = Cutter::new(Tag::Stdout, 0);
        let (mut out, mut offset) = (Vec::new(), 0);
        for piece in pieces {
            cutter.push(offset, piece, UNIX_EPOCH, &mut out);
            offset += piece.len() as u64;
        }
        cutter.finish(UNIX_EPOCH, &mut out);
        assert_eq!(cutter.written(), offset);
        String::from_utf8(out)
            .unwrap()
            .replace("1970-01-01T00:00:00.000000000Z stdout ", "")
    }

    #[test]
    fn timestamps_are_those_of_date_1() {
        assert_eq!(timestamp(at(0, 0)), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            timestamp(at(1_475_713_029, 669_794_202)),
            "2016-10-06T00:17:09.669794202Z"
        );
        assert_eq!(timestamp(at(951_782_399, 1)), "2000-02-28T23:59:59.000000001Z");
        assert_eq!(timestamp(at(951_782_400, 0)), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(timestamp(at(4_107_542_399, 0)), "2100-02-28T23:59:59.000000000Z");
        assert_eq!(timestamp(at(4_107_542_400, 0)), "2100-03-01T00:00:00.000000000Z");
    }

    #[test]
    fn lines_are_full_records_and_so_is_an_unterminated_last_line() {
        assert_eq!(cut(&[b"a\nb", b"c\n\nd"]), "F a\nF bc\nF \nF d\n");
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_one_record() {
        let line = "x".repeat(MAX_RECORD);
        assert_eq!(cut(&[line.as_bytes(), b"\n"]), format!("F {line}\n"));
        assert_eq!(cut(&[line.as_bytes()]), format!("F {line}\n"));
    }

    #[test]
    fn a_longer_line_is_cut_at_the_limit_and_tagged_partial() {
        let line = "x".repeat(MAX_RECORD);
        assert_eq!(
            cut(&[line.as_bytes(), line.as_bytes(), b"y\n"]),
            format!("P {line}\nP {line}\nF y\n")
        );
    }

    #[test]
    fn before_a_gap_the_held_bytes_are_a_record_of_their_own() {
        let mut cutter = Cutter::new(Tag::Stderr, 0);
        let mut out = Vec::new();
        cutter.push(0, b"lost", UNIX_EPOCH, &mut out);
        cutter.push(10, b"found\n", UNIX_EPOCH, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains("stderr F lost\n") && text.contains("stderr F found\n"),
            "{text}"
        );
        assert_eq!(cutter.written(), 16);
    }

    proptest! {
        #[test]
        fn chunking_does_not_show_in_the_records(
            lines in proptest::collection::vec(0usize..40_000, 0..4),
            cuts in proptest::collection::vec(1usize..30_000, 1..8),
        ) {
            let mut input = Vec::new();
            for len in lines {
                input.extend(std::iter::repeat_n(b'z', len));
                input.push(b'\n');
            }
            let (mut pieces, mut rest, mut sizes) = (Vec::new(), &input[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                pieces.push(piece);
                rest = behind;
            }
            prop_assert_eq!(cut(&pieces), cut(&[&input]));
        }
    }
}
