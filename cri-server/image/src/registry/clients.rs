//! HTTP clients: one for everybody, one past the proxy for this machine, and one for each place that is reached in a way of its own.
//!
//! Those of a way of their own are made anew when the files they are made of have changed, so that a renewed certificate needs no restart.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use reqwest::redirect;
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use sha2::{Digest as _, Sha256};

use crate::{ImageError, hosts::Reach};

const MAX_REDIRECTS: usize = 10;
/// Clients kept; each is a connection pool.
const MAX_KEPT: usize = 64;

/// Makes clients and keeps them.
pub(super) struct Clients {
    authorities: rustls::RootCertStore,
    connect_timeout: Duration,
    proxied: reqwest::Client,
    direct: reqwest::Client,
    /// By a digest of everything they are made of.
    special: Mutex<HashMap<[u8; 32], reqwest::Client>>,
}

impl Clients {
    /// Reads the system's certificate authorities and these files: once, so a change there needs a restart.
    pub(super) fn new(ca_files: &[PathBuf], connect_timeout: Duration) -> Result<Self, ImageError> {
        let authorities = authorities(ca_files)?;
        let build = |direct| {
            let tls = tls(authorities.clone(), &[], false)?;
            client(tls, connect_timeout, direct, redirect::Policy::custom(follow))
        };
        Ok(Self {
            proxied: build(false)?,
            direct: build(true)?,
            authorities,
            connect_timeout,
            special: Mutex::default(),
        })
    }

    /// The client for places without anything special; `direct` passes the proxy by.
    pub(super) fn common(&self, direct: bool) -> &reqwest::Client {
        if direct { &self.direct } else { &self.proxied }
    }

    /// The client for a place that is reached like this. It follows no redirects: what is special is for this place only.
    pub(super) fn special(&self, reach: &Reach, direct: bool) -> Result<reqwest::Client, ImageError> {
        let made_of = Material::read(reach)?;
        let key = made_of.digest(reach, direct);
        let mut kept = self.special.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = kept.get(&key) {
            return Ok(client.clone());
        }
        let mut authorities = self.authorities.clone();
        for (file, pem) in &made_of.authorities {
            add_authorities(&mut authorities, file, pem)?;
        }
        let tls = tls(authorities, &made_of.clients, reach.skip_verify)?;
        let timeout = reach.dial_timeout.unwrap_or(self.connect_timeout);
        let made = client(tls, timeout, direct, redirect::Policy::none())?;
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(key, made.clone());
        Ok(made)
    }
}

/// A client certificate's file, its contents, and its key where that is a file of its own.
type ClientFiles<'a> = (&'a Path, Vec<u8>, Option<Vec<u8>>);

/// The contents of the files that a place's settings name.
struct Material<'a> {
    authorities: Vec<(&'a Path, Vec<u8>)>,
    clients: Vec<ClientFiles<'a>>,
}

impl<'a> Material<'a> {
    fn read(reach: &'a Reach) -> Result<Self, ImageError> {
        let read = |file: &Path| std::fs::read(file).map_err(|error| refuse(file, &error));
        let authorities = reach
            .authorities
            .iter()
            .map(|file| Ok((file.as_path(), read(file)?)));
        let clients = reach.clients.iter().map(|(certificate, key)| {
            let key = key.as_deref().map(read).transpose()?;
            Ok((certificate.as_path(), read(certificate)?, key))
        });
        Ok(Self {
            authorities: authorities.collect::<Result<_, ImageError>>()?,
            clients: clients.collect::<Result<_, ImageError>>()?,
        })
    }

    fn digest(&self, reach: &Reach, direct: bool) -> [u8; 32] {
        let mut hasher = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(&[u8::from(direct), u8::from(reach.skip_verify)]);
        part(&reach.dial_timeout.unwrap_or_default().as_nanos().to_le_bytes());
        part(b"authorities");
        for (_, pem) in &self.authorities {
            part(pem);
        }
        part(b"clients");
        for (_, certificate, key) in &self.clients {
            part(certificate);
            part(key.as_deref().unwrap_or_default());
        }
        hasher.finalize().into()
    }
}

fn client(
    tls: rustls::ClientConfig,
    connect_timeout: Duration,
    direct: bool,
    redirects: redirect::Policy,
) -> Result<reqwest::Client, ImageError> {
    let builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .connect_timeout(connect_timeout)
        .pool_idle_timeout(Duration::from_secs(15))
        .user_agent(concat!("caisson/", env!("CARGO_PKG_VERSION")))
        .redirect(redirects);
    let builder = if direct { builder.no_proxy() } else { builder };
    builder.build().map_err(|error| {
        ImageError::Configuration(format!("no HTTP client: {}", crate::error::describe(&error)))
    })
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

fn tls(
    authorities: rustls::RootCertStore,
    clients: &[ClientFiles<'_>],
    skip_verify: bool,
) -> Result<rustls::ClientConfig, ImageError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| ImageError::Configuration(format!("TLS: {error}")))?;
    let builder = if skip_verify {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        builder.with_root_certificates(authorities)
    };
    // One identity for each place; with several, the first, as a server cannot be asked which it likes before it is known.
    let Some((file, certificate, key)) = clients.first() else {
        return Ok(builder.with_no_client_auth());
    };
    if clients.len() > 1 {
        return Err(refuse(
            file,
            &"more than one client certificate for one place is not supported",
        ));
    }
    let chain = CertificateDer::pem_slice_iter(certificate)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| refuse(file, &error))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_deref().unwrap_or(certificate))
        .map_err(|error| refuse(file, &format!("its key: {error}")))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| refuse(file, &error))
}

fn authorities(files: &[PathBuf]) -> Result<rustls::RootCertStore, ImageError> {
    let mut roots = rustls::RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "registry.system_certificates");
    }
    roots.add_parsable_certificates(native.certs);
    for file in files {
        let pem = std::fs::read(file).map_err(|error| refuse(file, &error))?;
        add_authorities(&mut roots, file, &pem)?;
    }
    Ok(roots)
}

fn add_authorities(roots: &mut rustls::RootCertStore, file: &Path, pem: &[u8]) -> Result<(), ImageError> {
    let mut added = 0;
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| refuse(file, &error))?;
        roots.add(certificate).map_err(|error| refuse(file, &error))?;
        added += 1;
    }
    if added == 0 {
        Err(refuse(file, &"it holds no certificate"))
    } else {
        Ok(())
    }
}

fn refuse(file: &Path, reason: &dyn std::fmt::Display) -> ImageError {
    ImageError::Configuration(format!("certificate file {}: {reason}", file.display()))
}

/// Takes every certificate: what `skip_verify` asks for. The handshake is still one, with the key of that certificate.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
