//! Reads a merged table key by key: each key has a type and bounds, what is wrong is noted, and what nobody asked for is unknown.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::{UID_BASE, UID_COUNT, VmUser};
use toml::{Table, Value};

use super::files::{Merged, join};

/// A table that is being read.
pub(super) struct Section {
    path: String,
    table: Table,
    sources: BTreeMap<String, String>,
    problems: Vec<String>,
}

impl Section {
    pub(super) fn top(merged: Merged) -> Self {
        Self {
            path: String::new(),
            table: merged.table,
            sources: merged.sources,
            problems: merged.problems,
        }
    }

    /// Reads a table within this one; absent is empty.
    pub(super) fn section<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        let table = match self.table.remove(key) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                self.wrong(key, "a table", &other);
                Table::new()
            }
        };
        let mut inner = Self {
            path: join(&self.path, key),
            table,
            sources: std::mem::take(&mut self.sources),
            problems: std::mem::take(&mut self.problems),
        };
        let value = read(&mut inner);
        inner.unknown_keys();
        self.sources = inner.sources;
        self.problems = inner.problems;
        value
    }

    /// The keys that were not read yet.
    pub(super) fn names(&self) -> Vec<String> {
        self.table.keys().cloned().collect()
    }

    /// Everything that was wrong.
    pub(super) fn finish(mut self) -> Vec<String> {
        self.unknown_keys();
        self.problems
    }

    fn unknown_keys(&mut self) {
        let left: Vec<String> = self.table.keys().cloned().collect();
        for key in left {
            self.problem(&key, "unknown key");
        }
    }

    /// Notes what is wrong with a key.
    pub(super) fn problem(&mut self, key: &str, what: impl AsRef<str>) {
        let dotted = join(&self.path, key);
        let source = self.sources.get(&dotted).map_or("default", String::as_str);
        self.problems
            .push(format!("{source}: {dotted}: {}", what.as_ref()));
    }

    fn wrong(&mut self, key: &str, wanted: &str, got: &Value) {
        self.problem(key, format!("must be {wanted}, not {} {got}", got.type_str()));
    }

    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        match self.table.remove(key)? {
            Value::String(text) => Some(text),
            other => {
                self.wrong(key, "a string", &other);
                None
            }
        }
    }

    pub(super) fn texts(&mut self, key: &str) -> Option<Vec<String>> {
        let value = self.table.remove(key)?;
        self.list(key, value)
    }

    fn list(&mut self, key: &str, value: Value) -> Option<Vec<String>> {
        let list = match &value {
            Value::Array(items) => items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>(),
            _ => None,
        };
        if list.is_none() {
            self.wrong(key, "a list of strings", &value);
        }
        list
    }

    /// A table of lists of strings, with any keys.
    pub(super) fn text_lists(&mut self, key: &str) -> BTreeMap<String, Vec<String>> {
        self.section(key, |section| {
            let table = std::mem::take(&mut section.table);
            table
                .into_iter()
                .filter_map(|(key, value)| section.list(&key, value).map(|list| (key, list)))
                .collect()
        })
    }

    pub(super) fn optional_absolute(&mut self, key: &str) -> Option<PathBuf> {
        let text = self.text(key)?;
        self.check_absolute(key, text)
    }

    pub(super) fn absolute(&mut self, key: &str, default: &str) -> PathBuf {
        self.optional_absolute(key)
            .unwrap_or_else(|| PathBuf::from(default))
    }

    pub(super) fn absolutes(&mut self, key: &str, default: &[&str]) -> Vec<PathBuf> {
        match self.texts(key) {
            None => default.iter().map(PathBuf::from).collect(),
            Some(list) => list
                .into_iter()
                .filter_map(|text| self.check_absolute(key, text))
                .collect(),
        }
    }

    fn check_absolute(&mut self, key: &str, text: String) -> Option<PathBuf> {
        if Path::new(&text).is_absolute() {
            return Some(text.into());
        }
        self.problem(key, format!("{text:?} is not an absolute path"));
        None
    }

    /// Hosts with an optional port, not URLs.
    pub(super) fn hosts(&mut self, key: &str) -> Vec<String> {
        let hosts = self.texts(key).unwrap_or_default();
        for host in &hosts {
            if host.is_empty() || host.contains('/') {
                self.problem(key, format!("{host:?} is not host:port"));
            }
        }
        hosts
    }

    /// IP address and port.
    pub(super) fn address(&mut self, key: &str, default: SocketAddr) -> SocketAddr {
        let Some(text) = self.text(key) else {
            return default;
        };
        text.parse().unwrap_or_else(|_| {
            self.problem(key, format!("{text:?} is not an IP address and a port"));
            default
        })
    }

    pub(super) fn number<T>(&mut self, key: &str, default: T, range: RangeInclusive<u64>) -> T
    where
        T: TryFrom<u64> + Copy,
    {
        let Some(value) = self.table.remove(key) else {
            return default;
        };
        let number = value
            .as_integer()
            .and_then(|number| u64::try_from(number).ok())
            .filter(|number| range.contains(number))
            .and_then(|number| T::try_from(number).ok());
        number.unwrap_or_else(|| {
            let wanted = format!("a whole number from {} to {}", range.start(), range.end());
            self.wrong(key, &wanted, &value);
            default
        })
    }

    pub(super) fn seconds(&mut self, key: &str, default: u64, range: RangeInclusive<u64>) -> Duration {
        Duration::from_secs(self.number(key, default, range))
    }

    pub(super) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.table.remove(key) {
            None => default,
            Some(Value::Boolean(value)) => value,
            Some(other) => {
                self.wrong(key, "true or false", &other);
                default
            }
        }
    }

    /// One of a few words; the first is the default.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, words: &[(&str, T)]) -> T {
        let text = self.text(key);
        let wanted = text.as_deref().unwrap_or_else(|| words[0].0);
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == wanted) {
            return *value;
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let what = format!("{wanted:?} is not one of {}", known.join(", "));
        self.problem(key, what);
        words[0].1
    }

    /// `per-vm` (the default, with ids from `base_key` on), `uid:gid` in numbers, or `root`.
    pub(super) fn vm_user(&mut self, key: &str, base_key: &str) -> VmUser {
        let based = self.table.contains_key(base_key);
        // Every id of the range fits 31 bits: some programs read ids as signed.
        let last = (1 << 31) - u64::from(UID_COUNT);
        let base = self.number(base_key, UID_BASE, 65_536..=last);
        let per_vm = VmUser::PerVm { base };
        let user = match self.text(key).as_deref() {
            None | Some("per-vm") => return per_vm,
            Some("root") => VmUser::Daemon,
            Some(text) => match fixed_user(text) {
                Ok(user) => user,
                Err(problem) => {
                    self.problem(key, problem);
                    return per_vm;
                }
            },
        };
        if based {
            self.problem(base_key, format!("has no effect unless {key} is \"per-vm\""));
        }
        user
    }
}

fn fixed_user(text: &str) -> Result<VmUser, String> {
    // The highest number means "no change" to the kernel.
    let id = |part: &str| part.parse().ok().filter(|id| *id != u32::MAX);
    let ids = text
        .split_once(':')
        .and_then(|(uid, gid)| Some((id(uid)?, id(gid)?)));
    match ids {
        None => Err(format!(
            "{text:?} is neither \"per-vm\", uid:gid in numbers nor \"root\""
        )),
        Some((0, _) | (_, 0)) => Err(format!(
            "{text:?} would own root's files: if that is meant, write \"root\""
        )),
        Some((uid, gid)) => Ok(VmUser::Fixed { uid, gid }),
    }
}
