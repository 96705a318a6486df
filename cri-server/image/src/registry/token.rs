//! Buying a bearer token: Docker's token protocol, and its OAuth2 form for refresh tokens.

use std::time::Duration;

use reqwest::{RequestBuilder, Url};
use serde::Deserialize;

use super::remote::{read_capped, send};
use crate::{Credentials, ErrorKind, RegistryError};

const MAX_TOKEN_ANSWER: u64 = 1 << 20;

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// What a token is wanted for.
pub(super) struct Purpose<'a> {
    /// Where the registry sells tokens.
    pub(super) realm: &'a str,
    /// The service it named.
    pub(super) service: Option<&'a str>,
    /// The repository to pull from.
    pub(super) repository: &'a str,
    /// Whether the registry itself is spoken to without TLS: only then may the realm be.
    pub(super) plain: bool,
}

/// Asks the realm for a token that can pull from the repository.
pub(super) async fn buy(
    http: &reqwest::Client,
    purpose: &Purpose<'_>,
    credentials: &Credentials,
    stall: Duration,
) -> Result<String, RegistryError> {
    let unavailable = |reason: &str| {
        RegistryError::new(
            ErrorKind::Unavailable,
            format!("token from {:?}", purpose.realm),
            reason,
        )
    };
    let realm = Url::parse(purpose.realm).map_err(|_| unavailable("the registry named no usable address"))?;
    if !(realm.scheme() == "https" || purpose.plain && realm.scheme() == "http") {
        return Err(unavailable(
            "credentials are not sent to a token service without TLS",
        ));
    }
    let tried = format!("token from {}", realm.host_str().unwrap_or_default());
    let response = send(request(http, realm, purpose, credentials), &tried, stall).await?;
    let status = response.status();
    let body = read_capped(response, MAX_TOKEN_ANSWER, &tried, stall).await?;
    if !status.is_success() {
        let (kind, transient) = match status.as_u16() {
            429 | 500..=599 => (ErrorKind::Unavailable, true),
            _ => (ErrorKind::Unauthorized, false),
        };
        let reason = format!("{status}{}", super::remote::said(&body));
        let error = RegistryError::new(kind, tried, reason);
        return Err(if transient { error.transient() } else { error });
    }
    let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|error| {
        RegistryError::new(
            ErrorKind::Unavailable,
            tried.as_str(),
            "the answer is not understood",
        )
        .because(error)
    })?;
    answer
        .token
        .or(answer.access_token)
        .filter(|token| !token.is_empty())
        .ok_or_else(|| RegistryError::new(ErrorKind::Unauthorized, tried, "the answer holds no token"))
}

fn request(
    http: &reqwest::Client,
    realm: Url,
    purpose: &Purpose<'_>,
    credentials: &Credentials,
) -> RequestBuilder {
    let scope = format!("repository:{}:pull", purpose.repository);
    let mut parameters = vec![("scope", scope.as_str())];
    parameters.extend(purpose.service.map(|service| ("service", service)));
    match credentials {
        Credentials::IdentityToken(token) => {
            parameters.push(("grant_type", "refresh_token"));
            parameters.push(("client_id", "caisson"));
            parameters.push(("refresh_token", token));
            http.post(realm).form(&parameters)
        }
        Credentials::Basic { username, password } => http
            .get(realm)
            .query(&parameters)
            .basic_auth(username, Some(password)),
        Credentials::Anonymous | Credentials::Bearer(_) => http.get(realm).query(&parameters),
    }
}
