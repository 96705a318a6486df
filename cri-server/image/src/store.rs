//! The directory of images: files, index, names.
//!
//! ```text
//! root/index.redb               the images that exist, with names and configs
//! root/images/<config hex>.erofs  content, complete and durable from the moment the name appears
//! root/tmp/                     conversions in progress; swept at open
//! ```
//!
//! A file comes before its index entry and goes after it, so a crash in between leaves a file too much, never one too few. Everything here
//! blocks, and is called on blocking threads, except the reads of the list in memory.

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
    Image, ImageError, Usage, digest::is_lower_hex, error::is_storage_full, index::Index,
    reference::Reference,
};

const SUFFIX: &str = ".erofs";

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
    /// Held over every change of files and index together.
    index: Mutex<Index>,
    /// What the index holds, for readers.
    images: RwLock<Arc<BTreeMap<String, Image>>>,
}

impl Store {
    /// Opens or makes the directory, sweeps unfinished conversions, and forgets images whose file is gone.
    pub(crate) fn open(root: &Path) -> Result<Self, ImageError> {
        for directory in [root.to_owned(), root.join("images"), root.join("tmp")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
            made.map_err(|source| failed("make", &directory, source))?;
        }
        let mut index = Index::open(root.join("index.redb"))?;
        // The index is locked now: nobody else converts in there.
        sweep(&root.join("tmp"))?;
        let loaded = index.load(|id| disk_of(root, id))?;
        let (kept, lost): (Vec<_>, Vec<_>) = loaded.into_iter().partition(|image| image.disk.is_file());
        if !lost.is_empty() {
            for image in &lost {
                tracing::warn!(image.id, file = %image.disk.display(), "image.file_missing");
            }
            let ids: Vec<_> = lost.iter().map(|image| image.id.as_str()).collect();
            index.change(&[], &ids)?;
        }
        let images = kept.into_iter().map(|image| (image.id.clone(), image)).collect();
        Ok(Self {
            root: root.to_owned(),
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

    /// Length of the converted content of `id`, when it is there, listed or not.
    pub(crate) fn content(&self, id: &str) -> Option<u64> {
        let file = fs::symlink_metadata(disk_of(&self.root, id)).ok()?;
        (file.is_file() && file.len() > 0).then_some(file.len())
    }

    /// Gives names to an image that is listed and whose file is there; nothing when it is not.
    pub(crate) fn name(&self, id: &str, names: &Names) -> Result<Option<Image>, ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = self
            .images()
            .get(id)
            .cloned()
            .filter(|image| image.disk.is_file())
        else {
            return Ok(None);
        };
        self.list(&mut index, image, names).map(Some)
    }

    /// Lists an image whose content is `file`, or is in the store already when there is none.
    pub(crate) fn add(
        &self,
        image: Image,
        names: &Names,
        file: Option<NamedTempFile>,
    ) -> Result<Image, ImageError> {
        let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let placed = file.is_some();
        if let Some(file) = file {
            file.persist(&image.disk)
                .map_err(|error| failed("place", &image.disk, error.error))?;
            let directory = self.root.join("images");
            File::open(&directory)
                .and_then(|directory| directory.sync_all())
                .map_err(|source| failed("sync", &directory, source))?;
        } else if !image.disk.is_file() {
            return Err(failed("find", &image.disk, io::ErrorKind::NotFound.into()));
        }
        let disk = image.disk.clone();
        let listed = self.list(&mut index, image, names);
        if listed.is_err() && placed {
            unlink(&disk).unwrap_or_else(|error| tracing::warn!(%error, "image.left_behind"));
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
        if in_use.iter().any(|used| used == id) {
            Ok(())
        } else {
            unlink(&image.disk)
        }
    }

    /// Deletes the files that are neither listed nor in use.
    pub(crate) fn collect(&self, in_use: &[String]) -> Result<(), ImageError> {
        let _changes = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let images = self.images();
        let needed: BTreeSet<&str> = images
            .keys()
            .map(String::as_str)
            .chain(in_use.iter().map(String::as_str))
            .collect();
        let directory = self.root.join("images");
        for entry in entries(&directory)? {
            let name = entry.file_name();
            let Some(hex) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) else {
                continue;
            };
            // Only what this store has put there; a stranger's file is not ours to judge.
            if hex.len() == 64 && is_lower_hex(hex) && !needed.contains(format!("sha256:{hex}").as_str()) {
                tracing::info!(image.id = %format_args!("sha256:{hex}"), "image.collected");
                unlink(&entry.path())?;
            }
        }
        Ok(())
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

/// Where the content of an image is. Ids are digests that were parsed, so the name is digits only.
pub(crate) fn disk_of(root: &Path, id: &str) -> PathBuf {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    root.join("images").join(format!("{hex}{SUFFIX}"))
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

fn entries(directory: &Path) -> Result<Vec<fs::DirEntry>, ImageError> {
    fs::read_dir(directory)
        .and_then(Iterator::collect)
        .map_err(|source| failed("list", directory, source))
}

fn sweep(directory: &Path) -> Result<(), ImageError> {
    for entry in entries(directory)? {
        tracing::info!(file = %entry.path().display(), "image.swept");
        unlink(&entry.path())?;
    }
    Ok(())
}

fn unlink(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("delete", path, error)),
        _ => Ok(()),
    }
}
