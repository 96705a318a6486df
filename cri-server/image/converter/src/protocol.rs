//! What the process is asked and what it answers: one JSON document each over a stream socket, each ended by the end of its direction.
//! Descriptors travel with the request's first byte as SCM_RIGHTS.

use serde::{Deserialize, Serialize};

/// Longest request or reply in bytes.
pub const DOCUMENT_BYTES_MAX: usize = 64 << 10;
/// Most descriptors with one request: one output and the layers of an image. Linux takes no more than 253 at once (SCM_MAX_FD).
pub const DESCRIPTORS_MAX: usize = 253;
/// Longest error text, characters.
pub const MESSAGE_CHARS_MAX: usize = 2000;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// Converts a layer. Descriptors: where its compressed bytes come from, and an empty file to write to.
    Convert {
        /// What it may cost.
        limits: JobLimits,
        /// How the uncompressed bytes are hashed.
        diff_id: HashAlgorithm,
    },
    /// Composes an image. Descriptors: an empty file to write to, and the converted layers, bottom first.
    Compose {
        /// What it may cost.
        limits: JobLimits,
    },
    /// Makes the archive of a layer again. Descriptors: where it goes (a pipe), and the converted layers of an image up to that one, bottom first.
    Restore {
        /// What it may cost.
        limits: JobLimits,
        /// What stands in the mode of an entry.
        modes: ModeBits,
    },
}

/// What one request may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLimits {
    /// Largest uncompressed layer, and largest output.
    pub max_image_bytes: u64,
}

/// What stands in the mode of an entry of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModeBits {
    /// Permissions only.
    Permissions,
    /// The type of the file as well.
    FileType,
}

/// A hash of the OCI image specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashAlgorithm {
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Reply {
    /// The layer is converted.
    Converted(Converted),
    /// The image is composed.
    Composed(Composed),
    /// The archive is written.
    Restored(Restored),
    /// Nothing of that.
    Failed {
        /// Whose fault it was.
        fault: Fault,
        /// Which of the layers it was about, from zero.
        layer: usize,
        /// The error and its causes.
        message: String,
    },
}

/// A converted layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Converted {
    /// Hash of the uncompressed bytes, lower case digits.
    pub diff_id: String,
    /// How many they were.
    pub uncompressed_bytes: u64,
    /// Archive entries.
    pub entries: u64,
    /// Bytes of file contents; a layer without any is no part of a disk.
    pub data_bytes: u64,
    /// Length of the output.
    pub bytes: u64,
    /// Its fs-verity digest, lower case digits.
    pub verity: String,
}

/// The metadata of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Composed {
    /// Length of the output.
    pub bytes: u64,
    /// Files in the image.
    pub inodes: u64,
    /// The output's fs-verity digest, lower case digits.
    pub verity: String,
}

/// The archive of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Its length.
    pub bytes: u64,
    /// Its entries.
    pub entries: u64,
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The layer's bytes: malformed, forbidden, or not what their compression says.
    Layer,
    /// The layer's bytes, by their number or their cost: more of them would not help.
    Limit,
    /// The layer is larger than an image may be.
    TooLarge,
    /// The file system is full.
    Full,
    /// The host: input or output errors, or a converted layer that is damaged.
    Host,
}
