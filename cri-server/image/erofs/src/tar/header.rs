//! One 512-byte header block: where its fields are and how numbers in it are written.

use crate::error::ArchiveProblem;

/// Headers and contents come in blocks of this many bytes.
pub(super) const BLOCK: usize = 512;

/// A header block.
pub(super) struct Block(pub(super) [u8; BLOCK]);

#[derive(PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Block {
    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }

    /// Old writers summed signed bytes; both are taken, as everybody does.
    pub(super) fn checksum_matches(&self) -> bool {
        let Ok(stored) = octal(self.field(148, 8), "checksum") else {
            return false;
        };
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (i, byte) in self.0.iter().enumerate() {
            let byte = if (148..156).contains(&i) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        stored == unsigned || stored == signed
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.0[156]
    }

    /// The name with the prefix that some dialects have.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(self.field(0, 100));
        let prefix = match self.dialect() {
            Dialect::V7 => &[],
            Dialect::Ustar => text(self.field(345, 155)),
            Dialect::Star => text(self.field(345, 131)),
            Dialect::Gnu => self.prefix_of_old_go(),
        };
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(self.field(157, 100)).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u16, ArchiveProblem> {
        Ok((number(self.field(100, 8), "mode")? & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<i64, ArchiveProblem> {
        number(self.field(108, 8), "uid")
    }

    pub(super) fn gid(&self) -> Result<i64, ArchiveProblem> {
        number(self.field(116, 8), "gid")
    }

    pub(super) fn size(&self) -> Result<u64, ArchiveProblem> {
        let size = number(self.field(124, 12), "size")?;
        checked_size(size)
    }

    pub(super) fn mtime(&self) -> Result<i64, ArchiveProblem> {
        number(self.field(136, 12), "mtime")
    }

    /// Major and minor, within what Linux can encode.
    pub(super) fn device(&self) -> Result<(u32, u32), ArchiveProblem> {
        if self.dialect() == Dialect::V7 {
            return Ok((0, 0));
        }
        let part = |offset, field, bits: u32| {
            let value = number(self.field(offset, 8), field)?;
            u32::try_from(value)
                .ok()
                .filter(|v| v >> bits == 0)
                .ok_or(ArchiveProblem::OutOfRange(field))
        };
        Ok((part(329, "device major", 12)?, part(337, "device minor", 20)?))
    }

    fn dialect(&self) -> Dialect {
        match self.field(257, 8) {
            b"ustar  \0" => Dialect::Gnu,
            [b'u', b's', b't', b'a', b'r', 0, ..] if self.field(508, 4) == b"tar\0" => Dialect::Star,
            [b'u', b's', b't', b'a', b'r', 0, ..] => Dialect::Ustar,
            _ => Dialect::V7,
        }
    }

    /// GNU headers have access and change times where ustar has a prefix. Go before 1.8 (thus old Docker) wrote a prefix there all the
    /// same; it is taken for one when it is text and not two times.
    fn prefix_of_old_go(&self) -> &[u8] {
        let is_time = |field: &[u8]| field.first() == Some(&0) || number(field, "time").is_ok();
        let prefix = text(self.field(345, 155));
        if is_time(self.field(345, 12)) && is_time(self.field(357, 12)) || !prefix.is_ascii() {
            return &[];
        }
        prefix
    }

    fn field(&self, offset: usize, length: usize) -> &[u8] {
        self.0.get(offset..offset + length).unwrap_or_default()
    }
}

/// A size that is not negative and leaves room for padding and sums.
pub(super) fn checked_size(size: i64) -> Result<u64, ArchiveProblem> {
    u64::try_from(size)
        .ok()
        .filter(|s| *s <= 1 << 60)
        .ok_or(ArchiveProblem::OutOfRange("size"))
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// Octal text, or GNU's base 256 when the first bit is set.
fn number(field: &[u8], name: &'static str) -> Result<i64, ArchiveProblem> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => base256(*first, rest, name),
        _ => octal(field, name),
    }
}

/// Two's complement, big endian, the marker bit left out; bit 6 of the first byte is the sign.
fn base256(first: u8, rest: &[u8], name: &'static str) -> Result<i64, ArchiveProblem> {
    let mut value = if first & 0x40 == 0 {
        i128::from(first & 0x3f)
    } else {
        i128::from(first | 0x80) - 256
    };
    for byte in rest {
        value = (value << 8) | i128::from(*byte);
    }
    i64::try_from(value).map_err(|_| ArchiveProblem::Number(name))
}

fn octal(field: &[u8], name: &'static str) -> Result<i64, ArchiveProblem> {
    let is_filler = |b: &u8| *b == b' ' || *b == 0;
    let start = field.iter().position(|b| !is_filler(b)).unwrap_or(field.len());
    let end = field
        .iter()
        .rposition(|b| !is_filler(b))
        .map_or(start, |last| last + 1);
    // Twelve digits at most: 36 bits cannot overflow.
    field
        .get(start..end)
        .unwrap_or_default()
        .iter()
        .try_fold(0_i64, |value, digit| match digit {
            b'0'..=b'7' => Ok(value << 3 | i64::from(digit - b'0')),
            _ => Err(ArchiveProblem::Number(name)),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_numbers_may_be_padded_on_both_sides() {
        assert_eq!(octal(b"0000644\0", "n"), Ok(0o644));
        assert_eq!(octal(b"   644 \0", "n"), Ok(0o644));
        assert_eq!(octal(b"\0\0\0\0\0\0\0\0", "n"), Ok(0));
        assert_eq!(octal(b"777777777777", "n"), Ok(0o777777777777));
        assert!(octal(b"0000648\0", "n").is_err());
        assert!(octal(b"64 4\0\0\0\0", "n").is_err());
        assert!(octal(b"-1\0\0\0\0\0\0", "n").is_err());
    }

    #[test]
    fn base_256_numbers_may_be_negative_and_must_fit() {
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "n"), Ok(256));
        assert_eq!(number(&[0xff; 12], "n"), Ok(-1));
        assert_eq!(
            number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0], "n"),
            Ok(-256)
        );
        assert!(
            number(
                &[
                    0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff
                ],
                "n"
            )
            .is_err()
        );
        assert!(number(&[0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "n").is_err());
    }
}
