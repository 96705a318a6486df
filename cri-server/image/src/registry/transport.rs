//! How registries are reached: addresses, plain HTTP or TLS, mirrors.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use reqwest::{Url, redirect};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::endpoint::Endpoint;
use crate::{Credentials, ImageError, ImageStoreConfig, reference::Reference};

const MAX_REDIRECTS: usize = 10;

/// Shared by all pulls: connection pools, and who is reached how.
#[derive(Clone)]
pub(crate) struct Transport {
    proxied: reqwest::Client,
    direct: reqwest::Client,
    config: Arc<ImageStoreConfig>,
}

impl Transport {
    /// Reads the system's certificate authorities and the configured ones: once, so a changed CA needs a restart.
    pub(crate) fn new(config: Arc<ImageStoreConfig>) -> Result<Self, ImageError> {
        let tls = tls(&config.ca_files)?;
        let build = |direct: bool| {
            let builder = reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .connect_timeout(config.stall_deadline)
                .pool_idle_timeout(Duration::from_secs(15))
                .user_agent(concat!("caisson/", env!("CARGO_PKG_VERSION")))
                .redirect(redirect::Policy::custom(follow));
            let builder = if direct { builder.no_proxy() } else { builder };
            builder.build().map_err(|error| {
                ImageError::Configuration(format!("no HTTP client: {}", crate::error::describe(&error)))
            })
        };
        Ok(Self {
            proxied: build(false)?,
            direct: build(true)?,
            config,
        })
    }

    /// Mirrors in their order, without credentials, then the registry itself.
    pub(crate) fn endpoints(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Vec<Endpoint>, ImageError> {
        let registry = reference.registry();
        let mut endpoints = Vec::new();
        for mirror in self.config.mirrors.get(registry).into_iter().flatten() {
            endpoints.push(self.endpoint(mirror, Some(registry), Credentials::Anonymous)?);
        }
        let host = if registry == "docker.io" {
            "registry-1.docker.io"
        } else {
            registry
        };
        endpoints.push(self.endpoint(host, None, credentials.clone())?);
        Ok(endpoints)
    }

    fn endpoint(
        &self,
        address: &str,
        mirror_of: Option<&str>,
        credentials: Credentials,
    ) -> Result<Endpoint, ImageError> {
        let base = if address.starts_with("http://") || address.starts_with("https://") {
            format!("{}/v2/", address.trim_end_matches('/'))
        } else {
            let scheme = if self.is_plain(address) { "http" } else { "https" };
            format!("{scheme}://{address}/v2/")
        };
        let base = Url::parse(&base)
            .map_err(|error| ImageError::Configuration(format!("registry address {address:?}: {error}")))?;
        let http = if base.host_str().is_some_and(is_loopback) {
            &self.direct
        } else {
            &self.proxied
        };
        let mirror_of = mirror_of.map(ToOwned::to_owned);
        Ok(Endpoint::new(
            http.clone(),
            base,
            mirror_of,
            credentials,
            self.config.stall_deadline,
        ))
    }

    /// Configured as insecure, or on this machine: Docker's rule, so that a registry on loopback needs no certificate. One with a certificate
    /// is reached by a mirror entry that starts with `https://`, or by a name that is not `localhost`.
    fn is_plain(&self, address: &str) -> bool {
        let host = Url::parse(&format!("http://{address}")).ok();
        self.config
            .insecure_registries
            .iter()
            .any(|insecure| insecure == address)
            || host.as_ref().and_then(Url::host_str).is_some_and(is_loopback)
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Follows a registry to its blob storage, but never from TLS to plain text.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from_tls = attempt
        .previous()
        .last()
        .is_some_and(|from| from.scheme() == "https");
    if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error("too many redirects")
    } else if from_tls && attempt.url().scheme() != "https" {
        attempt.error("a redirect from https to http is not followed")
    } else {
        attempt.follow()
    }
}

fn tls(ca_files: &[std::path::PathBuf]) -> Result<rustls::ClientConfig, ImageError> {
    let mut roots = rustls::RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "registry.system_certificates");
    }
    roots.add_parsable_certificates(native.certs);
    for file in ca_files {
        add_authorities(&mut roots, file)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ImageError::Configuration(format!("TLS: {error}")))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

fn add_authorities(roots: &mut rustls::RootCertStore, file: &Path) -> Result<(), ImageError> {
    let refuse = |reason: String| ImageError::Configuration(format!("ca file {}: {reason}", file.display()));
    let certificates = CertificateDer::pem_file_iter(file).map_err(|error| refuse(error.to_string()))?;
    let mut added = 0;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| refuse(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| refuse(error.to_string()))?;
        added += 1;
    }
    if added == 0 {
        Err(refuse("it holds no certificate".into()))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts_are_recognized() {
        for host in ["localhost", "127.0.0.1", "127.9.8.7", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "example", "[2001:db8::1]"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
