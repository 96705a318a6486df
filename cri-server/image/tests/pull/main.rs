//! Pulls from a real registry and from one that lies.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::let_underscore_must_use,
    reason = "helpers of tests: a failure in one is a failure of the test"
)]

mod credentials;
mod export;
mod fake;
mod fixture;
mod hostile;
mod hosts;
mod import;
mod layers;
mod real;
mod server_process;
mod sharing;
mod signatures;
mod store;
mod tokens;
