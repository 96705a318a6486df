//! What can go wrong, and whose fault it was.

use std::io;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The layer is not an archive that we read.
    #[error("layer archive at byte {offset}: {problem}")]
    Archive {
        /// Offset in the uncompressed layer.
        offset: u64,
        /// What is wrong there.
        problem: ArchiveProblem,
    },
    /// The archive is well formed, and one of its entries may not be in an image.
    #[error("layer entry {path:?}: {problem}")]
    Entry {
        /// The entry's name, shortened, as text.
        path: String,
        /// What is wrong with it.
        problem: EntryProblem,
    },
    /// The layers cost more than the limits allow.
    #[error("layers are over the limit of {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: LimitKind,
        /// How much there may be.
        limit: u64,
    },
    /// The reader of the layer failed: its transport, decompression or digest.
    #[error("read the layer at byte {offset}")]
    Input {
        /// Offset in the uncompressed layer.
        offset: u64,
        /// What the reader said.
        source: io::Error,
    },
    /// The output could not be written.
    #[error("write the output")]
    Output {
        /// What the file system said.
        source: io::Error,
    },
    /// A converted layer could not be read back, or is not one.
    #[error("read a converted layer")]
    Converted {
        /// What the file system said, or what is wrong with it.
        source: io::Error,
    },
    /// A layer failed before, so the image is not whole.
    #[error("a layer of the image failed before")]
    AlreadyFailed,
}

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The layer: trying again with the same bytes is no use.
    Layer,
    /// The layer, by its size: a larger limit would help.
    Limit,
    /// The reader that we were given; it knows whether the bytes or their transport were bad.
    Input,
    /// The host: disk full, input or output errors, a converted layer that is damaged.
    Host,
}

impl ErofsError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Archive { .. } | Self::Entry { .. } => ErrorKind::Layer,
            Self::Limit { .. } => ErrorKind::Limit,
            Self::Input { .. } => ErrorKind::Input,
            Self::Output { .. } | Self::Converted { .. } | Self::AlreadyFailed => ErrorKind::Host,
        }
    }

    /// Whether the layer's own bytes are at fault (malformed, forbidden or too large), as opposed to the host or the transport.
    pub fn is_hostile(&self) -> bool {
        matches!(self.kind(), ErrorKind::Layer | ErrorKind::Limit)
    }
}

/// What is wrong with an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveProblem {
    /// It ends inside a header or inside a file.
    #[error("archive is cut short")]
    CutShort,
    /// The sum over a header is not the one in it.
    #[error("header checksum does not match")]
    Checksum,
    /// A header between zero blocks.
    #[error("one zero block is followed by something else")]
    LoneZeroBlock,
    /// Neither octal nor base 256, or it does not fit.
    #[error("header field {0} is not a number that fits")]
    Number(&'static str),
    /// A user, group, size or device number outside of what Linux has.
    #[error("header field {0} is out of range")]
    OutOfRange(&'static str),
    /// Records of a PAX header are not `length key=value`.
    #[error("malformed extended header record")]
    PaxRecord,
    /// A PAX value that is not of its key's form.
    #[error("malformed extended header value of {0}")]
    PaxValue(&'static str),
    /// Longer than any that is of use.
    #[error("extension header of {0} bytes is too long")]
    ExtensionTooLong(u64),
    /// Two extensions of one kind for one entry, or a PAX and a GNU one that differ: parsers disagree about which counts.
    #[error("ambiguous extension headers")]
    Ambiguous,
    /// An extension with no entry after it.
    #[error("extension header without an entry")]
    DanglingExtension,
    /// GNU or PAX sparse files.
    #[error("sparse files are not supported")]
    Sparse,
    /// A kind of entry that images do not have.
    #[error("entry type {0:#04x} is not supported")]
    EntryType(u8),
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryProblem {
    /// A NUL in its name, link target or attribute name.
    #[error("name contains a nul byte")]
    Nul,
    /// `..` in its name or hard link target.
    #[error("name contains a parent directory component")]
    ParentComponent,
    /// A component of more than 255 bytes.
    #[error("name component is longer than 255 bytes")]
    NameTooLong,
    /// Nested more deeply than a path can name.
    #[error("directories are nested too deeply")]
    TooDeep,
    /// The root as something that is not a directory.
    #[error("root directory cannot be anything else")]
    Root,
    /// A whiteout that names nothing, `.` or `..`, or that is used as a directory.
    #[error("malformed whiteout name")]
    Whiteout,
    /// What is above it is a file.
    #[error("a parent of it is not a directory")]
    ParentNotDirectory,
    /// More than 40 symbolic links above it.
    #[error("too many symbolic links above it")]
    LinkLoop,
    /// A hard link to nothing.
    #[error("hard link target does not exist")]
    LinkTargetMissing,
    /// A hard link to a directory.
    #[error("hard link target is a directory")]
    LinkTargetDirectory,
    /// An empty symbolic link or one over 4095 bytes.
    #[error("symbolic link target is empty or longer than 4095 bytes")]
    SymlinkTarget,
    /// Character device 0:0, which is a whiteout for the guest's overlay.
    #[error("character device 0:0 is reserved for whiteouts")]
    WhiteoutDevice,
    /// An attribute name over 255 bytes or a value over 65535.
    #[error("extended attribute is too long")]
    XattrTooLong,
}

/// What there can be too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitKind {
    /// [`crate::Limits::max_image_bytes`].
    ImageBytes,
    /// [`crate::Limits::max_entries`].
    Entries,
    /// [`crate::Limits::max_path_bytes`].
    PathBytes,
    /// [`crate::Limits::max_xattr_bytes`].
    XattrBytes,
    /// Memory that names and metadata need while the image is built.
    TreeBytes,
    /// Work that symbolic links above entries cause.
    LinkSteps,
    /// What follows the end of an archive.
    TrailingBytes,
}

impl std::fmt::Display for LimitKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::ImageBytes => "bytes in the image",
            Self::Entries => "entries",
            Self::PathBytes => "bytes in a name",
            Self::XattrBytes => "bytes of extended attributes on a file",
            Self::TreeBytes => "bytes of names and metadata in memory",
            Self::LinkSteps => "steps through symbolic links",
            Self::TrailingBytes => "bytes after the end of the archive",
        })
    }
}

/// Why one entry is refused, before its name is put to it.
#[derive(Debug)]
pub(crate) enum Refusal {
    Entry(EntryProblem),
    Limit(LimitKind, u64),
}

impl From<EntryProblem> for Refusal {
    fn from(problem: EntryProblem) -> Self {
        Self::Entry(problem)
    }
}

impl Refusal {
    /// The error for the entry of that name. Names come from the layer, so they are shortened before they reach a log.
    pub(crate) fn of(self, path: &[u8]) -> ErofsError {
        const SHOWN: usize = 256;
        match self {
            Self::Entry(problem) => {
                let mut text = String::from_utf8_lossy(path.get(..SHOWN).unwrap_or(path)).into_owned();
                if path.len() > SHOWN {
                    text.push_str("...");
                }
                ErofsError::Entry { path: text, problem }
            }
            Self::Limit(what, limit) => ErofsError::Limit { what, limit },
        }
    }
}
