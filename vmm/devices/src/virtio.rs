//! virtio devices (virtio 1.2), without their transport.

pub mod vsock;
