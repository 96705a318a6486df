//! What can go wrong while a machine is made or changed.

use std::io;

use crate::{acpi::AcpiError, boot::KernelError, layout::LayoutError};

/// Why a machine could not be made, started or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM (or the kernel around it) refused.
    #[error("cannot {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM lacks what no machine can do without.
    #[error("this host's KVM has no {0}")]
    Missing(&'static str),
    /// KVM did not take a model-specific register.
    #[error("KVM refuses to set MSR {index:#x} to {value:#x} on vCPU {cpu}")]
    Msr {
        /// Which register.
        index: u32,
        /// What it was to become.
        value: u64,
        /// On which vCPU.
        cpu: u8,
    },
    /// KVM does not give a model-specific register that was asked for.
    #[error("KVM refuses to read MSR {index:#x} of vCPU {cpu}")]
    MsrRead {
        /// Which register.
        index: u32,
        /// Of which vCPU.
        cpu: u8,
    },
    /// A state can only be had of a machine that stands still.
    #[error("the machine is not paused")]
    NotPaused,
    /// Guest memory could not be had.
    #[error("cannot make {bytes} bytes of guest memory")]
    Memory {
        /// How much was asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The number of vCPUs makes no sense.
    #[error("{boot} of {most} vCPUs: between 1 and {limit} may be had, and no more may run than there are")]
    Cpus {
        /// Running from the start.
        boot: u8,
        /// Present.
        most: u8,
        /// More than these are impossible here.
        limit: u8,
    },
    /// The address map does not hold it.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The kernel or its initramfs cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The tables do not fit.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A thread for a vCPU could not be started.
    #[error("cannot start a thread for vCPU {cpu}")]
    Thread {
        /// Which one.
        cpu: u8,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A device of the machine itself collides with another.
    #[error("cannot put the {0} on its bus")]
    Bus(&'static str, #[source] caisson_devices::bus::BusError),
}

impl Error {
    /// For `map_err` on what kvm-ioctls returns.
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm {
            what,
            source: io::Error::from_raw_os_error(e.errno()),
        }
    }
}
