//! virtio devices (virtio 1.2) and their transport.
//!
//! - `device`: what every device is, and how a queue is served;
//! - `chain`: the buffers of one request;
//! - `transport`, `pci`, `interrupt`: how a driver reaches a device;
//! - `worker`: the thread on which a device works;
//! - the rest: one module for each kind of device.

pub mod balloon;
pub mod block;
mod chain;
mod device;
mod discard;
mod interrupt;
pub mod mem;
pub mod net;
mod pci;
pub mod pmem;
pub mod rng;
pub mod state;
mod transport;
pub mod vsock;
mod worker;

pub use chain::{Buffers, ChainError, IoVecs, MAX_BYTES, MAX_PIECES, Pieces};
pub use device::{ActivateError, Activation, ActiveQueue, DeviceType, Outcome, Served, VirtioDevice};
pub use interrupt::{Interrupt, NO_VECTOR};
pub use pci::{Attachment, VirtioPci, VirtioPciError};
pub use transport::MAX_QUEUES;
pub use worker::Host;
