//! The node's range of pod addresses, as kubelet last told it. It outlives the daemon, since kubelet tells it again only when it changes.
//!
//! Nothing here gives out addresses: the CNI configuration does. The range is shown in Status, where an admin can compare the two.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::status::RpcError;

/// Most ranges: one of each family.
const MAX_RANGES: usize = 2;

/// Longest text that is read back.
const MAX_BYTES: u64 = 4096;

/// One range, or one of each family, separated by a comma.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCidr(String);

impl PodCidr {
    /// Checks what kubelet has sent; the error is the reason for a refusal.
    pub fn parse(text: &str) -> Result<Self, String> {
        let ranges: Vec<&str> = text.split(',').map(str::trim).collect();
        if ranges.len() > MAX_RANGES {
            return Err(format!("has {} ranges, more than {MAX_RANGES}", ranges.len()));
        }
        let mut families = Vec::new();
        for range in &ranges {
            let is_v4 = family(range)?;
            if families.contains(&is_v4) {
                return Err(format!("{text:?} has two ranges of one family"));
            }
            families.push(is_v4);
        }
        Ok(Self(ranges.join(",")))
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a range is one of IPv4.
fn family(range: &str) -> Result<bool, String> {
    let wrong = || format!("{range:?} is not a range of addresses in CIDR notation");
    let (address, length) = range.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let length: u8 = length.parse().map_err(|_| wrong())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if length > longest {
        return Err(wrong());
    }
    Ok(address.is_ipv4())
}

/// The range that is known, and the file that keeps it.
#[derive(Debug)]
pub struct PodCidrStore {
    file: PathBuf,
    known: Mutex<Option<PodCidr>>,
}

impl PodCidrStore {
    /// Reads what an earlier daemon was told. A file that makes no sense is left as it is and told of.
    #[must_use]
    pub fn open(root: &Path) -> Self {
        let file = root.join("pod-cidr");
        let known = match read(&file) {
            Ok(text) => match PodCidr::parse(text.trim()) {
                Ok(cidr) => Some(cidr),
                Err(reason) => {
                    tracing::warn!(file = %file.display(), reason, "pod CIDR not read");
                    None
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(file = %file.display(), %error, "pod CIDR not read");
                None
            }
        };
        Self {
            file,
            known: Mutex::new(known),
        }
    }

    /// The range, if kubelet has told one.
    #[must_use]
    pub fn get(&self) -> Option<PodCidr> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers another range. Blocking.
    pub fn set(&self, cidr: PodCidr) -> Result<(), RpcError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref() == Some(&cidr) {
            return Ok(());
        }
        let next = self.file.with_extension("tmp");
        let written = (|| {
            let mut file = fs::File::create(&next)?;
            io::Write::write_all(&mut file, cidr.as_str().as_bytes())?;
            file.sync_all()?;
            fs::rename(&next, &self.file)
        })();
        written.map_err(|source| RpcError::Io {
            what: format!("write {}", self.file.display()),
            source,
        })?;
        *known = Some(cidr);
        Ok(())
    }
}

fn read(file: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(file)?.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_one_or_both_families_are_taken_and_nonsense_is_not() {
        assert_eq!(PodCidr::parse("10.88.0.0/16").unwrap().as_str(), "10.88.0.0/16");
        assert_eq!(
            PodCidr::parse("10.88.0.0/16, fd00::/64").unwrap().as_str(),
            "10.88.0.0/16,fd00::/64"
        );
        for bad in [
            "",
            "10.88.0.0",
            "10.88.0.0/33",
            "x/8",
            "10.0.0.0/8,10.1.0.0/16",
            "a,b,c",
            "fd00::/129",
        ] {
            assert!(PodCidr::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_range_outlives_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let store = PodCidrStore::open(dir.path());
        assert_eq!(store.get(), None);
        let cidr = PodCidr::parse("10.1.0.0/16").unwrap();
        store.set(cidr.clone()).unwrap();
        assert_eq!(PodCidrStore::open(dir.path()).get(), Some(cidr));
    }
}
