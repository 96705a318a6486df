//! virtio devices on a PCI bus, under a driver that keeps the rules, and under one that does not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod machine;

#[path = "virtio/conformance.rs"]
#[macro_use]
mod conformance;

#[path = "virtio/balloon.rs"]
mod balloon;
#[path = "virtio/block.rs"]
mod block;
#[path = "virtio/mem.rs"]
mod mem;
#[path = "virtio/net.rs"]
mod net;
#[path = "virtio/pmem.rs"]
mod pmem;
#[path = "virtio/rng.rs"]
mod rng;
#[path = "virtio/transport.rs"]
mod transport;
#[path = "virtio/vsock.rs"]
mod vsock;
#[path = "virtio/wire.rs"]
mod wire;
