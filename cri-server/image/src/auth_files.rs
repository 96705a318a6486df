//! Credentials that the host has: `config.json` of Docker, `auth.json` of containers-auth(5), and the helper programs they name.
//!
//! Read anew for each pull that brings no credentials of its own, so that a rotated password needs no restart. The most specific entry
//! wins: `registry/team` before `registry`. Helpers speak the protocol of docker-credential-helpers: the registry on standard input, a
//! JSON document on standard output; each has a deadline and is killed with its pull. Must not know how registries are reached.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use base64::Engine;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::Command,
    time::timeout,
};

use crate::{Credentials, ErrorKind, RegistryError, registry::is_docker_hub};

/// What a helper may take to answer; one that asks a cloud's metadata service needs a moment.
const HELPER_DEADLINE: Duration = Duration::from_secs(30);
/// Largest file or answer that is read.
const MAX_BYTES: u64 = 1 << 20;
/// How Docker's files and helpers call Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// The user name by which a helper says that its secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// The credentials that `files` have for `repository` of `registry`; the first file that has some decides.
pub(crate) async fn find(
    files: &[PathBuf],
    registry: &str,
    repository: &str,
) -> Result<Credentials, RegistryError> {
    for file in files {
        let Some(config) = read(file.clone()).await? else {
            continue;
        };
        if let Some(helper) = config.helper_for(registry)
            && let Some(found) = ask(helper, registry, HELPER_DEADLINE).await?
        {
            return Ok(found);
        }
        if let Some(found) = config.entry(file, registry, repository)? {
            return Ok(found);
        }
    }
    Ok(Credentials::Anonymous)
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: BTreeMap<String, Entry>,
    creds_store: String,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The parsed file; nothing when there is none.
async fn read(path: PathBuf) -> Result<Option<File>, RegistryError> {
    let reading = tokio::task::spawn_blocking(move || {
        let bytes = match read_capped(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unusable(&path, "cannot be read").because(error)),
        };
        // The parser's words would quote the file, which holds secrets: only the place is told.
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            unusable(
                &path,
                &format!("is not understood at line {line}, column {column}"),
            )
        })
    });
    reading.await.map_err(|_| {
        RegistryError::new(
            ErrorKind::Internal,
            "reading a file with credentials",
            "it was interrupted",
        )
    })?
}

fn read_capped(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(MAX_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn unusable(path: &Path, reason: &str) -> RegistryError {
    RegistryError::new(
        ErrorKind::Internal,
        format!("credentials from {}", path.display()),
        reason,
    )
}

impl File {
    /// The helper for one registry, or the one for all of them.
    fn helper_for(&self, registry: &str) -> Option<&str> {
        let own = self
            .cred_helpers
            .iter()
            .find(|(key, _)| same_registry(key_parts(key).0, registry))
            .map(|(_, helper)| helper.as_str());
        own.or(Some(self.creds_store.as_str()))
            .filter(|helper| !helper.is_empty())
    }

    /// The most specific entry.
    fn entry(
        &self,
        file: &Path,
        registry: &str,
        repository: &str,
    ) -> Result<Option<Credentials>, RegistryError> {
        let fitting = self.auths.iter().filter_map(|(key, entry)| {
            let (host, path) = key_parts(key);
            let covers = same_registry(host, registry) && is_within(repository, path);
            covers.then_some((path.len(), key, entry))
        });
        let mut best: Option<(usize, &String, &Entry)> = None;
        for candidate in fitting {
            if best.is_none_or(|(length, ..)| candidate.0 > length) {
                best = Some(candidate);
            }
        }
        let Some((_, key, entry)) = best else {
            return Ok(None);
        };
        entry
            .credentials()
            .map_err(|reason| unusable(file, &format!("cannot be used: the entry {key:?} {reason}")))
    }
}

impl Entry {
    /// Nothing when the entry is empty, as it is beside a helper.
    fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Credentials::IdentityToken(self.identitytoken.clone())));
        }
        if !self.registrytoken.is_empty() {
            return Ok(Some(Credentials::Bearer(self.registrytoken.clone())));
        }
        if !self.username.is_empty() {
            return Ok(Some(Credentials::Basic {
                username: self.username.clone(),
                password: self.password.clone(),
            }));
        }
        if self.auth.is_empty() {
            return Ok(None);
        }
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(self.auth.trim())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok());
        let decoded = decoded.ok_or("holds no base64 of user:password")?;
        let (username, password) = decoded
            .trim_end_matches('\0')
            .split_once(':')
            .ok_or("holds no base64 of user:password")?;
        Ok(Some(Credentials::Basic {
            username: username.to_owned(),
            password: password.to_owned(),
        }))
    }
}

/// Host and path of a key, which may be a host, a URL, or a host with the beginning of a repository.
fn key_parts(key: &str) -> (&str, &str) {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    match path.trim_matches('/') {
        // The version of the interface, not a repository.
        "v1" | "v2" => (host, ""),
        path => (host, path),
    }
}

fn same_registry(host: &str, registry: &str) -> bool {
    host.eq_ignore_ascii_case(registry) || is_docker_hub(host) && is_docker_hub(registry)
}

/// Whether `repository` is `path` or below it.
fn is_within(repository: &str, path: &str) -> bool {
    path.is_empty()
        || repository
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Runs `docker-credential-<helper> get`. Nothing when it knows the registry not.
async fn ask(helper: &str, registry: &str, deadline: Duration) -> Result<Option<Credentials>, RegistryError> {
    let program = format!("docker-credential-{helper}");
    let failed = |kind, reason: String| RegistryError::new(kind, format!("{program} get"), reason);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !helper.chars().all(plain) {
        return Err(failed(
            ErrorKind::Internal,
            "the name is no helper's: letters, digits, '-', '_' and '.' are allowed".into(),
        ));
    }
    let asked = if is_docker_hub(registry) {
        HUB_KEY
    } else {
        registry
    };
    let conversation = converse(&program, asked);
    let (success, output) = match timeout(deadline, conversation).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            return Err(failed(ErrorKind::Internal, "it cannot be run".into()).because(error));
        }
        Err(_) => {
            let reason = format!("no answer within {} s", deadline.as_secs_f32());
            return Err(failed(ErrorKind::Deadline, reason));
        }
    };
    if !success {
        let said = String::from_utf8_lossy(&output);
        let said = said.trim();
        // The protocol's own words for "not mine".
        if said.contains("credentials not found") {
            return Ok(None);
        }
        let said: String = said.chars().take(200).flat_map(char::escape_debug).collect();
        return Err(failed(ErrorKind::Unauthorized, format!("it failed: {said}")));
    }
    let answer: HelperAnswer = serde_json::from_slice(&output)
        .map_err(|_| failed(ErrorKind::Internal, "its answer is not understood".into()))?;
    Ok(Some(if answer.username == TOKEN_USER {
        Credentials::IdentityToken(answer.secret)
    } else {
        Credentials::Basic {
            username: answer.username,
            password: answer.secret,
        }
    }))
}

/// Whether it succeeded, and what it wrote to standard output.
async fn converse(program: &str, asked: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // A helper that does not read what it is told is judged by its answer.
        drop(input.write_all(asked.as_bytes()).await);
    }
    let mut output = Vec::new();
    if let Some(answer) = child.stdout.take() {
        answer.take(MAX_BYTES).read_to_end(&mut output).await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        serde_json::from_str(text).unwrap()
    }

    fn basic(username: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Basic {
            username: username.into(),
            password: password.into(),
        })
    }

    #[test]
    fn every_way_to_write_a_registry_is_understood() {
        for key in [
            "r.example:5000",
            "https://r.example:5000",
            "http://R.example:5000/v2/",
            "r.example:5000/v1",
        ] {
            let file = file(&format!(r#"{{"auths": {{"{key}": {{"auth": "dTpwOnE="}}}}}}"#));
            let found = file.entry(Path::new("f"), "r.example:5000", "a/b").unwrap();
            assert!(found == basic("u", "p:q"), "{key}");
            assert!(file.entry(Path::new("f"), "r.example", "a").unwrap().is_none());
        }
        let hub = file(r#"{"auths": {"https://index.docker.io/v1/": {"username": "u", "password": "p"}}}"#);
        assert!(hub.entry(Path::new("f"), "docker.io", "library/a").unwrap() == basic("u", "p"));
        assert!(hub.entry(Path::new("f"), "quay.io", "a").unwrap().is_none());
    }

    #[test]
    fn the_longest_path_wins_and_ends_at_a_slash() {
        let file = file(
            r#"{"auths": {"q.io": {"username": "all"}, "q.io/team": {"username": "team"},
                "q.io/team/app": {"username": "app"}}}"#,
        );
        let user = |repository: &str| match file.entry(Path::new("f"), "q.io", repository) {
            Ok(Some(Credentials::Basic { username, .. })) => username,
            other => panic!("{repository}: {other:?}"),
        };
        for (repository, wanted) in [
            ("x", "all"),
            ("teams/app", "all"),
            ("team/x", "team"),
            ("team/app", "app"),
            ("team/app/sub", "app"),
            ("team/app2", "team"),
        ] {
            assert_eq!(user(repository), wanted, "{repository}");
        }
    }

    #[test]
    fn tokens_come_before_passwords_and_an_empty_entry_is_none() {
        let file = file(
            r#"{"auths": {"a": {"identitytoken": "i", "auth": "dTpw"}, "b": {"registrytoken": "r"}, "c": {},
                "d": {"auth": "%%"}}}"#,
        );
        let of = |registry| file.entry(Path::new("f"), registry, "x");
        assert!(of("a").unwrap() == Some(Credentials::IdentityToken("i".into())));
        assert!(of("b").unwrap() == Some(Credentials::Bearer("r".into())));
        assert!(of("c").unwrap().is_none());
        assert!(of("d").unwrap_err().to_string().contains("\"d\""));
    }

    #[test]
    fn the_registrys_own_helper_comes_before_the_general_one() {
        let file = file(r#"{"credsStore": "all", "credHelpers": {"gcr.io": "gcr", "none.io": ""}}"#);
        assert_eq!(file.helper_for("gcr.io"), Some("gcr"));
        assert_eq!(file.helper_for("other"), Some("all"));
        assert_eq!(file.helper_for("none.io"), None);
    }

    #[tokio::test]
    async fn a_helper_with_a_path_in_its_name_is_not_run() {
        let error = ask("../../bin/sh", "r", HELPER_DEADLINE).await.unwrap_err();
        assert!(error.reason.contains("no helper's"), "{error}");
    }

    #[tokio::test]
    async fn a_broken_file_is_named_and_not_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, r#"{"auths": {"r": {"password": secret-thing}}}"#).unwrap();
        let error = find(&[path], "r", "a").await.unwrap_err();
        let text = crate::error::describe(&error);
        assert!(text.contains("config.json") && text.contains("line 1"), "{text}");
        assert!(!text.contains("secret"), "{text}");
    }

    #[tokio::test]
    async fn a_file_that_is_not_there_has_nothing() {
        let found = find(&["/nonexistent/config.json".into()], "r", "a")
            .await
            .unwrap();
        assert!(found == Credentials::Anonymous);
    }
}
