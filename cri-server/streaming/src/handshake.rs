//! The HTTP side of a session: which transport and protocol a request asks for, and what it is answered.
//!
//! Pure: a function of the request's head.

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{status::Style, tokens::Wish, websocket::Channelled};

/// Protocols of exec and attach over SPDY that are understood, the best one first. Whoever knows v3 (v2 with sizes of terminals) also
/// knows v4.
const REMOTE_COMMAND: [(&str, Style); 3] = [
    ("v4.channel.k8s.io", Style::Json),
    ("v2.channel.k8s.io", Style::Text),
    ("channel.k8s.io", Style::Text),
];

/// Protocols of exec and attach over WebSocket.
const CHANNELLED: [(&str, Channelled); 5] = [
    ("v5.channel.k8s.io", Channelled::new(Style::Json, false, true)),
    ("v4.channel.k8s.io", Channelled::new(Style::Json, false, false)),
    (
        "v4.base64.channel.k8s.io",
        Channelled::new(Style::Json, true, false),
    ),
    ("channel.k8s.io", Channelled::new(Style::Text, false, false)),
    ("base64.channel.k8s.io", Channelled::new(Style::Text, true, false)),
];

/// The protocol of port-forward over SPDY.
const PORT_FORWARD: &str = "portforward.k8s.io";

/// ... and of SPDY in WebSocket messages.
const TUNNELLED_PORT_FORWARD: &str = "SPDY/3.1+portforward.k8s.io";

const SPDY: &str = "SPDY/3.1";
const PROTOCOL_HEADER: &str = "x-stream-protocol-version";

/// What will be spoken after the upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spoken {
    /// Exec or attach over SPDY.
    SpdyCommand(Style),
    /// Exec or attach over WebSocket.
    WebSocketCommand(Channelled),
    /// Port-forward over SPDY.
    SpdyForward,
    /// Port-forward over SPDY in WebSocket messages.
    TunnelledForward,
}

/// A request that cannot be served, as it is answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) reason: String,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self {
            status,
            reason: reason.into(),
        }
    }

    pub(crate) fn response(self) -> Response<String> {
        let mut response = Response::new(format!("{}\n", self.reason));
        *response.status_mut() = self.status;
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        response
    }
}

/// Decides, and makes the 101 answer.
pub(crate) fn negotiate<B>(request: &Request<B>, wish: &Wish) -> Result<(Spoken, Response<String>), Refusal> {
    let upgrade = request
        .headers()
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if !has_word(request.headers(), header::CONNECTION.as_str(), "upgrade") {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "unable to upgrade: missing upgrade headers in request",
        ));
    }
    if upgrade.eq_ignore_ascii_case("websocket") {
        return web_socket(request, wish);
    }
    if upgrade.eq_ignore_ascii_case(SPDY) {
        return spdy(request.headers(), wish);
    }
    Err(Refusal::new(
        StatusCode::BAD_REQUEST,
        format!("unable to upgrade: {upgrade:?} is neither {SPDY} nor websocket"),
    ))
}

/// The client's preference decides, as in Kubernetes' own server. A client that names none speaks the oldest.
fn spdy(headers: &HeaderMap, wish: &Wish) -> Result<(Spoken, Response<String>), Refusal> {
    let offered = words(headers, PROTOCOL_HEADER);
    let (spoken, name) = match wish {
        Wish::PortForward(_) => {
            let known = offered.is_empty() || offered.contains(&PORT_FORWARD);
            let chosen = known.then_some((Spoken::SpdyForward, PORT_FORWARD));
            chosen.ok_or_else(|| no_protocol(&offered, &[PORT_FORWARD]))?
        }
        Wish::Exec(_) | Wish::Attach(_) => {
            let known = |name: &&str| REMOTE_COMMAND.iter().find(|(known, _)| known == name);
            let chosen = if offered.is_empty() {
                REMOTE_COMMAND.last()
            } else {
                offered.iter().find_map(known)
            };
            let names: Vec<_> = REMOTE_COMMAND.iter().map(|(name, _)| *name).collect();
            let (name, style) = chosen.ok_or_else(|| no_protocol(&offered, &names))?;
            (Spoken::SpdyCommand(*style), *name)
        }
    };
    let mut response = switching(SPDY);
    if !offered.is_empty() {
        response
            .headers_mut()
            .insert(PROTOCOL_HEADER, HeaderValue::from_static(name));
    }
    Ok((spoken, response))
}

fn web_socket<B>(request: &Request<B>, wish: &Wish) -> Result<(Spoken, Response<String>), Refusal> {
    let headers = request.headers();
    let bad = |reason: &str| Refusal::new(StatusCode::BAD_REQUEST, reason);
    if request.method() != Method::GET {
        return Err(bad("a WebSocket begins with GET"));
    }
    if headers
        .get(header::SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        return Err(bad("only version 13 of WebSocket is spoken"));
    }
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .ok_or_else(|| bad("Sec-WebSocket-Key is missing"))?;
    let offered = words(headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
    let (spoken, name) = match wish {
        Wish::PortForward(_) => {
            let chosen = offered
                .contains(&TUNNELLED_PORT_FORWARD)
                .then_some((Spoken::TunnelledForward, TUNNELLED_PORT_FORWARD));
            chosen.ok_or_else(|| no_protocol(&offered, &[TUNNELLED_PORT_FORWARD]))?
        }
        Wish::Exec(_) | Wish::Attach(_) => {
            let known = |name: &&str| CHANNELLED.iter().find(|(known, _)| known == name);
            let names: Vec<_> = CHANNELLED.iter().map(|(name, _)| *name).collect();
            let chosen = offered
                .iter()
                .find_map(known)
                .ok_or_else(|| no_protocol(&offered, &names))?;
            (Spoken::WebSocketCommand(chosen.1), chosen.0)
        }
    };
    let mut response = switching("websocket");
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| bad("Sec-WebSocket-Key cannot be answered"))?;
    let answer = response.headers_mut();
    answer.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    answer.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    Ok((spoken, response))
}

fn switching(to: &'static str) -> Response<String> {
    let mut response = Response::new(String::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(to));
    response
}

fn no_protocol(offered: &[&str], known: &[&str]) -> Refusal {
    Refusal::new(
        StatusCode::FORBIDDEN,
        format!(
            "unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server accepts {known:?}"
        ),
    )
}

/// All words of a header: it may come several times, and each value may be a list.
fn words<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    let values = headers.get_all(name).into_iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .collect()
}

fn has_word(headers: &HeaderMap, name: &str, word: &str) -> bool {
    words(headers, name)
        .iter()
        .any(|known| known.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::{Attach, Stdio};

    fn attach() -> Wish {
        Wish::Attach(Attach {
            container: "c".into(),
            stdio: Stdio {
                stdin: false,
                stdout: true,
                stderr: false,
                tty: false,
            },
        })
    }

    fn request(pairs: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::get("/").header("connection", "keep-alive, Upgrade");
        for (name, value) in pairs {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn the_clients_first_known_protocol_is_spoken() {
        let offer = request(&[
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v9.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ("x-stream-protocol-version", "channel.k8s.io"),
        ]);
        let (spoken, response) = negotiate(&offer, &attach()).unwrap();
        assert_eq!(spoken, Spoken::SpdyCommand(Style::Json));
        assert_eq!(
            response.headers()["x-stream-protocol-version"],
            "v4.channel.k8s.io"
        );
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    }

    #[test]
    fn a_web_socket_is_accepted_as_its_specification_says() {
        let offer = request(&[
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io, v4.channel.k8s.io"),
        ]);
        let (spoken, response) = negotiate(&offer, &attach()).unwrap();
        assert!(matches!(spoken, Spoken::WebSocketCommand(_)));
        assert_eq!(
            response.headers()["sec-websocket-accept"],
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
        assert_eq!(response.headers()["sec-websocket-protocol"], "v5.channel.k8s.io");
    }

    #[test]
    fn what_cannot_be_upgraded_is_refused_with_the_reason() {
        let forward = Wish::PortForward("p".into());
        for (pairs, wish, status) in [
            (&[("upgrade", "h2c")][..], attach(), 400),
            (
                &[("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", "v9")],
                attach(),
                403,
            ),
            (
                &[
                    ("upgrade", "SPDY/3.1"),
                    ("x-stream-protocol-version", "v4.channel.k8s.io"),
                ],
                forward.clone(),
                403,
            ),
            (&[("upgrade", "websocket")], attach(), 400),
            (
                &[
                    ("upgrade", "websocket"),
                    ("sec-websocket-version", "13"),
                    ("sec-websocket-key", "x"),
                    ("sec-websocket-protocol", "v5.channel.k8s.io"),
                ],
                forward,
                403,
            ),
        ] {
            let refusal = negotiate(&request(pairs), &wish).unwrap_err();
            assert_eq!(refusal.status.as_u16(), status, "{pairs:?}");
        }
        let plain = Request::get("/").body(()).unwrap();
        assert_eq!(
            negotiate(&plain, &attach()).unwrap_err().status,
            StatusCode::BAD_REQUEST
        );
    }
}
