//! Types, server and client of the Container Runtime Interface.
//!
//! Owns the wire format of `runtime.v1`, and that of the few calls that the admin's commands need beside it. CRI types stop in cri-server: no other room may depend on this crate.

/// `runtime.v1`, generated from `proto/runtime.proto`.
#[allow(
    missing_docs,
    clippy::all,
    reason = "generated; the published interface is the documentation"
)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// `caisson.admin.v1`, generated from `proto/admin.proto`: what `caissond image` asks of the daemon that runs.
#[allow(
    missing_docs,
    clippy::all,
    reason = "generated; the interface file is the documentation"
)]
pub mod admin {
    tonic::include_proto!("caisson.admin.v1");
}
