//! The durable list of images: one redb database, one transaction for each change.
//!
//! Keyed by image id; a record holds the image's names, so moving a tag from one image to another is two records in one transaction.
//! After an I/O error redb refuses further work until it is opened again: the handle is dropped and reopened at the next use, so that a
//! disk that was full once does not stop the store for ever.

use std::{
    error::Error,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::{Image, ImageConfig, ImageError, error::is_storage_full};

const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
/// Form of a record; a newer one is not guessed at.
const SCHEMA: u32 = 2;
/// That of stores in which every image was one file, which is read no more.
const FLATTENED_SCHEMA: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Record {
    schema: u32,
    repo_tags: Vec<String>,
    repo_digests: Vec<String>,
    size_bytes: u64,
    pinned: bool,
    config: ImageConfig,
    /// Since the epoch.
    pulled_at_ms: u64,
}

/// The open index. One process has it at a time.
pub(crate) struct Index {
    path: PathBuf,
    database: Option<Database>,
}

impl Index {
    /// Opens or makes the database at `path`.
    pub(crate) fn open(path: PathBuf) -> Result<Self, ImageError> {
        let mut index = Self { path, database: None };
        index.with("open", |database| {
            let transaction = database.begin_write()?;
            transaction.open_table(IMAGES)?;
            transaction.commit()?;
            Ok(())
        })?;
        Ok(index)
    }

    /// Every image; `disk_of` says which files the disk of an id is made of.
    pub(crate) fn load(&mut self, disk_of: impl Fn(&str) -> Vec<PathBuf>) -> Result<Vec<Image>, ImageError> {
        let path = self.path.clone();
        let records = self.with("read", |database| {
            let table = database.begin_read()?.open_table(IMAGES)?;
            let mut records = Vec::new();
            for row in table.iter()? {
                let (id, record) = row?;
                records.push((id.value().to_owned(), record.value().to_vec()));
            }
            Ok(records)
        })?;
        let unreadable = |source: Box<dyn Error + Send + Sync>| ImageError::Index {
            doing: "understand",
            path: path.clone(),
            source,
        };
        let mut images = Vec::new();
        for (id, bytes) in records {
            let record: Record = serde_json::from_slice(&bytes).map_err(|error| unreadable(error.into()))?;
            if record.schema == FLATTENED_SCHEMA {
                // Whoever forgets images without files forgets this one, too.
                images.push(record.into_image(Vec::new(), id));
                continue;
            }
            if record.schema != SCHEMA {
                let reason = format!(
                    "record of schema {} for {id}, this version knows {SCHEMA}",
                    record.schema
                );
                return Err(unreadable(reason.into()));
            }
            images.push(record.into_image(disk_of(&id), id));
        }
        Ok(images)
    }

    /// Writes and deletes in one transaction.
    pub(crate) fn change(&mut self, written: &[&Image], deleted: &[&str]) -> Result<(), ImageError> {
        let path = self.path.clone();
        let encoded = written
            .iter()
            .map(|image| Ok((image.id.as_str(), serde_json::to_vec(&Record::of(image))?)))
            .collect::<Result<Vec<_>, serde_json::Error>>()
            .map_err(|error| ImageError::Index {
                doing: "encode",
                path,
                source: error.into(),
            })?;
        self.with("write", |database| {
            let transaction = database.begin_write()?;
            {
                let mut table = transaction.open_table(IMAGES)?;
                for id in deleted {
                    table.remove(*id)?;
                }
                for (id, record) in &encoded {
                    table.insert(*id, record.as_slice())?;
                }
            }
            transaction.commit()?;
            Ok(())
        })
    }

    fn with<T>(
        &mut self,
        doing: &'static str,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, ImageError> {
        let result = match self.database.take().map_or_else(|| create(&self.path), Ok) {
            Ok(database) => match work(&database) {
                Ok(value) => {
                    self.database = Some(database);
                    return Ok(value);
                }
                Err(error) => error,
            },
            Err(error) => error,
        };
        Err(failure(doing, &self.path, result))
    }
}

fn create(path: &Path) -> Result<Database, redb::Error> {
    Ok(Database::create(path)?)
}

fn failure(doing: &'static str, path: &Path, error: redb::Error) -> ImageError {
    let path = path.to_owned();
    match error {
        redb::Error::Io(source) if is_storage_full(&source) => ImageError::Exhausted {
            path,
            source: Box::new(source),
        },
        redb::Error::DatabaseAlreadyOpen => ImageError::Index {
            doing,
            path,
            source: "another process has it open".into(),
        },
        error => ImageError::Index {
            doing,
            path,
            source: Box::new(error),
        },
    }
}

impl Record {
    fn of(image: &Image) -> Self {
        let since = image.pulled_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            schema: SCHEMA,
            repo_tags: image.repo_tags.clone(),
            repo_digests: image.repo_digests.clone(),
            size_bytes: image.size_bytes,
            pinned: image.pinned,
            config: image.config.clone(),
            pulled_at_ms: u64::try_from(since.as_millis()).unwrap_or(0),
        }
    }

    fn into_image(self, disk: Vec<PathBuf>, id: String) -> Image {
        let pulled_at = UNIX_EPOCH
            .checked_add(Duration::from_millis(self.pulled_at_ms))
            .unwrap_or(SystemTime::UNIX_EPOCH);
        Image {
            id,
            repo_tags: self.repo_tags,
            repo_digests: self.repo_digests,
            size_bytes: self.size_bytes,
            pinned: self.pinned,
            config: self.config,
            disk,
            pulled_at,
        }
    }
}
