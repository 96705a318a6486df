//! How registries are reached: addresses, plain HTTP or TLS, mirrors, and whose credentials go where.

use std::{net::IpAddr, sync::Arc};

use reqwest::{Url, header::HeaderMap};

use super::{
    clients::Clients,
    remote::{Place, Remote},
};
use crate::{
    Credentials, ImageError, ImageStoreConfig, auth_files,
    hosts::{self, Host, Reach},
    reference::Reference,
};

/// Shared by all pulls: connection pools, and who is reached how.
#[derive(Clone)]
pub(crate) struct Transport {
    clients: Arc<Clients>,
    config: Arc<ImageStoreConfig>,
}

impl Transport {
    /// Reads the system's certificate authorities and the configured ones.
    pub(crate) fn new(config: Arc<ImageStoreConfig>) -> Result<Self, ImageError> {
        let clients = Clients::new(&config.ca_files, config.stall_deadline)?;
        Ok(Self {
            clients: Arc::new(clients),
            config,
        })
    }

    /// Mirrors in their order, then the registry itself. The pull's credentials, or the host's when it has none, go to the registry; a
    /// mirror gets only what the host has for that mirror.
    pub(crate) async fn endpoints(
        &self,
        reference: &Reference,
        credentials: &Credentials,
    ) -> Result<Vec<Remote>, ImageError> {
        let registry = reference.registry();
        let hosts = self.hosts(registry).await?;
        let mut endpoints = Vec::new();
        for host in hosts {
            let credentials = if host.is_server {
                match credentials {
                    Credentials::Anonymous => self.own_credentials(registry, reference).await?,
                    given => given.clone(),
                }
            } else {
                let place = authority(&host.base);
                self.own_credentials(&place, reference).await?
            };
            endpoints.push(self.remote(host, registry, credentials)?);
        }
        Ok(endpoints)
    }

    async fn own_credentials(&self, place: &str, reference: &Reference) -> Result<Credentials, ImageError> {
        auth_files::find(&self.config.auth_files, place, reference.repository())
            .await
            .map_err(|source| ImageError::Registry {
                image: reference.to_string(),
                source,
            })
    }

    /// Configured mirrors first, then what the directories say.
    async fn hosts(&self, registry: &str) -> Result<Vec<Host>, ImageError> {
        let mut hosts = Vec::new();
        for mirror in self.config.mirrors.get(registry).into_iter().flatten() {
            let base = self.base(mirror)?;
            hosts.push(plain_host(base, false));
        }
        let own = if is_docker_hub(registry) {
            "registry-1.docker.io"
        } else {
            registry
        };
        let base = self.base(own)?;
        let (roots, name) = (self.config.hosts_dirs.clone(), registry.to_owned());
        let address = base.origin().ascii_serialization();
        let found = tokio::task::spawn_blocking(move || hosts::find(&roots, &name, &address)).await;
        match found.map_err(|_| ImageError::Interrupted("reading hosts.toml"))? {
            Ok(Some(found)) => hosts.extend(found),
            Ok(None) => hosts.push(plain_host(base, true)),
            Err(reason) => return Err(ImageError::Configuration(reason)),
        }
        Ok(hosts)
    }

    fn base(&self, address: &str) -> Result<Url, ImageError> {
        let base = if address.starts_with("http://") || address.starts_with("https://") {
            format!("{}/v2/", address.trim_end_matches('/'))
        } else {
            let scheme = if self.is_plain(address) { "http" } else { "https" };
            format!("{scheme}://{address}/v2/")
        };
        Url::parse(&base)
            .map_err(|error| ImageError::Configuration(format!("registry address {address:?}: {error}")))
    }

    fn remote(&self, host: Host, registry: &str, credentials: Credentials) -> Result<Remote, ImageError> {
        let direct = host.base.host_str().is_some_and(is_loopback);
        let common = self.clients.common(direct);
        let special = host.reach != Reach::default() || !host.headers.is_empty();
        let http = if special {
            self.clients.special(&host.reach, direct)?
        } else {
            common.clone()
        };
        let place = Place {
            http,
            base: host.base,
            headers: host.headers,
            // Where a redirect leads is not this place any more, and is reached like any other.
            strangers: special.then(|| self.clients.common(false).clone()),
            mirror_of: (!host.is_server).then(|| registry.to_owned()),
            resolves: host.resolves,
            pulls: host.pulls,
        };
        Ok(Remote::new(place, credentials, self.config.stall_deadline))
    }

    /// Configured as insecure, or on this machine: Docker's rule, so that a registry on loopback needs no certificate. One with a certificate
    /// is reached by an address that starts with `https://`, or by a name that is not `localhost`.
    fn is_plain(&self, address: &str) -> bool {
        let host = Url::parse(&format!("http://{address}")).ok();
        self.config
            .insecure_registries
            .iter()
            .any(|insecure| insecure == address)
            || host.as_ref().and_then(Url::host_str).is_some_and(is_loopback)
    }
}

fn plain_host(base: Url, is_server: bool) -> Host {
    Host {
        base,
        is_server,
        resolves: true,
        pulls: true,
        reach: Reach::default(),
        headers: HeaderMap::new(),
    }
}

/// `host[:port]`, as references write it.
fn authority(base: &Url) -> String {
    let host = base.host_str().unwrap_or_default();
    match base.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Docker Hub goes by several names.
pub(crate) fn is_docker_hub(host: &str) -> bool {
    ["docker.io", "index.docker.io", "registry-1.docker.io"]
        .iter()
        .any(|name| name.eq_ignore_ascii_case(host))
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
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
