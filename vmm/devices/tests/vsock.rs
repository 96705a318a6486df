//! The vsock device under a driver that keeps the rules, and under one that does not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod driver;

#[path = "vsock/hostile.rs"]
mod hostile;

#[path = "vsock/streams.rs"]
mod streams;
