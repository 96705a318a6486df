//! WebSocket (RFC 6455) as clients of Kubernetes use it: channels for exec and attach, a tunnel for port-forward.
//!
//! The WebSocket itself is tungstenite's. Messages are capped.

pub(crate) mod channels;
pub(crate) mod tunnel;

use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::status::Style;

/// Longest message that is taken, in bytes. Clients send pieces of 32 KiB.
pub(crate) const MAX_MESSAGE: usize = 1 << 20;

/// How channels are told apart in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Channelled {
    pub(crate) style: Style,
    /// Text messages: the channel as a digit, the bytes in base64.
    pub(crate) base64: bool,
    /// Channel 255 says that the channel named in its message has ended.
    pub(crate) closes: bool,
}

impl Channelled {
    pub(crate) const fn new(style: Style, base64: bool, closes: bool) -> Self {
        Self {
            style,
            base64,
            closes,
        }
    }
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}
