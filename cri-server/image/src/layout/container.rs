//! Files by name, out of a directory or an archive, read where they lie.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use caisson_erofs::{MemberContent, members};

use crate::ImageError;

/// Most files of one archive.
const MAX_MEMBERS: usize = 100_000;
/// Bytes read at once.
const CHUNK: u64 = 256 << 10;

/// Where the files are.
pub(super) enum Container {
    /// Below a directory.
    Directory(PathBuf),
    /// In an archive.
    Archive {
        file: Arc<File>,
        members: BTreeMap<String, MemberContent>,
    },
}

impl Container {
    /// Opens what is at `path`; a compressed archive is decompressed into an unnamed file in `temporary`, of at most `max_bytes`.
    pub(super) fn open(path: &Path, temporary: &Path, max_bytes: u64) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Io {
            doing: "open",
            path: path.to_owned(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if metadata.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if !metadata.is_file() {
            return Err(failed(io::Error::other("it is neither a file nor a directory")));
        }
        let file = File::open(path).map_err(failed)?;
        let file = decompressed(file, temporary, max_bytes).map_err(failed)?;
        let members = index(&file).map_err(|reason| ImageError::Content {
            image: path.display().to_string(),
            reason,
        })?;
        Ok(Self::Archive {
            file: Arc::new(file),
            members,
        })
    }

    /// Whether names are looked up in a list, and so lead nowhere else.
    pub(super) fn is_archive(&self) -> bool {
        matches!(self, Self::Archive { .. })
    }

    /// The file of a name; nothing when there is none.
    pub(super) fn find(&self, name: &str) -> io::Result<Option<Section>> {
        match self {
            Self::Directory(root) => {
                let opened = File::options()
                    .read(true)
                    .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                    .open(root.join(name));
                let file = match opened {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                };
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(io::Error::other("it is no regular file"));
                }
                Ok(Some(Section {
                    file: Arc::new(file),
                    offset: 0,
                    left: metadata.len(),
                }))
            }
            Self::Archive { file, members } => {
                let content = match members.get(name) {
                    // Docker's archives of old have one layer under several names; one step is all there is.
                    Some(MemberContent::Link(target)) => {
                        let target = String::from_utf8_lossy(target);
                        let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                        normal(&format!("{directory}/{target}")).and_then(|name| members.get(&name))
                    }
                    found => found,
                };
                Ok(match content {
                    Some(MemberContent::Bytes { offset, size }) => Some(Section {
                        file: file.clone(),
                        offset: *offset,
                        left: *size,
                    }),
                    _ => None,
                })
            }
        }
    }
}

/// The archive itself, or what it is when it is not compressed.
fn decompressed(mut file: File, temporary: &Path, max_bytes: u64) -> io::Result<File> {
    let mut magic = [0; 4];
    let length = file.read(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    let input = BufReader::new(file.try_clone()?);
    let mut plain: Box<dyn Read> = match magic.get(..length).unwrap_or_default() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::stream::read::Decoder::with_buffer(input)?),
        _ => return Ok(file),
    };
    let mut output = tempfile::tempfile_in(temporary)?;
    let copied = io::copy(&mut plain.by_ref().take(max_bytes), &mut output)?;
    if copied == max_bytes && plain.read(&mut [0])? > 0 {
        return Err(io::Error::other(format!(
            "it is larger than {max_bytes} bytes when decompressed"
        )));
    }
    Ok(output)
}

fn index(mut file: &File) -> Result<BTreeMap<String, MemberContent>, String> {
    let told = |error: &dyn std::error::Error| crate::error::describe(error);
    file.seek(SeekFrom::Start(0)).map_err(|error| told(&error))?;
    let mut found = BTreeMap::new();
    let mut seen = 0;
    members(file, |member| {
        seen += 1;
        if let Some(name) = std::str::from_utf8(&member.name).ok().and_then(normal) {
            // As an unpacking tool would have it: the last one stays.
            found.insert(name, member.content);
        }
        seen <= MAX_MEMBERS
    })
    .map_err(|error| told(&error))?;
    if seen > MAX_MEMBERS {
        return Err(format!("it has more than {MAX_MEMBERS} files"));
    }
    Ok(found)
}

/// A relative name without `.` and `..`; nothing when it leads out.
fn normal(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A part of a file, read from its beginning to its end.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Section {
    /// Bytes that are left.
    pub(crate) fn len(&self) -> u64 {
        self.left
    }

    /// What is left after `bytes` of them.
    pub(super) fn from(self, bytes: u64) -> Self {
        let bytes = bytes.min(self.left);
        Self {
            offset: self.offset.saturating_add(bytes),
            left: self.left - bytes,
            ..self
        }
    }

    /// All of it, of at most `cap` bytes.
    pub(super) fn read_all(mut self, cap: u64) -> io::Result<Vec<u8>> {
        if self.left > cap {
            return Err(io::Error::other(format!("it is larger than {cap} bytes")));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = self.read_chunk()? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// The next bytes; nothing at the end. A file that became shorter is an error.
    pub(super) fn read_chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        // At most a chunk, so it fits.
        let mut buffer = vec![0; self.left.min(CHUNK) as usize];
        let read = self.file.read_at(&mut buffer, self.offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.truncate(read);
        self.offset = self.offset.saturating_add(read as u64);
        self.left -= read as u64;
        Ok(Some(buffer.into()))
    }

    /// The next bytes, read on a blocking thread.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let mut section = self.clone();
        let (section, chunk) = tokio::task::spawn_blocking(move || {
            let chunk = section.read_chunk();
            (section, chunk)
        })
        .await
        .map_err(io::Error::other)?;
        *self = section;
        chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lead_out() {
        assert_eq!(normal("./a//b/../c").as_deref(), Some("a/c"));
        assert_eq!(normal("/a").as_deref(), Some("a"));
        assert_eq!(normal("a/../../b"), None);
    }

    #[test]
    fn a_bomb_is_not_decompressed_to_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bomb.tar.zst");
        std::fs::write(&path, zstd::encode_all(io::repeat(0).take(4 << 20), 3).unwrap()).unwrap();
        let error = Container::open(&path, directory.path(), 1 << 20).err().unwrap();
        assert!(error.chain().contains("1048576"), "{}", error.chain());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
