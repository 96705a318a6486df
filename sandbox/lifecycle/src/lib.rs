//! The lives of pods and containers as pure functions.
//!
//! Owns which state follows which event and what has to be done about it ([`sandbox`], [`container`]), how large a VM is
//! ([`sizing`]), and how an exit is named ([`exit`]). Must not know tasks, files, clocks, the guest or a hypervisor: times and ids
//! come in as arguments, and what is to be done goes out as effects.

pub mod container;
pub mod exit;
pub mod sandbox;
pub mod sizing;
