//! The machine: what a VM is to KVM. Memory and its slots, virtual CPUs and their threads, interrupts, doorbells, and how a kernel is
//! started in it without any firmware.
//!
//! Owns every KVM call of the VMM (it is the only user of kvm-ioctls) and the guest's physical address map ([`layout`]). Must not know
//! what a device does, which devices there are, nor anything of pods: whoever embeds it puts devices on the buses and gives it a
//! kernel, and hears how the machine ended.
//!
//! The order of things: [`Vm::new`] (memory, slots, interrupt controller) -> devices are built with what [`Vm`] hands out, and put on
//! its buses -> [`Vm::boot`] (kernel, tables, vCPUs, threads) -> [`Machine`], until [`Machine::wait`] returns an [`End`].

pub mod acpi;
pub mod boot;
mod config_mirror;
mod cpu;
mod doorbells;
pub mod ends;
mod error;
pub mod exits;
mod interrupts;
pub mod kvm;
pub mod layout;
mod memory;
mod power;
pub mod state;
mod vcpu;
mod vm;

pub use boot::{Entry, Kernel};
pub use config_mirror::ConfigMirror;
pub use cpu::{MsrValue, Tweaks};
pub use ends::End;
pub use error::Error;
pub use exits::{ExitCounts, ExitReason};
pub use kvm::Host;
pub use memory::{Backing, Ram};
pub use state::MachineState;
pub use vcpu::Machine;
pub use vm::{Config, EnterCpuThread, Vm};
