//! The records of a PAX extended header, and which of them mean something to us.

use super::Timestamp;
use super::header::checked_size;
use crate::error::ArchiveProblem;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What a PAX header says about the entry after it. An empty value leaves the header's own, as in Go.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<Timestamp>,
    /// Names without the PAX prefix, in the order of the records; the last of a name counts.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: bool,
}

impl PaxRecords {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, ArchiveProblem> {
        let mut records = Self::default();
        while !bytes.is_empty() {
            let (key, value, rest) = split_record(bytes)?;
            records.apply(key, value)?;
            bytes = rest;
        }
        Ok(records)
    }

    /// Whether applying it to entries would change their name or where they end.
    pub(super) fn changes_framing(&self) -> bool {
        self.path.is_some() || self.link.is_some() || self.size.is_some() || self.sparse
    }

    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), ArchiveProblem> {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if key.starts_with(b"GNU.sparse.") {
            self.sparse = true;
            return Ok(());
        }
        let set = !value.is_empty();
        match key {
            b"path" => self.path = set.then(|| value.to_vec()),
            b"linkpath" => self.link = set.then(|| value.to_vec()),
            b"size" => {
                self.size = set
                    .then(|| decimal(value, "size").and_then(checked_size))
                    .transpose()?;
            }
            b"uid" => self.uid = set.then(|| decimal(value, "uid")).transpose()?,
            b"gid" => self.gid = set.then(|| decimal(value, "gid")).transpose()?,
            b"mtime" => self.mtime = set.then(|| timestamp(value)).transpose()?,
            _ => {}
        }
        Ok(())
    }
}

/// Key, value, and the records after them.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Takes `length key=value\n` apart, where the length counts itself.
fn split_record(bytes: &[u8]) -> Result<Record<'_>, ArchiveProblem> {
    let malformed = ArchiveProblem::PaxRecord;
    let space = bytes.iter().take(8).position(|b| *b == b' ').ok_or(malformed)?;
    let (length, _) = bytes.split_at(space);
    if !length.iter().all(u8::is_ascii_digit) {
        return Err(malformed);
    }
    let length = std::str::from_utf8(length)
        .ok()
        .and_then(|l| l.parse::<usize>().ok())
        .ok_or(malformed)?;
    let (record, rest) = bytes.split_at_checked(length).ok_or(malformed)?;
    let pair = record
        .get(space + 1..)
        .and_then(|r| r.strip_suffix(b"\n"))
        .ok_or(malformed)?;
    let equals = pair.iter().position(|b| *b == b'=').ok_or(malformed)?;
    let (key, value) = pair.split_at(equals);
    if key.is_empty() || key.contains(&0) {
        return Err(malformed);
    }
    Ok((key, value.get(1..).unwrap_or_default(), rest))
}

fn decimal(value: &[u8], key: &'static str) -> Result<i64, ArchiveProblem> {
    let digits = value.strip_prefix(b"-").unwrap_or(value);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(ArchiveProblem::PaxValue(key));
    }
    let text = std::str::from_utf8(value).map_err(|_| ArchiveProblem::PaxValue(key))?;
    text.parse().map_err(|_| ArchiveProblem::PaxValue(key))
}

/// Seconds with a fraction of any length, perhaps negative; digits below nanoseconds are cut.
fn timestamp(value: &[u8]) -> Result<Timestamp, ArchiveProblem> {
    let malformed = ArchiveProblem::PaxValue("mtime");
    let mut parts = value.splitn(2, |b| *b == b'.');
    let whole = parts.next().unwrap_or_default();
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(malformed);
    }
    let seconds = decimal(whole, "mtime")?;
    let nanoseconds = (0..9).fold(0_u32, |n, i| {
        n * 10 + u32::from(fraction.get(i).map_or(0, |d| d - b'0'))
    });
    if !whole.starts_with(b"-") || nanoseconds == 0 {
        return Ok(Timestamp { seconds, nanoseconds });
    }
    let seconds = seconds.checked_sub(1).ok_or(malformed)?;
    Ok(Timestamp {
        seconds,
        nanoseconds: 1_000_000_000 - nanoseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_and_may_lie_before_the_epoch() {
        let at = |seconds, nanoseconds| Ok(Timestamp { seconds, nanoseconds });
        assert_eq!(timestamp(b"1700000000.25"), at(1_700_000_000, 250_000_000));
        assert_eq!(timestamp(b"5"), at(5, 0));
        assert_eq!(timestamp(b"5."), at(5, 0));
        assert_eq!(timestamp(b"0.1234567899"), at(0, 123_456_789));
        assert_eq!(timestamp(b"-1.5"), at(-2, 500_000_000));
        assert_eq!(timestamp(b"-0.5"), at(-1, 500_000_000));
        assert_eq!(timestamp(b"-7"), at(-7, 0));
        for bad in [
            &b""[..],
            b".5",
            b"-",
            b"1.5x",
            b"+1",
            b"1e9",
            b"9223372036854775808",
        ] {
            assert!(timestamp(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn records_that_lie_about_their_length_are_refused() {
        assert_eq!(
            PaxRecords::parse(b"9 path=a\n").unwrap().path,
            Some(b"a".to_vec())
        );
        for bad in [
            &b"99 path=a\n"[..],
            b"5 path=a\n",
            b"9 path=ab",
            b"0 path=a\n",
            b"path=a\n",
            b" 9 path=a",
            b"6 =ab\n",
            b"18446744073709551616 path=a\n",
        ] {
            assert!(PaxRecords::parse(bad).is_err(), "{bad:?}");
        }
    }
}
