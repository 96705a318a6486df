//! caissond: the protocol edge of Caisson and the place where it is put together.
//!
//! Owns the CRI server (`runtime.v1` on a Unix socket), the translation between CRI types and the domain's own, the configuration and
//! the command line. Must not know how a pod is run, an image stored or a network made: it asks `caisson-sandbox`, `caisson-image` and
//! `caisson-net`. CRI types do not leave this crate.

pub mod answer;
pub mod check;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod deadline;
mod drivers;
pub mod image_command;
pub mod inquiry;
pub mod metrics;
pub mod notify;
pub mod nri;
pub mod outcome;
pub mod pod_cidr;
pub mod rpc;
pub mod runtime;
pub mod server;
pub mod socket;
pub mod status;
pub mod streams;
pub mod translate;
pub mod usage;
