//! What each image is made of: its metadata and its layers, bottom first.
//!
//! The recipe is written before the metadata, whose name is what makes the content of an image complete. Blocks; called on blocking
//! threads.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::{
    ImageError,
    digest::is_lower_hex,
    layers::Layers,
    store::{entries, failed, sync_directory, unlink},
};

const METADATA: &str = "metadata";
const RECIPE: &str = "json";
/// What stores of older versions had: whole images.
const FLATTENED: &str = "erofs";
/// Form of a recipe; one of another form is none.
const SCHEMA: u32 = 1;
/// Longest recipe in bytes.
const RECIPE_BYTES_MAX: u64 = 256 << 10;

/// An image as it is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recipe {
    schema: u32,
    /// Length of the metadata.
    pub(crate) metadata_bytes: u64,
    /// Its fs-verity digest, lower case digits.
    pub(crate) verity: String,
    /// Digits of the layers' digests, bottom first, those without contents included.
    pub(crate) layers: Vec<String>,
}

impl Recipe {
    pub(crate) fn new(metadata_bytes: u64, verity: String, layers: Vec<String>) -> Self {
        Self {
            schema: SCHEMA,
            metadata_bytes,
            verity,
            layers,
        }
    }
}

/// An image that has been composed and is not in the store yet.
#[derive(Debug)]
pub(crate) struct Composed {
    pub(crate) metadata: NamedTempFile,
    pub(crate) recipe: Recipe,
}

/// The disk of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// One behind the other.
    pub(crate) files: Vec<PathBuf>,
    /// What the image takes on the host, layers that it shares and layers without contents included.
    pub(crate) bytes: u64,
}

/// The images of one store, listed or not.
pub(crate) struct Compositions {
    directory: PathBuf,
}

impl Compositions {
    /// The images below the root of a store. Sweeps what a crash left half done, and what older versions left.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        let compositions = Self::at(root);
        for entry in entries(&compositions.directory)? {
            let path = entry.path();
            let has = |extension: &str| path.with_extension(extension).is_file();
            let orphaned = match extension(&path) {
                Some(FLATTENED) => true,
                Some(RECIPE) => !has(METADATA),
                Some(METADATA) => !has(RECIPE),
                _ => false,
            };
            if orphaned && id_of(&path).is_some() {
                tracing::info!(file = %path.display(), "image.swept");
                unlink(&path)?;
            }
        }
        Ok(compositions)
    }

    /// The images below a root, as they are.
    pub(crate) fn at(root: &Path) -> Self {
        Self {
            directory: root.join("images"),
        }
    }

    /// Where the metadata of an image is. Ids are digests that were parsed, so the name is digits only.
    pub(crate) fn metadata_path(&self, id: &str) -> PathBuf {
        self.path(id, METADATA)
    }

    fn path(&self, id: &str, extension: &str) -> PathBuf {
        let hex = id.strip_prefix("sha256:").unwrap_or(id);
        self.directory.join(hex).with_extension(extension)
    }

    /// What an image is made of, if it is written down.
    pub(crate) fn recipe(&self, id: &str) -> Option<Recipe> {
        let path = self.path(id, RECIPE);
        let small = fs::symlink_metadata(&path).is_ok_and(|file| file.len() <= RECIPE_BYTES_MAX);
        if !small {
            return None;
        }
        let recipe: Recipe = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let plain = |hex: &String| matches!(hex.len(), 64 | 128) && is_lower_hex(hex);
        (recipe.schema == SCHEMA && recipe.layers.iter().all(plain)).then_some(recipe)
    }

    /// Digits of an image's layers; none if nothing is known of it.
    pub(crate) fn layers(&self, id: &str) -> Vec<String> {
        self.recipe(id).map_or_else(Vec::new, |recipe| recipe.layers)
    }

    /// The disk of an image, if all of it is there and as long as it should be.
    pub(crate) fn disk(&self, id: &str, layers: &Layers) -> Option<Disk> {
        let recipe = self.recipe(id)?;
        let metadata = self.metadata_path(id);
        let file = fs::symlink_metadata(&metadata).ok()?;
        if !file.is_file() || file.len() != recipe.metadata_bytes {
            return None;
        }
        let mut disk = Disk {
            files: vec![metadata],
            bytes: recipe.metadata_bytes,
        };
        for hex in &recipe.layers {
            let layer = layers.find_hex(hex)?;
            disk.bytes = disk.bytes.checked_add(layer.bytes)?;
            if layer.data_bytes > 0 {
                disk.files.push(layers.path(hex));
            }
        }
        Some(disk)
    }

    /// Stores a composed image.
    pub(crate) fn put(
        &self,
        id: &str,
        composed: Composed,
        mut temporary: NamedTempFile,
    ) -> Result<(), ImageError> {
        let (path, metadata) = (self.path(id, RECIPE), self.metadata_path(id));
        let Composed {
            metadata: file,
            recipe,
        } = composed;
        serde_json::to_vec(&recipe)
            .map_err(std::io::Error::other)
            .and_then(|bytes| temporary.write_all(&bytes))
            .and_then(|()| temporary.as_file().sync_all())
            .and_then(|()| file.as_file().sync_all())
            .map_err(|source| failed("write", &path, source))?;
        for (file, path) in [(temporary, &path), (file, &metadata)] {
            file.persist(path)
                .map_err(|error| failed("place", path, error.error))?;
        }
        sync_directory(&self.directory)
    }

    /// Deletes what is here of an image.
    pub(crate) fn delete(&self, id: &str) -> Result<(), ImageError> {
        unlink(&self.metadata_path(id))?;
        unlink(&self.path(id, RECIPE))
    }

    /// Ids of all images of which there is a file.
    pub(crate) fn ids(&self) -> Result<BTreeSet<String>, ImageError> {
        let entries = entries(&self.directory)?;
        let ours = entries.iter().map(fs::DirEntry::path);
        let ours = ours.filter(|path| matches!(extension(path), Some(METADATA | RECIPE)));
        Ok(ours.filter_map(|path| id_of(&path)).collect())
    }
}

fn extension(path: &Path) -> Option<&str> {
    path.extension()?.to_str()
}

/// Only what this store has put there; a stranger's file is not ours to judge.
fn id_of(path: &Path) -> Option<String> {
    let hex = path.file_stem()?.to_str()?;
    (hex.len() == 64 && is_lower_hex(hex)).then(|| format!("sha256:{hex}"))
}
