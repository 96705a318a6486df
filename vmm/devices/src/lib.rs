//! Devices of a VM, independent of how they are attached to it.
//!
//! Owns what happens between a guest's queues and the host's files. Must not know KVM, PCI, vhost-user, or Kubernetes: whoever embeds
//! a device brings guest memory, queues and an event loop. Everything that comes from the guest is hostile: no panic, checked
//! arithmetic, named caps on every size that the guest chooses.

pub mod bus;
mod complaints;
pub mod i8042;
pub mod pci;
pub mod ports;
pub mod serial;
pub mod virtio;
