//! Requests to registries: HTTP, TLS, credentials, mirrors and retries.
//!
//! Implements the pull half of the OCI distribution specification 1.1 and the token exchange of Docker registries. Everything that a
//! registry sends is read with a cap, and every wait for it ends. Connections are shared between pulls; credentials and the tokens they
//! buy belong to one pull, and go only to the registry that they were given for. Must not know the store, layers or EROFS.

mod challenge;
mod clients;
mod endpoint;
mod remote;
mod token;
mod transport;

use std::time::Duration;

pub(crate) use endpoint::{BlobStream, Document, Endpoint};
pub(crate) use transport::{Transport, is_docker_hub};

use crate::{ErrorKind, RegistryError, digest::Digest, manifest::MAX_MANIFEST_BYTES, reference::Reference};

/// How often a request without an answer is sent.
pub(crate) const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// A document under a tag or digest, as it came.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content_type: String,
    pub(crate) digest: Digest,
}

/// The places that may have one repository: mirrors first, the registry itself last.
pub(crate) struct Sources {
    endpoints: Vec<Endpoint>,
    repository: String,
    /// The one that has the image; it is asked first from then on.
    preferred: usize,
}

impl Sources {
    pub(crate) fn new(endpoints: Vec<Endpoint>, reference: &Reference) -> Self {
        Self {
            endpoints,
            repository: reference.repository().to_owned(),
            preferred: 0,
        }
    }

    /// Everywhere the content may be, the preferred place first.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let (before, from) = self.endpoints.split_at(self.preferred.min(self.endpoints.len()));
        from.iter().chain(before)
    }

    pub(crate) fn repository(&self) -> &str {
        &self.repository
    }

    /// Fetches a manifest or index; the place that gave it becomes the preferred one.
    pub(crate) async fn manifest(&mut self, version: &str) -> Result<Fetched, RegistryError> {
        let (index, fetched) = self.find(version, self.preferred).await?;
        // Who may not say what a tag is may still have the content, and was put first by the admin.
        let document = Document::Manifest(version);
        let passed = self.endpoints.iter().take(index).skip(self.preferred);
        let unasked = passed.take_while(|endpoint| endpoint.offers(document)).count();
        self.preferred += unasked;
        Ok(fetched)
    }

    /// Fetches a manifest that is not the image's own: what is preferred stays so.
    pub(crate) async fn other_manifest(&self, version: &str) -> Result<Fetched, RegistryError> {
        self.find(version, 0).await.map(|(_, fetched)| fetched)
    }

    async fn find(&self, version: &str, from: usize) -> Result<(usize, Fetched), RegistryError> {
        let wanted = Digest::parse(version);
        let wanted = (Document::Manifest(version), wanted.as_ref());
        let mut failures = Vec::new();
        for (index, endpoint) in self.endpoints.iter().enumerate().skip(from) {
            if !endpoint.offers(wanted.0) {
                continue;
            }
            match document(endpoint, &self.repository, wanted, MAX_MANIFEST_BYTES).await {
                Ok(fetched) => return Ok((index, fetched)),
                Err(error) => failures.push(error),
            }
        }
        Err(summarize(failures))
    }

    /// Fetches a small blob whole, verified.
    pub(crate) async fn small_blob(&self, digest: &Digest, cap: u64) -> Result<Vec<u8>, RegistryError> {
        let wanted = (Document::Blob(digest), Some(digest));
        let mut failures = Vec::new();
        for endpoint in self.endpoints() {
            if !endpoint.offers(wanted.0) {
                continue;
            }
            match document(endpoint, &self.repository, wanted, cap).await {
                Ok(fetched) => return Ok(fetched.bytes),
                Err(error) => failures.push(error),
            }
        }
        Err(summarize(failures))
    }
}

/// One document from one place, with retries, and the digest it must have.
async fn document(
    endpoint: &Endpoint,
    repository: &str,
    (asked, wanted): (Document<'_>, Option<&Digest>),
    cap: u64,
) -> Result<Fetched, RegistryError> {
    let mut attempt = 0;
    let (bytes, content_type) = loop {
        match endpoint.document(repository, asked, cap).await {
            Ok(answer) => break answer,
            Err(error) if error.transient && attempt + 1 < ATTEMPTS => {
                attempt += 1;
                tracing::debug!(error = %crate::error::describe(&error), attempt, "registry.retry");
                if let Some(wait) = error.retry_after {
                    tokio::time::sleep(wait).await;
                } else {
                    pause(attempt).await;
                }
            }
            Err(error) => return Err(error),
        }
    };
    let digest = match wanted {
        Some(wanted) => match wanted.mismatch(&bytes) {
            None => wanted.clone(),
            Some(found) => {
                let reason = format!("the content has digest {found}");
                return Err(RegistryError::new(
                    ErrorKind::Refused,
                    endpoint.describe(repository, asked),
                    reason,
                ));
            }
        },
        None => Digest::of(&bytes),
    };
    Ok(Fetched {
        bytes,
        content_type,
        digest,
    })
}

/// Waits before attempt number `attempt`.
pub(crate) async fn pause(attempt: u32) {
    tokio::time::sleep(FIRST_PAUSE * 2u32.saturating_pow(attempt.saturating_sub(1).min(4))).await;
}

/// The registry's own answer, with those of the mirrors beside it.
pub(crate) fn summarize(mut failures: Vec<RegistryError>) -> RegistryError {
    let Some(mut last) = failures.pop() else {
        return RegistryError::new(ErrorKind::Internal, "pull", "there is no registry to ask");
    };
    for failure in failures {
        last.reason.push_str("; also tried ");
        last.reason.push_str(&crate::error::describe(&failure));
    }
    last
}
