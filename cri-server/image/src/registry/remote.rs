//! One place that speaks the registry protocol over HTTP, with the authorization of one pull.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use reqwest::{
    RequestBuilder, Response, StatusCode, Url,
    header::{
        ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RANGE,
        RETRY_AFTER, WWW_AUTHENTICATE,
    },
};
use serde::Deserialize;
use tokio::time::{Instant, timeout};

use super::{
    challenge::{self, Challenge},
    endpoint::BlobStream,
    token::{self, Purpose},
};
use crate::{Credentials, ErrorKind, RegistryError, digest::Digest, manifest::ACCEPTED};

/// What is read of an error's body.
const MAX_ERROR_ANSWER: u64 = 16 << 10;
/// A whole document has this many times the stall deadline, however slowly it drips.
const DOCUMENT_PATIENCE: u32 = 8;

/// Redirects that are followed by hand.
const MAX_REDIRECTS: u32 = 10;
/// Longest wait that a registry may ask for before the next attempt.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Where a registry or a mirror is and how it is reached.
pub(super) struct Place {
    /// Reaches this place.
    pub(super) http: reqwest::Client,
    /// Where its interface begins.
    pub(super) base: Url,
    /// Go with every request to it.
    pub(super) headers: HeaderMap,
    /// Follows its redirects, when `http` must not: to another host without headers, credentials or trust of this one.
    pub(super) strangers: Option<reqwest::Client>,
    /// The registry that it is a mirror of.
    pub(super) mirror_of: Option<String>,
    /// May say what a tag is.
    pub(super) resolves: bool,
    /// May give manifests by digest, and blobs.
    pub(super) pulls: bool,
}

/// A registry or a mirror.
pub(crate) struct Remote {
    place: Place,
    credentials: Credentials,
    authorization: Mutex<Option<Authorization>>,
    stall: Duration,
}

/// What goes with a request, once it is known what the registry wants.
#[derive(Clone, PartialEq, Eq)]
enum Authorization {
    /// The pull's user and password.
    Basic,
    /// A token, as header.
    Bearer(HeaderValue),
}

impl Remote {
    pub(super) fn new(place: Place, credentials: Credentials, stall: Duration) -> Self {
        let authorization = match &credentials {
            Credentials::Bearer(token) => bearer(token),
            _ => None,
        };
        Self {
            place,
            credentials,
            authorization: Mutex::new(authorization),
            stall,
        }
    }

    /// Whether it may say what a tag is.
    pub(super) fn resolves(&self) -> bool {
        self.place.resolves
    }

    /// Whether it may give manifests by digest, and blobs.
    pub(super) fn pulls(&self) -> bool {
        self.place.pulls
    }

    /// The request for `path` in words, for errors.
    pub(super) fn describe(&self, path: &str) -> String {
        format!("GET {}{path}", self.place.base)
    }

    /// A whole document of at most `cap` bytes, and its content type.
    pub(super) async fn document(
        &self,
        repository: &str,
        path: &str,
        cap: u64,
    ) -> Result<(Vec<u8>, String), RegistryError> {
        let tried = self.describe(path);
        let whole = async {
            let response = self.get(repository, path, None).await?;
            let content_type = header(&response, CONTENT_TYPE.as_str());
            Ok((
                read_capped(response, cap, &tried, self.stall).await?,
                content_type,
            ))
        };
        match timeout(self.stall * DOCUMENT_PATIENCE, whole).await {
            Ok(answer) => answer,
            Err(_) => Err(stalled(&tried, self.stall * DOCUMENT_PATIENCE)),
        }
    }

    /// A blob from `offset` on. Verifying it is the caller's part, who sees all of it.
    pub(super) async fn blob(
        &self,
        repository: &str,
        digest: &Digest,
        offset: u64,
    ) -> Result<BlobStream, RegistryError> {
        let path = format!("{repository}/blobs/{digest}");
        let response = self.get(repository, &path, Some(offset)).await?;
        stream(response, offset, self.describe(&path), self.stall)
    }

    /// A blob from an address of its own, which must be HTTPS and never sees credentials.
    pub(super) async fn foreign(&self, address: &str, offset: u64) -> Result<BlobStream, RegistryError> {
        let tried = format!("GET {address:?}");
        let url = Url::parse(address)
            .ok()
            .filter(|url| url.scheme() == "https")
            .ok_or_else(|| {
                RegistryError::new(
                    ErrorKind::Refused,
                    tried.as_str(),
                    "only https addresses of layers are followed",
                )
            })?;
        let http = self.place.strangers.as_ref().unwrap_or(&self.place.http);
        let response = send(with_range(http.get(url), Some(offset)), &tried, self.stall).await?;
        if !response.status().is_success() {
            return Err(failure(response, &tried, self.stall).await);
        }
        stream(response, offset, tried, self.stall)
    }

    /// Sends, and answers a challenge once: with a first token, or with a new one when the old has expired.
    async fn get(
        &self,
        repository: &str,
        path: &str,
        offset: Option<u64>,
    ) -> Result<Response, RegistryError> {
        let tried = self.describe(path);
        let mut url = self
            .place
            .base
            .join(path)
            .map_err(|_| RegistryError::new(ErrorKind::Invalid, tried.as_str(), "this is no address"))?;
        if let Some(registry) = &self.place.mirror_of {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        let mut challenged = false;
        loop {
            let request = self
                .place
                .http
                .get(url.clone())
                .headers(self.place.headers.clone());
            let request = with_range(request.header(ACCEPT, ACCEPTED), offset);
            let response = send(self.authorized(request), &tried, self.stall).await?;
            let response = match &self.place.strangers {
                Some(strangers) if response.status().is_redirection() => {
                    self.follow(strangers, response, &tried, offset).await?
                }
                _ => response,
            };
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::UNAUTHORIZED if !challenged => {
                    challenged = true;
                    if !self.authorize(&response, repository).await? {
                        return Err(failure(response, &tried, self.stall).await);
                    }
                }
                _ => return Err(failure(response, &tried, self.stall).await),
            }
        }
    }

    /// Follows a redirect: on the same host with everything that goes to it, elsewhere with nothing.
    async fn follow(
        &self,
        strangers: &reqwest::Client,
        mut response: Response,
        tried: &str,
        offset: Option<u64>,
    ) -> Result<Response, RegistryError> {
        let refused = |reason: &str| RegistryError::new(ErrorKind::Unavailable, tried, reason);
        for _ in 0..MAX_REDIRECTS {
            let next = header(&response, LOCATION.as_str());
            let next = response.url().join(&next);
            let next = next.map_err(|_| refused("it is redirected to what is no address"))?;
            if response.url().scheme() == "https" && next.scheme() != "https" {
                return Err(refused("a redirect from https to http is not followed"));
            }
            let request = if next.origin() == self.place.base.origin() {
                let request = self.place.http.get(next).headers(self.place.headers.clone());
                self.authorized(request.header(ACCEPT, ACCEPTED))
            } else {
                strangers.get(next)
            };
            response = send(with_range(request, offset), tried, self.stall).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
        }
        Err(refused("too many redirects"))
    }

    fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        let authorization = self
            .authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match (authorization, &self.credentials) {
            (Some(Authorization::Bearer(token)), _) => request.header(AUTHORIZATION, token),
            (Some(Authorization::Basic), Credentials::Basic { username, password }) => {
                request.basic_auth(username, Some(password))
            }
            _ => request,
        }
    }

    /// Whether there is something new to show for the challenge in `response`.
    async fn authorize(&self, response: &Response, repository: &str) -> Result<bool, RegistryError> {
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = challenge::strongest(challenges.iter().filter_map(|value| value.to_str().ok()));
        let authorization = match (challenge, &self.credentials) {
            // A token that was given is all there is: no other can be made of it.
            (None, _) | (_, Credentials::Bearer(_)) => None,
            (Some(Challenge::Basic), Credentials::Basic { .. }) => Some(Authorization::Basic),
            (Some(Challenge::Basic), _) => None,
            (Some(Challenge::Bearer { realm, service }), credentials) => {
                let purpose = Purpose {
                    realm: &realm,
                    service: service.as_deref(),
                    repository,
                    plain: self.place.base.scheme() == "http",
                };
                bearer(&token::buy(&self.place.http, &purpose, credentials, self.stall).await?)
            }
        };
        let mut current = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
        let news = authorization.is_some() && *current != authorization;
        if news {
            *current = authorization;
        }
        Ok(news)
    }
}

/// A blob's bytes out of an answer that has a range, or all of them.
fn stream(
    response: Response,
    offset: u64,
    tried: String,
    stall: Duration,
) -> Result<BlobStream, RegistryError> {
    let start = if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = header(&response, CONTENT_RANGE.as_str());
        if !range.starts_with(&format!("bytes {offset}-")) {
            let reason = format!("asked for the bytes from {offset} on, got the range {range:?}");
            return Err(RegistryError::new(ErrorKind::Unavailable, tried, reason));
        }
        offset
    } else {
        0
    };
    Ok(BlobStream::remote(response, start, tried, stall))
}

fn with_range(request: RequestBuilder, offset: Option<u64>) -> RequestBuilder {
    match offset {
        Some(offset) if offset > 0 => request.header(RANGE, format!("bytes={offset}-")),
        _ => request,
    }
}

/// A token as header, marked so that no log shows it. Nothing when it cannot be one: tokens come from outside.
fn bearer(token: &str) -> Option<Authorization> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(Authorization::Bearer(value))
}

fn header(response: &Response, name: &str) -> String {
    response
        .headers()
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

/// Sends a request and waits for the head of its answer.
pub(super) async fn send(
    request: RequestBuilder,
    tried: &str,
    stall: Duration,
) -> Result<Response, RegistryError> {
    match timeout(stall, request.send()).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(broken(error, tried)),
        Err(_) => Err(stalled(tried, stall)),
    }
}

/// The next bytes of a body; nothing at its end.
pub(super) async fn next_chunk(
    response: &mut Response,
    tried: &str,
    stall: Duration,
) -> Result<Option<Bytes>, RegistryError> {
    let began = Instant::now();
    loop {
        match timeout(stall.saturating_sub(began.elapsed()), response.chunk()).await {
            // An empty chunk is no progress.
            Ok(Ok(Some(bytes))) if bytes.is_empty() => {}
            Ok(Ok(chunk)) => return Ok(chunk),
            Ok(Err(error)) => return Err(broken(error, tried)),
            Err(_) => return Err(stalled(tried, stall)),
        }
    }
}

/// A whole body of at most `cap` bytes.
pub(super) async fn read_capped(
    mut response: Response,
    cap: u64,
    tried: &str,
    stall: Duration,
) -> Result<Vec<u8>, RegistryError> {
    let mut body = Vec::new();
    while let Some(chunk) = next_chunk(&mut response, tried, stall).await? {
        body.extend_from_slice(&chunk);
        if body.len() as u64 > cap {
            let reason = format!("the answer is larger than {cap} bytes");
            return Err(RegistryError::new(ErrorKind::Refused, tried, reason));
        }
    }
    Ok(body)
}

fn stalled(tried: &str, stall: Duration) -> RegistryError {
    let reason = format!("no progress for {} s", stall.as_secs_f32());
    RegistryError::new(ErrorKind::Deadline, tried, reason)
}

/// The connection could not be made, broke, or does not carry HTTP.
fn broken(error: reqwest::Error, tried: &str) -> RegistryError {
    let (reason, transient) = if error.is_timeout() {
        ("the connection could not be made in time", false)
    } else if error.is_connect() {
        ("cannot connect", false)
    } else if error.is_redirect() {
        ("the redirect is refused", false)
    } else {
        ("the connection broke", true)
    };
    let failure = RegistryError::new(ErrorKind::Unavailable, tried, reason).because(error.without_url());
    if transient { failure.transient() } else { failure }
}

/// What an answer without success means.
async fn failure(response: Response, tried: &str, stall: Duration) -> RegistryError {
    let status = response.status();
    let kind = match status.as_u16() {
        401 | 403 => ErrorKind::Unauthorized,
        404 => ErrorKind::NotFound,
        _ => ErrorKind::Unavailable,
    };
    let retry_after = retry_after(&header(&response, RETRY_AFTER.as_str()));
    let body = read_capped(response, MAX_ERROR_ANSWER, tried, stall)
        .await
        .unwrap_or_default();
    let mut error = RegistryError::new(kind, tried, format!("{status}{}", said(&body)));
    error.retry_after = retry_after;
    if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
        error.transient()
    } else {
        error
    }
}

/// A wait in seconds that the registry asks for, within reason. The other form of the header, a date, is not used by registries.
fn retry_after(text: &str) -> Option<Duration> {
    let seconds = text.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<OneError>,
}

#[derive(Deserialize)]
struct OneError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The registry's own words, when its body has the form the specification gives errors. Printable, and not long.
pub(super) fn said(body: &[u8]) -> String {
    let Ok(Errors { errors }) = serde_json::from_slice(body) else {
        return String::new();
    };
    let words: Vec<_> = errors
        .iter()
        .take(4)
        .map(|one| format!("{}: {}", one.code, one.message))
        .collect();
    if words.is_empty() {
        return String::new();
    }
    let words: String = words
        .join("; ")
        .chars()
        .take(400)
        .flat_map(char::escape_debug)
        .collect();
    format!(" ({words})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registrys_words_are_printable_and_short() {
        let body = serde_json::json!({"errors": [{"code": "DENIED", "message": "no\u{1b}[31m"}]}).to_string();
        assert_eq!(said(body.as_bytes()), " (DENIED: no\\u{1b}[31m)");
        assert_eq!(said(b"<html>"), "");
        let long = serde_json::json!({"errors": [{"code": "X", "message": "y".repeat(10_000)}]}).to_string();
        assert!(said(long.as_bytes()).len() < 500);
    }

    #[test]
    fn a_registry_cannot_ask_for_a_wait_without_end() {
        assert_eq!(retry_after("3"), Some(Duration::from_secs(3)));
        assert_eq!(retry_after("99999999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), None);
        assert_eq!(retry_after("-1"), None);
    }

    #[test]
    fn a_token_that_is_no_header_is_not_used() {
        assert!(bearer("abc").is_some());
        assert!(bearer("a\r\nHost: b").is_none());
    }
}
