//! The CNI runtime side (specification 0.3.0 to 1.1.0): configuration, execution, cache, results.
//!
//! Owns what libcni owns in Go. Must not know namespaces beyond their path, and nothing of taps.

pub(crate) mod cache;
pub(crate) mod conflist;
pub(crate) mod execute;
pub(crate) mod network;
pub(crate) mod result;
pub(crate) mod strays;
