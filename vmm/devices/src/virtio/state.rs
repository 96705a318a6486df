//! What a function is while nothing happens to it: for those who keep a paused machine. Plain data; whoever writes it down says of which version
//! the whole is.
//!
//! What lies in the guest's memory (rings, buffers, what was plugged) is not in here, nor what the host has (files, taps, sockets): they are
//! brought by whoever makes the device anew.

use serde::{Deserialize, Serialize};

use super::device::DeviceType;

/// A virtio function: configuration space, interrupts, transport, and the device's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// What it is.
    pub kind: DeviceType,
    /// All bytes of configuration space.
    pub config: Vec<u8>,
    /// The MSI-X table.
    pub vectors: Vec<VectorState>,
    /// What its driver has set up.
    pub transport: TransportState,
    /// What only this kind of device has.
    pub device: DeviceState,
}

/// One vector of MSI-X.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorState {
    /// Address of the message.
    pub address: u64,
    /// Data of the message.
    pub data: u32,
    /// The guest wants none of it now.
    pub masked: bool,
    /// It was raised meanwhile.
    pub pending: bool,
}

/// The registers of the common configuration structure, and the queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Feature bits that the driver has accepted.
    pub features: u64,
    /// Status register.
    pub status: u8,
    /// ISR status register.
    pub isr: u8,
    /// Generation of the device's configuration space.
    pub generation: u8,
    /// Selects half of the device's features.
    pub device_select: u32,
    /// Selects half of the driver's features.
    pub driver_select: u32,
    /// Selects a queue.
    pub queue_select: u16,
    /// Vector for changes of the configuration; 0xffff is none.
    pub config_vector: u16,
    /// Every queue that the device has.
    pub queues: Vec<QueueState>,
}

/// A queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Elements.
    pub size: u16,
    /// Its vector; 0xffff is none.
    pub vector: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptors.
    pub descriptors: u64,
    /// Guest-physical address of the available ring.
    pub available: u64,
    /// Guest-physical address of the used ring.
    pub used: u64,
    /// Index of the available ring's next element for the device.
    pub next_available: u16,
    /// Index of the used ring's next element for the device.
    pub next_used: u16,
}

/// What only one kind of device has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceState {
    /// Nothing that is not in its queues or its files.
    Plain,
    /// A balloon.
    Balloon {
        /// Pages that the guest is asked to give.
        target: u32,
        /// Pages that it says it has given.
        actual: u32,
    },
    /// A memory device.
    Mem {
        /// Bytes that the guest is asked to have plugged.
        requested: u64,
        /// What is plugged: first address and bytes of each piece, in order.
        plugged: Vec<(u64, u64)>,
    },
    /// A network device.
    Net {
        /// Pairs of queues that the driver uses.
        pairs: u16,
    },
}

/// Why a device's state cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It works.
    #[error("the {0} device has not been suspended")]
    Working(&'static str),
    /// Writes wait for space on the host.
    #[error("disk {0} has writes that wait for space on the host")]
    Waiting(String),
}

/// Why a state is not this device's.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Of another kind, or of one that was made otherwise.
    #[error("the state is not that of this {device} device: its {what} differs")]
    Mismatch {
        /// The device.
        device: &'static str,
        /// What is not as it should be.
        what: &'static str,
    },
    /// Its driver has set it up already.
    #[error("the {0} device is not new")]
    Used(&'static str),
    /// The machine cannot give it its memory back.
    #[error("the {device} device cannot have its memory back")]
    Memory {
        /// The device.
        device: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
