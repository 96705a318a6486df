//! What was added, kept on disk so that DEL gets the same configuration and the result of ADD.
//!
//! The files are libcni's (`<cache_dir>/results/<network>-<id>-<interface>`, kind `cniCacheV1`), so that tools which collect garbage
//! by them work. An entry is written before ADD, without a result: a daemon that dies during ADD knows later what to delete.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::conflist::{ConfList, parse};
use crate::error::NetError;

const KIND: &str = "cniCacheV1";

/// A cache file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    kind: String,
    pub(crate) container_id: String,
    /// The network's configuration, base64 of its JSON.
    config: String,
    pub(crate) if_name: String,
    pub(crate) network_name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) netns: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cni_args: Option<Vec<(String, String)>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) capability_args: Option<Map<String, Value>>,
    /// Absent while ADD runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<Value>,
}

impl Entry {
    pub(crate) fn new(conflist: &ConfList, container_id: &str, interface: &str) -> Self {
        Self {
            kind: KIND.to_owned(),
            container_id: container_id.to_owned(),
            config: STANDARD.encode(conflist.to_json().to_string()),
            if_name: interface.to_owned(),
            network_name: conflist.name.clone(),
            netns: String::new(),
            cni_args: None,
            capability_args: None,
            result: None,
        }
    }

    /// The configuration as it was at ADD; `None` when it cannot be read.
    pub(crate) fn conflist(&self) -> Option<ConfList> {
        let text = String::from_utf8(STANDARD.decode(&self.config).ok()?).ok()?;
        parse(&text).ok()
    }

    fn file_name(&self) -> String {
        format!("{}-{}-{}", self.network_name, self.container_id, self.if_name)
    }
}

/// The directory of cache files.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
    results: PathBuf,
}

impl Cache {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            results: root.join("results"),
        }
    }

    /// Writes or replaces the entry, atomically.
    pub(crate) fn put(&self, entry: &Entry) -> Result<(), NetError> {
        let path = self.results.join(entry.file_name());
        let write = || -> io::Result<()> {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.results)?;
            // Beside the directory, not in it: other tools take each file in there for an entry.
            let mut file = tempfile::Builder::new()
                .prefix(&temporary_prefix(&entry.container_id))
                .tempfile_in(&self.root)?;
            file.write_all(serde_json::to_string(entry)?.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            fs::File::open(&self.results)?.sync_all()
        };
        write().map_err(NetError::file("write the CNI cache", path))
    }

    /// All entries of a container. Files that are not readable as an entry are left alone.
    pub(crate) fn of(&self, container_id: &str) -> Result<Vec<Entry>, NetError> {
        let found = match fs::read_dir(&self.results) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(NetError::file("read the CNI cache in", &self.results)(error)),
        };
        let part = format!("-{container_id}-");
        let mut entries: Vec<Entry> = found
            .filter_map(Result::ok)
            .filter(|file| file.file_name().to_string_lossy().contains(&part))
            .filter_map(|file| fs::read(file.path()).ok())
            .filter_map(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|entry: &Entry| entry.kind == KIND && entry.container_id == container_id)
            .collect();
        entries.sort_by(|a, b| (&a.network_name, &a.if_name).cmp(&(&b.network_name, &b.if_name)));
        Ok(entries)
    }

    /// Removes the entry; fine when there is none.
    pub(crate) fn remove(&self, entry: &Entry) -> Result<(), NetError> {
        let path = self.results.join(entry.file_name());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(NetError::file("remove from the CNI cache", path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Removes what a daemon has left that died while it wrote an entry of this container.
    pub(crate) fn sweep(&self, container_id: &str) -> Result<(), NetError> {
        let sweep = || -> io::Result<()> {
            let prefix = temporary_prefix(container_id);
            for file in fs::read_dir(&self.root)? {
                let file = file?;
                if file.file_name().to_string_lossy().starts_with(&prefix) {
                    fs::remove_file(file.path())?;
                }
            }
            Ok(())
        };
        match sweep() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(NetError::file("sweep the CNI cache in", &self.root)(error))
            }
            _ => Ok(()),
        }
    }
}

fn temporary_prefix(container_id: &str) -> String {
    format!(".cni-result-{container_id}.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_found_by_its_container_only_and_keeps_the_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path());
        assert_eq!(cache.of("a").unwrap(), []);
        let list = parse(r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"x","y":1}]}"#).unwrap();
        let mut entry = Entry::new(&list, "a", "eth0");
        cache.put(&entry).unwrap();
        entry.result = Some(serde_json::json!({ "ips": [] }));
        cache.put(&entry).unwrap();
        cache.put(&Entry::new(&list, "b-a", "eth0")).unwrap();
        fs::write(directory.path().join("results/n-a-eth1"), "garbage").unwrap();
        assert_eq!(cache.of("a").unwrap(), [entry.clone()]);
        assert_eq!(entry.conflist().unwrap(), list);
        cache.remove(&entry).unwrap();
        cache.remove(&entry).unwrap();
        assert_eq!(cache.of("a").unwrap(), []);
    }

    #[test]
    fn a_half_written_entry_is_swept_with_its_container_only() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(&directory.path().join("none"));
        cache.sweep("a").unwrap();
        let cache = Cache::new(directory.path());
        let (ours, other) = (temporary_prefix("a") + "x", temporary_prefix("a-b") + "x");
        for name in [&ours, &other] {
            fs::write(directory.path().join(name), "{").unwrap();
        }
        cache.sweep("a").unwrap();
        assert!(!directory.path().join(ours).exists());
        assert!(directory.path().join(other).exists());
    }

    #[test]
    fn a_file_that_libcni_has_written_is_read() {
        let entry: Entry = serde_json::from_str(
            r#"{"kind":"cniCacheV1","containerId":"c","config":"e30=","ifName":"eth0","networkName":"n",
                "cniArgs":[["K","V"]],"capabilityArgs":{"portMappings":[]},"result":{"cniVersion":"1.0.0"}}"#,
        )
        .unwrap();
        assert_eq!(entry.cni_args.unwrap()[0].1, "V");
    }
}
