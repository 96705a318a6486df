//! The daemon's table of mounts, /proc/self/mountinfo (proc(5)).

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use crate::SandboxError;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// As statx(2) names it.
    pub(crate) id: u64,
    /// `major:minor` of the file system.
    pub(crate) device: String,
    /// What of the file system is mounted.
    pub(crate) root: PathBuf,
    pub(crate) point: PathBuf,
    /// Its type.
    pub(crate) file_system: String,
    /// Of the file system, not of the mount.
    pub(crate) options: String,
}

/// All of them, later ones on top of earlier ones.
#[derive(Debug)]
pub(crate) struct MountTable(Vec<Mounted>);

impl MountTable {
    pub(crate) fn read() -> Result<Self, SandboxError> {
        let table = fs::read("/proc/self/mountinfo").map_err(SandboxError::io("read the table of mounts"))?;
        Ok(Self::parse(&table))
    }

    /// Lines that make no sense are left out. Pure.
    pub(crate) fn parse(table: &[u8]) -> Self {
        Self(table.split(|byte| *byte == b'\n').filter_map(line).collect())
    }

    /// What is mounted on exactly this path.
    pub(crate) fn at(&self, path: &Path) -> Option<&Mounted> {
        self.0.iter().rev().find(|mount| mount.point == path)
    }

    /// The mount that a path is on.
    pub(crate) fn of(&self, path: &Path) -> Option<&Mounted> {
        path.ancestors().find_map(|above| self.at(above))
    }

    /// The mount of this number.
    pub(crate) fn numbered(&self, id: u64) -> Option<&Mounted> {
        self.0.iter().find(|mount| mount.id == id)
    }

    /// Whether something is mounted below.
    pub(crate) fn has_below(&self, path: &Path) -> bool {
        self.0
            .iter()
            .any(|mount| mount.point != path && mount.point.starts_with(path))
    }
}

impl Mounted {
    /// The device as numbers.
    pub(crate) fn device_numbers(&self) -> Option<(u32, u32)> {
        let (major, minor) = self.device.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }
}

fn line(line: &[u8]) -> Option<Mounted> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let mark = fields.iter().position(|field| *field == b"-")?;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(Mounted {
        id: text(fields.first()?).parse().ok()?,
        device: text(fields.get(2)?),
        root: unescape(fields.get(3)?),
        point: unescape(fields.get(4)?),
        file_system: text(fields.get(mark + 1)?),
        options: text(fields.get(mark + 3)?),
    })
}

/// Blanks, tabs, line ends and backslashes come as octal numbers.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let number = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_blanks_are_read_as_they_are() {
        let table = MountTable::parse(
            b"1 2 0:3 / / rw shared:1 - ext4 /dev/vda rw\n\
              9 1 0:4 /x /a\\040b\\134c rw - tmpfs none rw,size=1k\nnonsense\n",
        );
        let mount = table.at(Path::new("/a b\\c")).unwrap();
        assert_eq!(
            (mount.device.as_str(), mount.root.as_path()),
            ("0:4", Path::new("/x"))
        );
        assert_eq!(
            (mount.file_system.as_str(), mount.options.as_str()),
            ("tmpfs", "rw,size=1k")
        );
        assert_eq!((mount.id, mount.device_numbers()), (9, Some((0, 4))));
        assert_eq!(table.numbered(9), Some(mount));
        assert_eq!(table.of(Path::new("/a b\\c/d/e")), Some(mount));
        assert_eq!(table.of(Path::new("/a")).unwrap().file_system, "ext4");
        assert!(table.has_below(Path::new("/")) && !table.has_below(Path::new("/a b\\c")));
        assert_eq!(unescape(b"\\04"), Path::new("\\04"));
    }
}
