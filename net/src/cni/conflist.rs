//! Network configurations: loading the one that the node uses.
//!
//! Files are taken in lexical order, and the first valid one is the node's network, as CRI runtimes do it. What is wrong with those
//! before it is kept, so that a person learns why theirs is not used.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::error::NetError;

/// Version of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

/// The oldest whose results have `interfaces` and `ips`.
const OLDEST: Version = Version(0, 3, 0);
/// The newest that this runtime speaks.
const NEWEST: Version = Version(1, 1, 0);
/// Where STATUS begins.
pub(crate) const WITH_STATUS: Version = Version(1, 1, 0);
/// Configurations are written by people; this is far beyond any.
const SIZE_LIMIT: u64 = 1024 * 1024;

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }
}

/// A network: its plugins in the order of ADD.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ConfList {
    pub(crate) name: String,
    pub(crate) cni_version: String,
    pub(crate) version: Version,
    pub(crate) plugins: Vec<Plugin>,
}

/// A plugin's own configuration, as it stands in the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plugin {
    pub(crate) kind: String,
    pub(crate) conf: Map<String, Value>,
}

impl Plugin {
    /// Whether the configuration declares the capability.
    pub(crate) fn has_capability(&self, name: &str) -> bool {
        self.conf
            .get("capabilities")
            .and_then(|all| all.get(name))
            .and_then(Value::as_bool)
            .unwrap_or(false)
    }
}

/// The node's network and what was skipped before it.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) conflist: ConfList,
    pub(crate) skipped: Vec<String>,
}

/// Loads the first valid configuration of `directory`.
pub(crate) fn load(directory: &Path) -> Result<Loaded, NetError> {
    let mut problems = Vec::new();
    for path in candidates(directory)? {
        match load_file(&path) {
            Ok(conflist) => {
                return Ok(Loaded {
                    conflist,
                    skipped: problems,
                });
            }
            Err(problem) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                problems.push(format!("{name}: {problem}"));
            }
        }
    }
    Err(match problems.is_empty() {
        true => NetError::NoConfiguration(directory.to_owned()),
        false => NetError::InvalidConfiguration {
            directory: directory.to_owned(),
            problems,
        },
    })
}

fn candidates(directory: &Path) -> Result<Vec<PathBuf>, NetError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(NetError::NoConfiguration(directory.to_owned()));
        }
        Err(error) => return Err(NetError::file("read the CNI configuration in", directory)(error)),
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(NetError::file("read the CNI configuration in", directory))?;
    paths.retain(|path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("conflist" | "conf" | "json")) && path.is_file()
    });
    paths.sort();
    Ok(paths)
}

fn load_file(path: &Path) -> Result<ConfList, String> {
    let text = read(path)?;
    let mut list = parse(&text)?;
    let object = as_object(&text)?;
    if object.get("loadOnlyInlinedPlugins").and_then(Value::as_bool) == Some(false) {
        let directory = path.with_file_name(&list.name);
        for path in candidates(&directory).unwrap_or_default() {
            list.plugins
                .push(plugin(Value::Object(as_object(&read(&path)?)?))?);
        }
    }
    if list.plugins.is_empty() {
        return Err("the list of plugins is empty".to_owned());
    }
    Ok(list)
}

fn read(path: &Path) -> Result<String, String> {
    let size = fs::metadata(path)
        .map_err(|error| format!("cannot be read: {error}"))?
        .len();
    if size > SIZE_LIMIT {
        return Err(format!("has {size} bytes, more than {SIZE_LIMIT}"));
    }
    fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))
}

fn as_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("is no JSON object: {error}"))
}

/// Reads a list, or a single plugin's configuration, which becomes a list of one.
pub(crate) fn parse(text: &str) -> Result<ConfList, String> {
    let mut object = as_object(text)?;
    let name = object
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if !is_name(&name) {
        return Err(format!("\"name\" is missing or invalid: {name:?}"));
    }
    let (cni_version, version) = version(&object)?;
    let plugins = match object.remove("plugins") {
        Some(Value::Array(all)) => all.into_iter().map(plugin).collect::<Result<Vec<_>, _>>()?,
        Some(_) => return Err("\"plugins\" is no list".to_owned()),
        None => vec![plugin(Value::Object(object))?],
    };
    Ok(ConfList {
        name,
        cni_version,
        version,
        plugins,
    })
}

/// `cniVersion`, or the newest of `cniVersions` that this runtime speaks.
fn version(object: &Map<String, Value>) -> Result<(String, Version), String> {
    let single = object.get("cniVersion").and_then(Value::as_str);
    let several = object.get("cniVersions").and_then(Value::as_array);
    let stated: Vec<&str> = single
        .into_iter()
        .chain(several.into_iter().flatten().filter_map(Value::as_str))
        .collect();
    if stated.is_empty() {
        return Err("\"cniVersion\" is missing".to_owned());
    }
    stated
        .iter()
        .filter_map(|text| Some(((*text).to_owned(), Version::parse(text)?)))
        .filter(|(_, version)| (OLDEST..=NEWEST).contains(version))
        .max_by_key(|(_, version)| *version)
        .ok_or_else(|| {
            format!(
                "CNI version {} is not supported (0.3.0 to 1.1.0 are)",
                stated.join(", ")
            )
        })
}

fn plugin(value: Value) -> Result<Plugin, String> {
    let Value::Object(conf) = value else {
        return Err("a plugin's configuration is no object".to_owned());
    };
    let kind = conf
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    // It becomes a file name under the plugin directories.
    if kind.is_empty() || kind.contains('/') || kind == "." || kind == ".." {
        return Err(format!("\"type\" of a plugin is missing or invalid: {kind:?}"));
    }
    Ok(Plugin { kind, conf })
}

/// The specification's rule for names of networks and ids of containers.
pub(crate) fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

impl ConfList {
    /// As it is kept in the cache: with all plugins, wherever they came from.
    pub(crate) fn to_json(&self) -> Value {
        let plugins: Vec<Value> = self
            .plugins
            .iter()
            .map(|plugin| Value::Object(plugin.conf.clone()))
            .collect();
        serde_json::json!({ "cniVersion": self.cni_version, "name": self.name, "plugins": plugins })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, name: &str, text: &str) {
        fs::write(directory.join(name), text).unwrap();
    }

    #[test]
    fn the_first_valid_file_in_lexical_order_is_used_and_skipped_ones_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        write(path, "00-notes.txt", "not a configuration");
        write(path, "05-broken.conflist", "{");
        write(
            path,
            "10-old.conf",
            r#"{"cniVersion":"0.2.0","name":"old","type":"bridge"}"#,
        );
        write(
            path,
            "20-single.conf",
            r#"{"cniVersion":"0.4.0","name":"single","type":"bridge","mtu":1400}"#,
        );
        write(
            path,
            "30-list.conflist",
            r#"{"cniVersion":"1.0.0","name":"list","plugins":[{"type":"ptp"}]}"#,
        );
        let loaded = load(path).unwrap();
        assert_eq!(loaded.conflist.name, "single");
        assert_eq!(loaded.conflist.plugins[0].conf["mtu"], 1400);
        assert_eq!(loaded.skipped.len(), 2);
        assert!(
            loaded.skipped[0].starts_with("05-broken.conflist: is no JSON object"),
            "{:?}",
            loaded.skipped
        );
        assert!(
            loaded.skipped[1].contains("0.2.0 is not supported"),
            "{:?}",
            loaded.skipped
        );
    }

    #[test]
    fn a_directory_with_nothing_valid_says_what_is_wrong_with_each_file() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(
            load(directory.path()),
            Err(NetError::NoConfiguration(_))
        ));
        assert!(matches!(
            load(&directory.path().join("absent")),
            Err(NetError::NoConfiguration(_))
        ));
        write(
            directory.path(),
            "a.conflist",
            r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#,
        );
        write(
            directory.path(),
            "b.conflist",
            r#"{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"../sh"}]}"#,
        );
        write(
            directory.path(),
            "c.json",
            r#"{"cniVersion":"1.0.0","name":"../c","type":"x"}"#,
        );
        write(directory.path(), "d.json", r#"{"name":"d","type":"x"}"#);
        let text = load(directory.path()).unwrap_err().to_string();
        for part in [
            "a.conflist: the list of plugins is empty",
            "../sh",
            "../c",
            "\"cniVersion\" is missing",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn of_several_versions_the_newest_known_is_spoken() {
        let list =
            parse(r#"{"cniVersions":["0.4.0","1.1.0","1.0.0","2.0.0"],"name":"n","plugins":[{"type":"x"}]}"#);
        assert_eq!(list.unwrap().cni_version, "1.1.0");
    }

    #[test]
    fn plugins_beside_the_list_are_loaded_when_it_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let list =
            r#"{"cniVersion":"1.1.0","name":"n","loadOnlyInlinedPlugins":false,"plugins":[{"type":"a"}]}"#;
        write(path, "1.conflist", list);
        fs::create_dir(path.join("n")).unwrap();
        write(&path.join("n"), "1.conf", r#"{"type":"b"}"#);
        let kinds: Vec<_> = load(path)
            .unwrap()
            .conflist
            .plugins
            .into_iter()
            .map(|plugin| plugin.kind)
            .collect();
        assert_eq!(kinds, ["a", "b"]);
    }
}
