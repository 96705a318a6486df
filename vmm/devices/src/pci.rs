//! PCI as far as virtual functions need it (PCI Local Bus 3.0, PCI Express Base for ECAM): one root bus without bridges.
//!
//! - `config`: the 256 bytes of configuration space of a function, with their write masks;
//! - `msix`: the interrupts of a function;
//! - `root`: the bus, where functions come and go, and where their BARs are;
//! - `access`: how a vCPU reaches configuration space (ECAM, and ports 0xcf8/0xcfc);
//! - `window`: which addresses are given out.
//!
//! Must not know what the functions do.

mod access;
mod config;
mod msix;
mod root;
mod window;

pub use access::{ConfigMechanism1, ECAM_BYTES, Ecam};
pub use config::{Bar, BarKind, CONFIG_BYTES, Capability, ConfigSpace, Identity};
pub use msix::{MAX_VECTORS, Msix};
pub use root::{HOT_PLUGGABLE, PciAddress, PciFunction, PciRoot, RootError};
pub use window::Window;
