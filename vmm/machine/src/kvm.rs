//! What this host's KVM can do.
//!
//! KVM comes in flavours: on Intel and AMD hardware, nested, and paravirtual (PVM, without vmx or svm). What every flavour has is
//! required; everything else is optional and only used where it is.

#![expect(unsafe_code, reason = "adopts a file descriptor")]

use std::{
    fs::File,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    path::Path,
};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use crate::Error;

/// An open `/dev/kvm`, and what it offers.
#[derive(Debug)]
pub struct Host {
    pub(crate) kvm: Kvm,
    /// What KVM lets a guest see of the CPU.
    pub(crate) cpuid: CpuId,
    /// What is there of the optional capabilities.
    pub optional: Optional,
}

/// Capabilities that a machine makes use of where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Optional {
    /// Memory that the guest cannot write to.
    pub read_only_memory: bool,
    /// Writes of the guest that end in an event, without an exit to user space.
    pub doorbells: bool,
    /// Events that end in an interrupt.
    pub interrupt_events: bool,
    /// The local APIC's timer takes a deadline in TSC ticks.
    pub tsc_deadline_timer: bool,
    /// The performance counters can be left out.
    pub no_counters: bool,
    /// Intel's KVM wants to know where it may put its own pages.
    pub own_pages: bool,
}

/// KVM_PMU_CAP_DISABLE of KVM_CAP_PMU_CAPABILITY.
pub(crate) const COUNTERS_DISABLE: u64 = 1;
/// KVM_CAP_PMU_CAPABILITY; kvm-ioctls does not name it.
pub(crate) const CAP_COUNTERS: u32 = 212;

impl Host {
    /// Opens `/dev/kvm`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| Error::Kvm {
                what: "open the KVM device",
                source,
            })?;
        Self::from_fd(file.into())
    }

    /// Uses an open `/dev/kvm`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        // SAFETY: the descriptor is owned and given up here, so nothing else closes it. That it is KVM's is checked by the next call:
        // on any other file the ioctl fails.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(Error::Missing("KVM API version 12"));
        }
        for (capability, name) in [
            (Cap::Irqchip, "interrupt controller (KVM_CAP_IRQCHIP)"),
            (Cap::UserMemory, "memory of user space (KVM_CAP_USER_MEMORY)"),
            (Cap::SignalMsi, "direct MSI (KVM_CAP_SIGNAL_MSI)"),
            (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
            (Cap::ExtCpuid, "CPUID (KVM_CAP_EXT_CPUID)"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(Error::Missing(name));
            }
        }
        let optional = Optional {
            read_only_memory: kvm.check_extension(Cap::ReadonlyMem),
            doorbells: kvm.check_extension(Cap::Ioeventfd) && kvm.check_extension(Cap::IoeventfdNoLength),
            interrupt_events: kvm.check_extension(Cap::Irqfd) && kvm.check_extension(Cap::IrqRouting),
            tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
            no_counters: kvm.check_extension_raw(CAP_COUNTERS.into()) & COUNTERS_DISABLE as i32 != 0,
            own_pages: kvm.check_extension(Cap::SetTssAddr) && kvm.check_extension(Cap::SetIdentityMapAddr),
        };
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("learn which CPU features KVM supports"))?;
        Ok(Self { kvm, cpuid, optional })
    }

    /// The most vCPUs that a machine may have here. APIC identifiers are bytes, and 255 means all of them.
    #[must_use]
    pub fn cpu_limit(&self) -> u8 {
        u8::try_from(self.kvm.get_max_vcpus()).unwrap_or(u8::MAX).min(254)
    }

    /// Bits of a guest's physical addresses.
    #[must_use]
    pub fn address_bits(&self) -> u8 {
        let leaf = self.cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008);
        // A CPU without that leaf has 36.
        leaf.map_or(36, |e| e.eax.to_le_bytes()[0])
    }
}
