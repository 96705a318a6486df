//! Image references: the grammar of the distribution project, with familiar names completed as Docker does.

use std::fmt;

use crate::{
    ImageError,
    digest::{Digest, is_lower_hex},
};

const DEFAULT_REGISTRY: &str = "docker.io";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A complete reference: registry and repository, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Reference {
    registry: String,
    repository: String,
    version: Version,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Version {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    /// Parses `[registry/]repository[:tag][@digest]`. With both, the digest decides and the tag is dropped: nobody has verified that it names
    /// the same content.
    pub(crate) fn parse(text: &str) -> Result<Self, ImageError> {
        Self::parse_parts(text).map_err(|reason| ImageError::Reference(format!("{text:?}: {reason}")))
    }

    fn parse_parts(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("it is empty");
        }
        if Digest::parse(text).is_some() || (text.len() == 64 && is_lower_hex(text)) {
            return Err("an image id names no repository");
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = Digest::parse(digest).ok_or("the digest is not sha256:<64 hex digits>")?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err("the tag has a character or a length that is not allowed");
        }
        let (registry, repository) = complete(name);
        if !is_registry(registry) {
            return Err("the registry is not a host with an optional port");
        }
        if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err("the repository must be lower case");
        }
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err("the name is longer than 255 characters");
        }
        if !repository.split('/').all(is_component) {
            return Err("the repository has a component that is not allowed");
        }
        let version = match digest {
            Some(digest) => Version::Digest(digest),
            None => Version::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            version,
        })
    }

    /// Host and optional port, as written.
    pub(crate) fn registry(&self) -> &str {
        &self.registry
    }

    /// Path of the repository at its registry.
    pub(crate) fn repository(&self) -> &str {
        &self.repository
    }

    /// What to ask the registry for.
    pub(crate) fn version(&self) -> String {
        match &self.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(digest) => digest.to_string(),
        }
    }

    /// `registry/repository:tag`, when it is a tag.
    pub(crate) fn tag_name(&self) -> Option<String> {
        matches!(self.version, Version::Tag(_)).then(|| self.to_string())
    }

    /// `registry/repository@digest`
    pub(crate) fn digest_name(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

/// Splits a name into registry and repository; the first component is a registry when it looks like a host.
fn complete(name: &str) -> (&str, String) {
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
        _ => (DEFAULT_REGISTRY, name),
    };
    let registry = if registry == "index.docker.io" {
        DEFAULT_REGISTRY
    } else {
        registry
    };
    if registry == DEFAULT_REGISTRY && !path.contains('/') {
        return (registry, format!("library/{path}"));
    }
    (registry, path.to_owned())
}

fn is_tag(tag: &str) -> bool {
    let first = tag
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    first
        && tag.len() <= MAX_TAG
        && tag
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) => {
                return address.parse::<std::net::Ipv6Addr>().is_ok() && (port.is_empty() || is_port(port));
            }
            None => return false,
        },
        None => registry.split_at(registry.find(':').unwrap_or(registry.len())),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.split('.').all(label) && (port.is_empty() || is_port(port))
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(*first) || !alphanumeric(*last) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii() && alphanumeric(c as u8))
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(text: &str) -> String {
        Reference::parse(text).unwrap().to_string()
    }

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn familiar_names_are_completed() {
        assert_eq!(complete("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(complete("busybox:1.36"), "docker.io/library/busybox:1.36");
        assert_eq!(complete("user/app"), "docker.io/user/app:latest");
        assert_eq!(complete("docker.io/busybox"), "docker.io/library/busybox:latest");
        assert_eq!(
            complete("index.docker.io/library/busybox"),
            "docker.io/library/busybox:latest"
        );
        assert_eq!(complete("localhost/app"), "localhost/app:latest");
    }

    #[test]
    fn ports_are_not_tags() {
        assert_eq!(complete("localhost:5000/app"), "localhost:5000/app:latest");
        assert_eq!(complete("127.0.0.1:5000/a/b/c:v1"), "127.0.0.1:5000/a/b/c:v1");
        assert_eq!(
            complete("registry.example:443/app"),
            "registry.example:443/app:latest"
        );
        assert_eq!(complete("[::1]:5000/app"), "[::1]:5000/app:latest");
        assert_eq!(complete("a:5000"), "docker.io/library/a:5000");
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let by_digest = format!("docker.io/library/busybox@sha256:{HEX}");
        assert_eq!(complete(&format!("busybox@sha256:{HEX}")), by_digest);
        assert_eq!(complete(&format!("busybox:1.36@sha256:{HEX}")), by_digest);
        let reference = Reference::parse(&by_digest).unwrap();
        assert_eq!(reference.tag_name(), None);
        assert_eq!(reference.version(), format!("sha256:{HEX}"));
    }

    #[test]
    fn separators_inside_components_are_allowed() {
        for name in ["a.b", "a_b", "a__b", "a-b", "a---b", "0/1", "ghcr.io/a-b/c_d.e"] {
            assert!(Reference::parse(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn malformed_references_are_refused_with_their_text() {
        let long_tag = format!("a:{}", "t".repeat(129));
        let long_name = format!("a/{}", "n".repeat(300));
        let id = format!("sha256:{HEX}");
        for wrong in [
            "",
            " ",
            "A",
            "Busybox",
            "a/B",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-x",
            "a@",
            "a@sha256:abc",
            "a@md5:00",
            "a b",
            "-a",
            "a-",
            "a___b",
            "a..b",
            "a:b:c",
            "http://a.b/c",
            "a.b:port/c",
            "a.b:0/c",
            "a.b:99999/c",
            "../etc/passwd",
            "a.b/../c",
            "[::1/a",
            "[zz]:5/a",
            "ä",
            "a\0b",
            "a\n",
            &long_tag,
            &long_name,
            &id,
            HEX,
        ] {
            let error = Reference::parse(wrong).unwrap_err();
            assert!(
                matches!(&error, ImageError::Reference(text) if text.contains(&format!("{wrong:?}"))),
                "{wrong}"
            );
        }
    }
}
