//! The directory of images: files, index, names.
//!
//! ```text
//! root/index.redb                   the images that exist, with names and configs
//! root/images/<config hex>.json     which layers an image is made of
//! root/images/<config hex>.metadata its metadata, complete and durable from the moment the name appears
//! root/layers/                      converted layers, shared by images
//! root/tmp/                         conversions in progress; swept at open
//! ```
//!
//! Layers come before the images that have them, an image's files before its index entry, and they go the other way round: a crash in
//! between leaves a file too much, never one too few. Everything here blocks, and is called on blocking threads, except the reads of the
//! list in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use tempfile::NamedTempFile;

use crate::{
    Image, ImageError, Usage,
    composition::{Composed, Compositions, Disk},
    digest::is_lower_hex,
    error::is_storage_full,
    index::Index,
    layers::Layers,
    reference::Reference,
};

/// The names that a pull gives an image.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// `registry/repository:tag`, unless it was pulled by digest.
    pub(crate) tag: Option<String>,
    /// `registry/repository@digest`
    pub(crate) digest: String,
}

/// Files and index of one store.
pub(crate) struct Store {
    root: PathBuf,
    layers: Layers,
    compositions: Compositions,
    /// Held over every change of files and index together.
    index: Mutex<Index>,
    /// What the index holds, for readers.
    images: RwLock<Arc<BTreeMap<String, Image>>>,
}

impl Store {
    /// Opens or makes the directory, sweeps unfinished conversions, and forgets images of which a file is gone or cut.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        let directories = ["", "images", "layers", "tmp"].map(|name| root.join(name));
        for directory in directories {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
            made.map_err(|source| failed("make", &directory, source))?;
        }
        let mut index = Index::open(root.join("index.redb"))?;
        // The index is locked now: nobody else converts in there.
        sweep(&root.join("tmp"))?;
        let layers = Layers::open(root)?;
        let compositions = Compositions::open(root)?;
        let loaded = index.load(|id| {
            compositions
                .disk(id, &layers)
                .map_or_else(Vec::new, |disk| disk.files)
        })?;
        let (kept, lost): (Vec<_>, Vec<_>) = loaded.into_iter().partition(|image| !image.disk.is_empty());
        if !lost.is_empty() {
            for image in &lost {
                tracing::warn!(image.id, "image.not_whole");
            }
            let ids: Vec<_> = lost.iter().map(|image| image.id.as_str()).collect();
            index.change(&[], &ids)?;
        }
        let images = kept.into_iter().map(|image| (image.id.clone(), image)).collect();
        Ok(Self {
            root: root.to_owned(),
            layers,
            compositions,
            index: Mutex::new(index),
            images: RwLock::new(Arc::new(images)),
        })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The images at this moment.
    pub(crate) fn images(&self) -> Arc<BTreeMap<String, Image>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A file for a conversion; it is gone when the handle is dropped.
    pub(crate) fn new_file(&self) -> Result<NamedTempFile, ImageError> {
        let directory = self.root.join("tmp");
        NamedTempFile::new_in(&directory).map_err(|source| failed("make a file in", &directory, source))
    }

    /// The converted layers.
    pub(crate) fn layers(&self) -> &Layers {
        &self.layers
    }

    /// The disk of `id`, when it is whole, whether the image is listed or not.
    pub(crate) fn content(&self, id: &str) -> Option<Disk> {
        self.compositions.disk(id, &self.layers)
    }

    /// Whether an image's files are there and as long as they should be. One that is not whole is forgotten, so that it is pulled again.
    pub(crate) fn is_whole(&self, image: &Image) -> Result<bool, ImageError> {
        if self.content(&image.id).is_some() {
            return Ok(true);
        }
        tracing::warn!(image.id, "image.not_whole");
        self.remove(&image.id, &[])?;
        Ok(false)
    }

    /// Gives names to an image that is listed and whose files are there; nothing when it is not.
    pub(crate) fn name(&self, id: &str, names: &Names) -> Result<Option<Image>, ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = self
            .images()
            .get(id)
            .cloned()
            .filter(|image| self.content(&image.id).is_some())
        else {
            return Ok(None);
        };
        self.list(&mut index, image, names).map(Some)
    }

    /// Lists an image whose files are in the store, or get there out of `composed`.
    pub(crate) fn add(
        &self,
        mut image: Image,
        names: &Names,
        composed: Option<Composed>,
    ) -> Result<Image, ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let placed = composed.is_some();
        if let Some(composed) = composed {
            self.compositions.put(&image.id, composed, self.new_file()?)?;
        }
        let disk = self.content(&image.id).ok_or_else(|| {
            let path = self.compositions.metadata_path(&image.id);
            failed("find", &path, io::ErrorKind::NotFound.into())
        })?;
        (image.disk, image.size_bytes) = (disk.files, disk.bytes);
        let id = image.id.clone();
        let listed = self.list(&mut index, image, names);
        if listed.is_err() && placed {
            let deleted = self.compositions.delete(&id);
            deleted.unwrap_or_else(|error| tracing::warn!(%error, "image.left_behind"));
        }
        listed
    }

    /// Writes the image with its new names, and takes its tag from whoever had it.
    fn list(&self, index: &mut Index, mut image: Image, names: &Names) -> Result<Image, ImageError> {
        let mut images = BTreeMap::clone(&self.images());
        if let Some(known) = images.get(&image.id) {
            image.repo_tags.clone_from(&known.repo_tags);
            image.repo_digests.clone_from(&known.repo_digests);
            image.pinned = known.pinned;
        }
        insert_sorted(&mut image.repo_digests, &names.digest);
        let mut changed = Vec::new();
        if let Some(tag) = &names.tag {
            insert_sorted(&mut image.repo_tags, tag);
            for other in images.values_mut().filter(|other| other.id != image.id) {
                let before = other.repo_tags.len();
                other.repo_tags.retain(|owned| owned != tag);
                if other.repo_tags.len() != before {
                    changed.push(other.clone());
                }
            }
        }
        changed.push(image.clone());
        index.change(&changed.iter().collect::<Vec<_>>(), &[])?;
        images.insert(image.id.clone(), image.clone());
        self.publish(images);
        Ok(image)
    }

    /// Says whether garbage collection may take an image; nothing when there is no such image.
    pub(crate) fn pin(&self, id: &str, pinned: bool) -> Result<Option<Image>, ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let mut images = BTreeMap::clone(&self.images());
        let Some(image) = images.get_mut(id) else {
            return Ok(None);
        };
        image.pinned = pinned;
        let image = image.clone();
        index.change(&[&image], &[])?;
        self.publish(images);
        Ok(Some(image))
    }

    /// Takes an image from the list, and its file unless it is in use.
    pub(crate) fn remove(&self, id: &str, in_use: &[String]) -> Result<(), ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let mut images = BTreeMap::clone(&self.images());
        let Some(image) = images.remove(id) else {
            return Ok(());
        };
        index.change(&[], &[id])?;
        self.publish(images);
        if !in_use.iter().any(|used| used == id) {
            self.compositions.delete(&image.id)?;
        }
        self.sweep_layers()
    }

    /// Deletes the files that are neither listed nor in use.
    pub(crate) fn collect(&self, in_use: &[String]) -> Result<(), ImageError> {
        let _changes = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let images = self.images();
        for id in self.compositions.ids()? {
            if !images.contains_key(&id) && !in_use.contains(&id) {
                tracing::info!(image.id = id, "image.collected");
                self.compositions.delete(&id)?;
            }
        }
        self.sweep_layers()
    }

    /// Deletes the layers that no image has, listed or not, and no pull counts on.
    pub(crate) fn collect_layers(&self) -> Result<(), ImageError> {
        let _changes = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        self.sweep_layers()
    }

    fn sweep_layers(&self) -> Result<(), ImageError> {
        let mut needed = BTreeSet::new();
        for id in self.compositions.ids()? {
            needed.extend(self.compositions.layers(&id));
        }
        self.layers.collect(&needed)
    }

    /// Finds by id, name or unique prefix of an id.
    pub(crate) fn find(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let images = self.images();
        let digits = reference.strip_prefix("sha256:").unwrap_or(reference);
        let id = format!("sha256:{digits}");
        if let Some(image) = images.get(&id) {
            return Ok(Some(image.clone()));
        }
        let is_prefix = !digits.is_empty() && digits.len() <= 64 && is_lower_hex(digits);
        match Reference::parse(reference) {
            Ok(reference) => {
                let name = reference.to_string();
                let found = images
                    .values()
                    .find(|image| image.repo_tags.contains(&name) || image.repo_digests.contains(&name));
                if found.is_some() {
                    return Ok(found.cloned());
                }
            }
            Err(_) if is_prefix => {}
            Err(error) => return Err(error),
        }
        if !is_prefix {
            return Ok(None);
        }
        let mut matching = images
            .range(id.clone()..)
            .take_while(|(known, _)| known.starts_with(&id));
        match (matching.next(), matching.next()) {
            (Some(_), Some(_)) => Err(ImageError::Reference(format!(
                "{reference:?}: the ids of several images begin with it"
            ))),
            (found, _) => Ok(found.map(|(_, image)| image.clone())),
        }
    }

    /// Counts blocks and inodes below the root.
    pub(crate) fn usage(&self) -> Result<Usage, ImageError> {
        let mut usage = Usage {
            used_bytes: 0,
            inodes_used: 0,
        };
        let mut pending = vec![self.root.clone()];
        while let Some(path) = pending.pop() {
            let metadata = match fs::symlink_metadata(&path) {
                Ok(metadata) => metadata,
                // Deleted meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(failed("inspect", &path, source)),
            };
            usage.used_bytes += metadata.blocks() * 512;
            usage.inodes_used += 1;
            if metadata.is_dir() {
                pending.extend(entries(&path)?.into_iter().map(|entry| entry.path()));
            }
        }
        Ok(usage)
    }

    fn publish(&self, images: BTreeMap<String, Image>) {
        *self.images.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(images);
    }
}

fn insert_sorted(names: &mut Vec<String>, name: &str) {
    if let Err(at) = names.binary_search_by(|known| known.as_str().cmp(name)) {
        names.insert(at, name.to_owned());
    }
}

/// An I/O error of the store; a full disk has its own variant.
pub(crate) fn failed(doing: &'static str, path: &Path, source: io::Error) -> ImageError {
    if is_storage_full(&source) {
        ImageError::Exhausted {
            path: path.to_owned(),
            source: Box::new(source),
        }
    } else {
        ImageError::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}

pub(crate) fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>, ImageError> {
    fs::read_dir(directory)
        .and_then(Iterator::collect)
        .map_err(|source| failed("list", directory, source))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), ImageError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| failed("sync", directory, source))
}

fn sweep(directory: &Path) -> Result<(), ImageError> {
    for entry in entries(directory)? {
        tracing::info!(file = %entry.path().display(), "image.swept");
        unlink(&entry.path())?;
    }
    Ok(())
}

pub(crate) fn unlink(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("delete", path, error)),
        _ => Ok(()),
    }
}
