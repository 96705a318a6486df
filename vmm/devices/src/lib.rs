//! Devices of a VM, from the bus on which a vCPU reaches them to the host's files.
//!
//! Owns what happens between a guest's accesses and queues, and the host. Must not know KVM, vhost-user, or Kubernetes: whoever embeds
//! devices brings what [`ports`] asks for. Everything that comes from the guest is hostile: no panic, checked arithmetic, named caps on
//! every size that the guest chooses.

pub mod bus;
pub mod complaints;
pub mod followed_memory;
pub mod i8042;
pub mod pci;
pub mod ports;
pub mod serial;
pub mod virtio;
