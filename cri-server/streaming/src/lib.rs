//! Exec, attach and port-forward as clients of the CRI use them: an HTTP server with one-time tokens, SPDY/3.1 and WebSocket.
//!
//! Owns what happens between a client's connection and the byte streams of a process or a port ([`port`]). Must not know VMs, pods'
//! states, or the CRI's messages.
//!
//! The wire formats ([`spdy::frame`], [`spdy::headers`]) are public so that they can be fuzzed and spoken from the other side.

mod activity;
mod channel;
mod handshake;
mod hangup;
pub mod port;
mod port_forward;
mod remote_command;
mod resize;
mod server;
mod sessions;
pub mod spdy;
mod status;
mod tls;
mod tokens;
mod websocket;

pub use server::{Config, Endpoint, MAX_CONNECTIONS, Server, ServerError};
pub use tls::{TlsError, TlsFiles};
pub use tokens::{MAX_TOKENS, TOKEN_LIFETIME, TooManyTokens, Wish};
