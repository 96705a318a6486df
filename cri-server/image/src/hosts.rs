//! `hosts.toml` and `certs.d`: where a registry's content is had and how each place is reached, in the format of containerd.
//!
//! For the registry `r.example:5000` the first of `r.example_5000_`, `r.example:5000` and `_default` that is a directory is used. It holds
//! a `hosts.toml`, or certificates as Docker lays them out (`*.crt` authorities, `*.cert` with `*.key` client pairs). Pure reading:
//! nothing here connects. A key that is not known is refused: one that were ignored could be the one that matters.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use toml::{Table, Value};

/// Largest file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// One place that has a registry's content.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Where the interface begins, with a slash at the end.
    pub(crate) base: Url,
    /// The registry itself, not a mirror of it.
    pub(crate) is_server: bool,
    /// May say what a tag is.
    pub(crate) resolves: bool,
    /// May give manifests by digest, and blobs.
    pub(crate) pulls: bool,
    pub(crate) reach: Reach,
    /// Go with every request to this place, and nowhere else.
    pub(crate) headers: HeaderMap,
}

/// How a place is reached, as far as it is not like all others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// PEM files of authorities, beside those of the system.
    pub(crate) authorities: Vec<PathBuf>,
    /// PEM files of client certificates; without a second file, the key is in the first.
    pub(crate) clients: Vec<(PathBuf, Option<PathBuf>)>,
    /// Certificates are not looked at.
    pub(crate) skip_verify: bool,
    /// Until a connection stands.
    pub(crate) dial_timeout: Option<Duration>,
}

/// Reads what the first of `roots` with a directory for `registry` says: places in order, the registry itself last, which is at `own`
/// unless the file names another address. Answers a text with the file's name when it cannot be used.
pub(crate) fn find(roots: &[PathBuf], registry: &str, own: &str) -> Result<Option<Vec<Host>>, String> {
    let escaped = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => format!("{host}_{port}_"),
        _ => registry.to_owned(),
    };
    for root in roots {
        for name in [escaped.as_str(), registry, "_default"] {
            let directory = root.join(name);
            if directory.is_dir() {
                return read(&directory, registry, own).map(Some);
            }
        }
    }
    Ok(None)
}

fn read(directory: &Path, registry: &str, own: &str) -> Result<Vec<Host>, String> {
    let file = directory.join("hosts.toml");
    let text = match fs::metadata(&file).and_then(|metadata| {
        if metadata.len() > MAX_BYTES {
            return Err(io::Error::other(format!("it is larger than {MAX_BYTES} bytes")));
        }
        fs::read_to_string(&file)
    }) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return certificates(directory, own),
        Err(error) => return Err(format!("cannot read {}: {error}", file.display())),
    };
    parse(&text, directory, registry, own).map_err(|reason| format!("{}: {reason}", file.display()))
}

/// Docker's layout: only TLS, no other places.
fn certificates(directory: &Path, own: &str) -> Result<Vec<Host>, String> {
    let listed = fs::read_dir(directory).and_then(|entries| {
        entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()
    });
    let mut files = listed.map_err(|error| format!("cannot list {}: {error}", directory.display()))?;
    files.sort();
    let mut server = host(own, Table::new(), directory, "server")?;
    server.is_server = true;
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => server.reach.authorities.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.is_file() {
                    return Err(format!("{} has no {} beside it", file.display(), key.display()));
                }
                server.reach.clients.push((file, Some(key)));
            }
            _ => {}
        }
    }
    Ok(vec![server])
}

fn parse(text: &str, directory: &Path, registry: &str, own: &str) -> Result<Vec<Host>, String> {
    let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
        error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
    })?;
    let listed = match table.remove("host") {
        None => Table::new(),
        Some(Value::Table(listed)) => listed,
        Some(_) => return Err("host is not a table".into()),
    };
    let mut hosts = Vec::new();
    for (address, value) in listed {
        let Value::Table(settings) = value else {
            return Err(format!("host.{address:?} is not a table"));
        };
        let place = format!("host.{address:?}");
        hosts.push(host(&address, settings, directory, &place)?);
    }
    // A place that is the registry itself by another setting is not a mirror.
    for host in &mut hosts {
        host.is_server = is_at(&host.base, registry);
    }
    let server = match table.remove("server") {
        None => own.to_owned(),
        Some(Value::String(server)) if server.is_empty() => own.to_owned(),
        Some(Value::String(server)) => server,
        Some(_) => return Err("server is not a string".into()),
    };
    // The settings at the top are those of the registry itself.
    let mut server = host(&server, table, directory, "server")?;
    server.is_server = true;
    hosts.push(server);
    Ok(hosts)
}

fn is_at(base: &Url, registry: &str) -> bool {
    let default = base.port_or_known_default();
    Url::parse(&format!("{}://{registry}", base.scheme()))
        .is_ok_and(|url| url.host_str() == base.host_str() && url.port_or_known_default() == default)
}

fn host(address: &str, mut settings: Table, directory: &Path, place: &str) -> Result<Host, String> {
    let wrong = |key: &str, wanted: &str| format!("{place}: {key} must be {wanted}");
    let flag = |value: Option<Value>, key: &str| match value {
        None => Ok(false),
        Some(Value::Boolean(value)) => Ok(value),
        Some(_) => Err(wrong(key, "true or false")),
    };
    let override_path = flag(settings.remove("override_path"), "override_path")?;
    let skip_verify = flag(settings.remove("skip_verify"), "skip_verify")?;
    let (resolves, pulls) = capabilities(settings.remove("capabilities"))
        .ok_or_else(|| wrong("capabilities", "a list of \"pull\", \"resolve\" and \"push\""))?;
    let authorities = match settings.remove("ca") {
        None => Vec::new(),
        Some(value) => strings(&value).ok_or_else(|| wrong("ca", "a path or a list of paths"))?,
    };
    let clients = match settings.remove("client") {
        None => Vec::new(),
        Some(value) => clients(&value, directory)
            .ok_or_else(|| wrong("client", "a path, or a list of paths or of [certificate, key]"))?,
    };
    let dial_timeout = match settings.remove("dial_timeout") {
        None => None,
        Some(value) => Some(
            value
                .as_str()
                .and_then(duration)
                .ok_or_else(|| wrong("dial_timeout", "a duration such as \"30s\""))?,
        ),
    };
    let headers = match settings.remove("header") {
        None => HeaderMap::new(),
        Some(value) => {
            headers(&value).ok_or_else(|| wrong("header", "a table of strings, or of lists of them"))?
        }
    };
    if let Some(key) = settings.keys().next() {
        return Err(format!("{place}: the key {key:?} is not known"));
    }
    let base = base(address, override_path).ok_or_else(|| format!("{place}: {address:?} is no address"))?;
    Ok(Host {
        base,
        is_server: false,
        resolves,
        pulls,
        reach: Reach {
            authorities: authorities.iter().map(|file| directory.join(file)).collect(),
            clients,
            skip_verify,
            dial_timeout,
        },
        headers,
    })
}

/// `https://host[/path]` with `/v2/`, unless the path is said to be whole.
fn base(address: &str, override_path: bool) -> Option<Url> {
    let schemed = address.starts_with("http://") || address.starts_with("https://");
    let text = if schemed {
        address.to_owned()
    } else {
        format!("https://{address}")
    };
    let mut url = Url::parse(&text).ok()?;
    if url.host_str().is_none_or(str::is_empty)
        || !url.username().is_empty()
        || url.password().is_some()
        || url.query().is_some()
        || url.fragment().is_some()
    {
        return None;
    }
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if override_path || path.ends_with("/v2") {
        format!("{path}/")
    } else {
        format!("{path}/v2/")
    };
    url.set_path(&path);
    Some(url)
}

/// Whether it resolves, and whether it pulls.
fn capabilities(value: Option<Value>) -> Option<(bool, bool)> {
    let Some(value) = value else {
        return Some((true, true));
    };
    let words = value
        .as_array()?
        .iter()
        .map(Value::as_str)
        .collect::<Option<Vec<_>>>()?;
    // What is pushed is nothing to a node.
    let known = words
        .iter()
        .all(|word| matches!(*word, "pull" | "resolve" | "push"));
    known.then(|| (words.contains(&"resolve"), words.contains(&"pull")))
}

fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(one) => Some(vec![one.clone()]),
        Value::Array(many) => many
            .iter()
            .map(|one| one.as_str().map(ToOwned::to_owned))
            .collect(),
        _ => None,
    }
}

fn clients(value: &Value, directory: &Path) -> Option<Vec<(PathBuf, Option<PathBuf>)>> {
    let one = |value: &Value| match value {
        Value::String(file) => Some((directory.join(file), None)),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(certificate), Value::String(key)] => {
                let key = (!key.is_empty()).then(|| directory.join(key));
                Some((directory.join(certificate), key))
            }
            _ => None,
        },
        _ => None,
    };
    match value {
        Value::Array(many) => many.iter().map(one).collect(),
        single => one(single).map(|client| vec![client]),
    }
}

fn headers(value: &Value) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, value) in value.as_table()? {
        let name = HeaderName::try_from(name.as_str()).ok()?;
        for text in strings(value)? {
            let mut value = HeaderValue::try_from(text).ok()?;
            // Most often a password of some kind.
            value.set_sensitive(true);
            headers.append(name.clone(), value);
        }
    }
    Some(headers)
}

/// A duration as Go writes it, of one number and one unit.
fn duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().ok()?;
    let unit = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * unit)
        .ok()
        .filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<Host> {
        parse(text, Path::new("/d"), "r.example", "https://r.example").unwrap()
    }

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_str()).collect()
    }

    #[test]
    fn hosts_keep_the_order_of_the_file_and_the_server_is_last() {
        let hosts = parsed(
            r#"
            server = "https://up.example"
            [host."https://z.example"]
            [host."a.example:5000/team"]
            [host."http://m.example/v2"]
            [host."https://o.example/api/x"]
              override_path = true
            "#,
        );
        assert_eq!(
            bases(&hosts),
            [
                "https://z.example/v2/",
                "https://a.example:5000/team/v2/",
                "http://m.example/v2/",
                "https://o.example/api/x/",
                "https://up.example/v2/"
            ]
        );
        assert!(hosts[4].is_server && !hosts[0].is_server);
    }

    #[test]
    fn every_setting_of_a_host_is_read() {
        let hosts = parsed(
            r#"
            ca = "own.crt"
            [host."https://m.example"]
              capabilities = ["pull"]
              ca = ["a.crt", "/etc/b.crt"]
              client = [["c.cert", "c.key"], ["both.pem", ""]]
              skip_verify = true
              dial_timeout = "1.5s"
              [host."https://m.example".header]
                X-Key = "v"
                x-two = ["1", "2"]
            "#,
        );
        let host = &hosts[0];
        assert!(host.pulls && !host.resolves);
        assert_eq!(
            host.reach,
            Reach {
                authorities: vec!["/d/a.crt".into(), "/etc/b.crt".into()],
                clients: vec![
                    ("/d/c.cert".into(), Some("/d/c.key".into())),
                    ("/d/both.pem".into(), None)
                ],
                skip_verify: true,
                dial_timeout: Some(Duration::from_millis(1500)),
            }
        );
        assert_eq!(host.headers.get_all("x-two").iter().count(), 2);
        assert_eq!(hosts[1].base.as_str(), "https://r.example/v2/");
        assert_eq!(hosts[1].reach.authorities, [Path::new("/d/own.crt")]);
    }

    #[test]
    fn an_entry_for_the_registry_itself_is_no_mirror() {
        let hosts = parsed("[host.\"https://r.example:443\"]\n[host.\"https://r.example:444\"]\n");
        assert!(hosts[0].is_server && !hosts[1].is_server);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, word) in [
            ("server = 1", "server"),
            ("colour = 1", "colour"),
            ("[host.\"a b\"]", "a b"),
            ("[host.\"https://u:p@x\"]", "no address"),
            ("[host.\"x\"]\ncapabilities = [\"fly\"]", "capabilities"),
            ("[host.\"x\"]\nskip_verify = 1", "skip_verify"),
            ("[host.\"x\"]\ndial_timeout = \"soon\"", "dial_timeout"),
            ("[host.\"x\".header]\nx = 1", "header"),
            ("[host.\"x\".header]\n\"a b\" = \"c\"", "header"),
            ("[host.\"x\"]\nclient = [[\"a\"]]", "client"),
            ("[host.\"x\"]\nrewrite = \"y\"", "rewrite"),
            ("[[", "expected"),
        ] {
            let told = parse(text, Path::new("/d"), "r", "r").unwrap_err();
            assert!(told.contains(word), "{text}: {told}");
        }
    }

    #[test]
    fn the_directory_is_found_by_either_spelling_and_else_the_default_is_used() {
        let root = tempfile::tempdir().unwrap();
        let roots = [root.path().to_owned()];
        assert!(find(&roots, "r.example:5000", "r").unwrap().is_none());
        let directory = |name: &str, server: &str| {
            let directory = root.path().join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(
                directory.join("hosts.toml"),
                format!("server = \"https://{server}\""),
            )
            .unwrap();
        };
        let found = || {
            let hosts = find(&roots, "r.example:5000", "r").unwrap().unwrap();
            hosts[0].base.host_str().unwrap().to_owned()
        };
        directory("_default", "default");
        assert_eq!(found(), "default");
        directory("r.example:5000", "colon");
        assert_eq!(found(), "colon");
        directory("r.example_5000_", "escaped");
        assert_eq!(found(), "escaped");
    }

    #[test]
    fn certificates_lie_as_docker_has_them() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("r.example");
        fs::create_dir(&directory).unwrap();
        for name in ["ca.crt", "client.cert", "client.key", "readme"] {
            fs::write(directory.join(name), "").unwrap();
        }
        let roots = [root.path().to_owned()];
        let hosts = find(&roots, "r.example", "http://r.example").unwrap().unwrap();
        assert_eq!(bases(&hosts), ["http://r.example/v2/"]);
        assert_eq!(hosts[0].reach.authorities, [directory.join("ca.crt")]);
        assert_eq!(hosts[0].reach.clients.len(), 1);
        fs::remove_file(directory.join("client.key")).unwrap();
        assert!(find(&roots, "r.example", "r").unwrap_err().contains("client.key"));
    }
}
