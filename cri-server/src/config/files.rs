//! Configuration files: one table out of many, and where each key came from.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

/// The files and flags, merged; remembers the source of each key and what could not be read.
#[derive(Debug, Default)]
pub struct Merged {
    pub(super) table: Table,
    /// Dotted key -> file or flag.
    pub(super) sources: BTreeMap<String, String>,
    pub(super) problems: Vec<String>,
}

impl Merged {
    /// Reads `file`, then `*.toml` in the directory beside it that has its name with `.d` (config.toml -> config.d).
    pub(super) fn read(file: &Path, must_exist: bool) -> Self {
        let mut merged = Self::default();
        merged.file(file, must_exist);
        match drop_ins(&file.with_extension("d")) {
            Ok(files) => {
                for file in files {
                    merged.file(&file, true);
                }
            }
            Err(problem) => merged.problems.push(problem),
        }
        merged
    }

    fn file(&mut self, file: &Path, must_exist: bool) {
        let name = file.display().to_string();
        match std::fs::read_to_string(file) {
            Ok(text) => match text.parse::<Table>() {
                Ok(table) => merge(&mut self.table, table, "", &name, &mut self.sources),
                Err(error) => self
                    .problems
                    .push(format!("{name}: {}", one_line(&error.to_string()))),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {}
            Err(error) => self.problems.push(format!("cannot read {name}: {error}")),
        }
    }

    /// Sets one dotted key, as a flag does.
    pub(super) fn set(&mut self, key: &str, value: Value, source: &str) {
        let mut value = value;
        for part in key.split('.').rev() {
            value = Value::Table(Table::from_iter([(part.to_owned(), value)]));
        }
        if let Value::Table(table) = value {
            merge(&mut self.table, table, "", source, &mut self.sources);
        }
    }
}

fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("cannot read {}: {error}", dir.display())),
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    files.sort();
    Ok(files)
}

/// Tables are merged key by key; anything else is replaced as a whole.
fn merge(into: &mut Table, from: Table, path: &str, source: &str, sources: &mut BTreeMap<String, String>) {
    for (key, value) in from {
        let dotted = join(path, &key);
        match (into.get_mut(&key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from, &dotted, source, sources),
            (_, Value::Table(from)) => {
                let mut fresh = Table::new();
                merge(&mut fresh, from, &dotted, source, sources);
                sources.insert(dotted, source.to_owned());
                into.insert(key, Value::Table(fresh));
            }
            (_, value) => {
                sources.insert(dotted, source.to_owned());
                into.insert(key, value);
            }
        }
    }
}

/// A dotted key; parts that are no bare keys are quoted, as TOML has it.
pub(super) fn join(path: &str, key: &str) -> String {
    let bare = !key.is_empty()
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    let key = if bare { key.to_owned() } else { format!("{key:?}") };
    if path.is_empty() {
        key
    } else {
        format!("{path}.{key}")
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
