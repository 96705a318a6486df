//! One place that content comes from: a registry over HTTP, or an archive or directory that is imported.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use super::remote::{self, Remote};
use crate::{
    ErrorKind, RegistryError,
    digest::Digest,
    layout::{Imported, Section},
};

/// A document that is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Document<'a> {
    /// A manifest or index, by tag or digest.
    Manifest(&'a str),
    /// A small blob, by digest.
    Blob(&'a Digest),
}

impl Document<'_> {
    fn path(self, repository: &str) -> String {
        match self {
            Self::Manifest(version) => format!("{repository}/manifests/{version}"),
            Self::Blob(digest) => format!("{repository}/blobs/{digest}"),
        }
    }
}

/// A registry, a mirror, or what is imported.
pub(crate) enum Endpoint {
    /// Over HTTP.
    Remote(Box<Remote>),
    /// From this host.
    Imported(Imported),
}

impl Endpoint {
    /// Whether it may be asked for `document`.
    pub(super) fn offers(&self, document: Document<'_>) -> bool {
        match (self, document) {
            (Self::Imported(_), _) => true,
            (Self::Remote(remote), Document::Manifest(version)) if Digest::parse(version).is_none() => {
                remote.resolves()
            }
            (Self::Remote(remote), _) => remote.pulls(),
        }
    }

    /// The request in words, for errors.
    pub(super) fn describe(&self, repository: &str, document: Document<'_>) -> String {
        match self {
            Self::Remote(remote) => remote.describe(&document.path(repository)),
            Self::Imported(imported) => imported.describe(document),
        }
    }

    /// A whole document of at most `cap` bytes, and its content type.
    pub(super) async fn document(
        &self,
        repository: &str,
        document: Document<'_>,
        cap: u64,
    ) -> Result<(Vec<u8>, String), RegistryError> {
        match self {
            Self::Remote(remote) => remote.document(repository, &document.path(repository), cap).await,
            Self::Imported(imported) => imported.document(document, cap).await,
        }
    }

    /// A blob from `offset` on. Verifying it is the caller's part, who sees all of it.
    pub(crate) async fn blob(
        &self,
        repository: &str,
        digest: &Digest,
        offset: u64,
    ) -> Result<BlobStream, RegistryError> {
        match self {
            Self::Remote(remote) if remote.pulls() => remote.blob(repository, digest, offset).await,
            Self::Remote(_) => {
                let tried = self.describe(repository, Document::Blob(digest));
                let reason = "its capabilities do not include \"pull\"";
                Err(RegistryError::new(ErrorKind::NotFound, tried, reason))
            }
            Self::Imported(imported) => imported.blob(digest, offset),
        }
    }

    /// A blob from an address of its own, which must be HTTPS and never sees credentials.
    pub(crate) async fn foreign(&self, address: &str, offset: u64) -> Result<BlobStream, RegistryError> {
        match self {
            Self::Remote(remote) => remote.foreign(address, offset).await,
            Self::Imported(_) => Err(RegistryError::new(
                ErrorKind::NotFound,
                format!("layer {address:?}"),
                "an import fetches nothing from elsewhere",
            )),
        }
    }
}

/// A blob that is coming in.
#[derive(Debug)]
pub(crate) struct BlobStream {
    source: Source,
    /// Where in the blob the stream starts: the offset asked for, or 0 when the registry ignores ranges.
    pub(crate) start: u64,
    tried: String,
}

#[derive(Debug)]
enum Source {
    Response(Response, Duration),
    Section(Section),
}

impl BlobStream {
    /// Out of an answer; a wait for the next bytes ends after `stall`.
    pub(super) fn remote(response: Response, start: u64, tried: String, stall: Duration) -> Self {
        Self {
            source: Source::Response(response, stall),
            start,
            tried,
        }
    }

    /// Out of a file, from `start` on.
    pub(crate) fn local(section: Section, start: u64, tried: String) -> Self {
        Self {
            source: Source::Section(section),
            start,
            tried,
        }
    }

    /// Bytes that the stream says it will bring, when it says.
    pub(crate) fn announced(&self) -> Option<u64> {
        match &self.source {
            Source::Response(response, _) => response.content_length(),
            Source::Section(section) => Some(section.len()),
        }
    }

    /// The request in words, for errors.
    pub(crate) fn tried(&self) -> &str {
        &self.tried
    }

    /// The next bytes; nothing at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        match &mut self.source {
            Source::Response(response, stall) => remote::next_chunk(response, &self.tried, *stall).await,
            Source::Section(section) => section.next().await.map_err(|error| {
                RegistryError::new(ErrorKind::Internal, self.tried.as_str(), "it cannot be read")
                    .because(error)
            }),
        }
    }
}
