//! Whether the files of a store are what was written there: every byte of them, by their fs-verity digests.
//!
//! Works on a store that a daemon has open, too: it reads files that never change, and what is being placed is passed over. A file that is
//! removed is missed by the daemon when the image is next asked for; then the image is forgotten, and a pull brings what is missing.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use caisson_layer_converter::verity;

use crate::{
    ImageError,
    composition::Compositions,
    layers::Layers,
    store::{failed, unlink},
};

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Examination {
    /// Files that were read.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// What is wrong.
    pub damages: Vec<Damage>,
}

/// A file that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which.
    pub file: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Reads every file of the store below `root`. With `remove`, damaged ones are deleted.
pub fn examine(root: &Path, remove: bool) -> Result<Examination, ImageError> {
    let mut examination = Examination::default();
    let layers = Layers::at(root);
    for hex in layers.names()? {
        if let Some(record) = layers.record(&hex) {
            examination.look(&layers.path(&hex), record.bytes, &record.verity, remove)?;
        }
    }
    let compositions = Compositions::at(root);
    for id in compositions.ids()? {
        if let Some(recipe) = compositions.recipe(&id) {
            let path = compositions.metadata_path(&id);
            examination.look(&path, recipe.metadata_bytes, &recipe.verity, remove)?;
        }
    }
    Ok(examination)
}

impl Examination {
    fn look(&mut self, path: &Path, bytes: u64, digest: &str, remove: bool) -> Result<(), ImageError> {
        let file = match File::open(path) {
            Ok(file) => file,
            // Being placed, or removed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(failed("open", path, source)),
        };
        let reason = match verity::measure(file) {
            Ok((found, length)) => {
                self.files += 1;
                self.bytes += length;
                if length != bytes {
                    format!("it has {length} bytes instead of {bytes}")
                } else if found != digest {
                    format!("its fs-verity digest is {found} instead of {digest}")
                } else {
                    return Ok(());
                }
            }
            // A disk that cannot read it has damaged it.
            Err(error) => format!("it cannot be read: {error}"),
        };
        if remove {
            unlink(path)?;
        }
        self.damages.push(Damage {
            file: path.to_owned(),
            reason,
        });
        Ok(())
    }
}
