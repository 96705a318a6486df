//! Content digests as the OCI image specification writes them, and hashing towards them.

use std::fmt;

use sha2::{Digest as _, Sha256, Sha512};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// `sha256:<64 hex digits>` or `sha512:<128>`, lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl Digest {
    /// Nothing when the text is not a digest of a known algorithm.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (name, hex) = text.split_once(':')?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return None,
        };
        let digits = hex.len() == algorithm.hex_len() && is_lower_hex(hex);
        digits.then(|| Self {
            algorithm,
            hex: hex.to_owned(),
        })
    }

    /// Digest of bytes in memory, with SHA-256.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher(State::Sha256(Sha256::new()));
        hasher.update(bytes);
        hasher.finish()
    }

    /// A hasher of this digest's algorithm.
    pub(crate) fn hasher(&self) -> Hasher {
        Hasher(match self.algorithm {
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Box::new(Sha512::new())),
        })
    }

    /// What the bytes hash to, when it is something else than this.
    pub(crate) fn mismatch(&self, bytes: &[u8]) -> Option<Self> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        let found = hasher.finish();
        (found != *self).then_some(found)
    }

    /// Name of the algorithm.
    pub(crate) fn algorithm(&self) -> &'static str {
        self.algorithm.name()
    }

    /// The digits: a safe file name.
    pub(crate) fn hex(&self) -> &str {
        &self.hex
    }

    /// The digits, when it is a SHA-256 digest: the only kind that names images and their files.
    pub(crate) fn sha256_hex(&self) -> Option<&str> {
        (self.algorithm == Algorithm::Sha256).then_some(self.hex.as_str())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

pub(crate) fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

enum State {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

/// Hashing in progress.
pub(crate) struct Hasher(State);

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self.0 {
            State::Sha256(state) => Digest {
                algorithm: Algorithm::Sha256,
                hex: hex(&state.finalize()),
            },
            State::Sha512(state) => Digest {
                algorithm: Algorithm::Sha512,
                hex: hex(&state.finalize()),
            },
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_content_has_the_published_digest() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert!(Digest::parse(empty).is_some_and(|digest| digest.mismatch(b"").is_none()));
    }

    #[test]
    fn only_full_lower_case_digests_of_known_algorithms_parse() {
        assert!(Digest::parse(&format!("sha256:{}", "a".repeat(64))).is_some());
        assert!(Digest::parse(&format!("sha512:{}", "a".repeat(128))).is_some());
        for wrong in [
            "",
            "sha256:",
            "sha256:abc",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "sha256",
            "sha256:../x",
        ] {
            assert_eq!(Digest::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Digest::parse(&format!("sha256:{}", "A".repeat(64))), None);
        assert_eq!(Digest::parse(&format!("sha256:{}", "a".repeat(65))), None);
    }
}
