//! Converted layers on disk, each stored once however many images have it.
//!
//! ```text
//! root/layers/<blob hex>.json    what is known of it: diff id, lengths, fs-verity digest
//! root/layers/<blob hex>.layer   the converted layer, complete and durable from the moment the name appears
//! ```
//!
//! The name is the digest of the *compressed* bytes: that is what this daemon hashes itself, so that a layer which takes its converter over
//! can spoil no other. Blocks; called on blocking threads.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use caisson_layer_converter::protocol::Converted;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::{
    ImageError,
    digest::{Digest, is_lower_hex},
    store::{entries, failed, sync_directory, unlink},
};

const CONTENT: &str = "layer";
const RECORD: &str = "json";
/// Form of a record; one of another form is no layer.
const SCHEMA: u32 = 1;
/// Longest record in bytes.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// What is known of a converted layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    schema: u32,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: String,
    pub(crate) uncompressed_bytes: u64,
    pub(crate) entries: u64,
    /// Bytes of file contents. Without any, it is no part of a disk.
    pub(crate) data_bytes: u64,
    /// Length of the file.
    pub(crate) bytes: u64,
    /// The file's fs-verity digest, lower case digits.
    pub(crate) verity: String,
}

impl LayerRecord {
    pub(crate) fn new(diff_id: &Digest, converted: Converted) -> Self {
        Self {
            schema: SCHEMA,
            diff_id: diff_id.to_string(),
            uncompressed_bytes: converted.uncompressed_bytes,
            entries: converted.entries,
            data_bytes: converted.data_bytes,
            bytes: converted.bytes,
            verity: converted.verity,
        }
    }
}

/// The layers of one store.
pub(crate) struct Layers {
    directory: PathBuf,
    /// Layers that pulls in progress count on, and how many of them do.
    held: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A layer that is not collected as long as this is there.
#[derive(Debug)]
pub(crate) struct Held {
    hex: String,
    held: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.hex) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.hex);
            }
        }
    }
}

impl Layers {
    /// The layers below the root of a store. What a crash left half done is swept: a file without its other half.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        let layers = Self::at(root);
        for hex in layers.names()? {
            if layers.find_hex(&hex).is_none() {
                tracing::info!(layer = hex, "layer.swept");
                layers.delete(&hex)?;
            }
        }
        Ok(layers)
    }

    /// The layers below a root, as they are.
    pub(crate) fn at(root: &Path) -> Self {
        Self {
            directory: root.join("layers"),
            held: Arc::default(),
        }
    }

    /// Keeps a layer, there or not yet, from being collected.
    pub(crate) fn hold(&self, digest: &Digest) -> Held {
        let hex = digest.hex().to_owned();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held.entry(hex.clone()).or_default() += 1;
        drop(held);
        Held {
            hex,
            held: self.held.clone(),
        }
    }

    /// The file of a layer.
    pub(crate) fn path(&self, hex: &str) -> PathBuf {
        self.directory.join(hex).with_extension(CONTENT)
    }

    fn record_path(&self, hex: &str) -> PathBuf {
        self.directory.join(hex).with_extension(RECORD)
    }

    /// What is known of a layer whose file is there and as long as it should be.
    pub(crate) fn find(&self, digest: &Digest) -> Option<LayerRecord> {
        self.find_hex(digest.hex())
    }

    pub(crate) fn find_hex(&self, hex: &str) -> Option<LayerRecord> {
        let record = self.record(hex)?;
        let file = fs::symlink_metadata(self.path(hex)).ok()?;
        (file.is_file() && file.len() == record.bytes).then_some(record)
    }

    /// What is known of a layer, whatever its file is like.
    pub(crate) fn record(&self, hex: &str) -> Option<LayerRecord> {
        let path = self.record_path(hex);
        let small = fs::symlink_metadata(&path).is_ok_and(|file| file.len() <= RECORD_BYTES_MAX);
        if !small {
            return None;
        }
        let record: LayerRecord = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (record.schema == SCHEMA).then_some(record)
    }

    /// Opens a layer for reading.
    pub(crate) fn file(&self, digest: &Digest) -> Result<File, ImageError> {
        let path = self.path(digest.hex());
        File::open(&path).map_err(|source| failed("open", &path, source))
    }

    /// Stores a converted layer. `temporary` makes files on the same file system.
    pub(crate) fn put(
        &self,
        digest: &Digest,
        record: &LayerRecord,
        file: NamedTempFile,
        mut temporary: NamedTempFile,
    ) -> Result<(), ImageError> {
        let path = self.record_path(digest.hex());
        let bytes = serde_json::to_vec(record)
            .map_err(io::Error::other)
            .and_then(|bytes| temporary.write_all(&bytes).map(|()| bytes));
        bytes
            .and_then(|_| temporary.as_file().sync_all())
            .and_then(|()| file.as_file().sync_all())
            .map_err(|source| failed("write", &path, source))?;
        place(temporary, &path)?;
        place(file, &self.path(digest.hex()))?;
        sync_directory(&self.directory)
    }

    /// Deletes the layers that are not needed and that no pull counts on.
    pub(crate) fn collect(&self, needed: &BTreeSet<String>) -> Result<(), ImageError> {
        for hex in self.names()? {
            // Locked until the file is gone: whoever holds it later finds that it is not there.
            let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            if !needed.contains(&hex) && !held.contains_key(&hex) {
                tracing::info!(layer = hex, "layer.collected");
                self.delete(&hex)?;
            }
        }
        Ok(())
    }

    /// Deletes a layer, whoever needs it: it is damaged.
    pub(crate) fn delete(&self, hex: &str) -> Result<(), ImageError> {
        unlink(&self.path(hex))?;
        unlink(&self.record_path(hex))
    }

    /// Digits of every layer of which there is a file. A stranger's file is not ours to judge.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>, ImageError> {
        let mut names = BTreeSet::new();
        for entry in entries(&self.directory)? {
            let path = entry.path();
            let ours = path
                .extension()
                .is_some_and(|extension| extension == CONTENT || extension == RECORD);
            if let Some(hex) = path.file_stem().and_then(|stem| stem.to_str())
                && ours
                && matches!(hex.len(), 64 | 128)
                && is_lower_hex(hex)
            {
                names.insert(hex.to_owned());
            }
        }
        Ok(names)
    }
}

fn place(file: NamedTempFile, path: &Path) -> Result<(), ImageError> {
    file.persist(path)
        .map(drop)
        .map_err(|error| failed("place", path, error.error))
}
