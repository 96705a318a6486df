//! The Node Resource Interface, as a runtime serves it to plugins.
//!
//! Owns what travels on the socket (a multiplexer with two connections, ttrpc on each), registration and synchronization of
//! plugins, the order in which they are told what happens to pods and containers, the merging of what they ask for, and the plugins that
//! are started by the daemon itself. Implements <https://github.com/containerd/nri>, v1alpha1, as of version 0.12.
//!
//! Must not know what a pod is made of, or how a wish is granted: see [`Node`]. Plugins are trusted parts of the host, but one that is
//! broken neither hangs nor kills the daemon: every wait has a deadline, every size a cap with a name.

mod connection;
mod error;
mod events;
pub mod frame;
mod launch;
mod listener;
mod merge;
mod node;
mod plugin;
mod settings;
mod told;
mod wire;

/// The messages of the interface.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated from proto/nri.proto, where the comments are"
)]
pub mod v1alpha1 {
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

#[allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    reason = "generated from proto/ttrpc.proto, where the comments are"
)]
mod envelope {
    include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
}

pub use error::NriError;
pub use events::{Created, Nri, Ticket};
pub use listener::Serving;
pub use merge::removal;
pub use node::Node;
pub use settings::Settings;
