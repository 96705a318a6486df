//! Types, server and client of the Container Runtime Interface.
//!
//! Owns the wire format of `runtime.v1` and nothing else. CRI types stop in cri-server: no other room may depend on this crate.

/// `runtime.v1`, generated from `proto/runtime.proto`.
#[allow(
    missing_docs,
    clippy::all,
    reason = "generated; the published interface is the documentation"
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}
