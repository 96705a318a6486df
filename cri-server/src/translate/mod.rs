//! From CRI requests to the domain's own words. Every field of a request is used, kept to be answered back, or refused by its path;
//! docs/cri-fields.md has the list.
//!
//! Pure but for mounts and seccomp profiles, which look at the host paths that they name.

mod adjustment;
mod capabilities;
mod container;
mod credentials;
mod devices;
mod image_mounts;
mod mounts;
mod namespaces;
mod network;
pub(crate) mod nri_limits;
mod pod;
mod process;
mod refusals;
mod resources;
mod seccomp;
mod security;
mod signals;

pub use adjustment::adjusted;
pub use container::container_spec;
pub use credentials::credentials;
pub use image_mounts::{MountImages, mounted_images};
pub use namespaces::target_container;
pub use pod::pod_spec;
pub use refusals::{Refusal, Refusals};
pub(crate) use resources::{answered as answered_resources, cpuset, limit_change, pod_limits};
pub use signals::{cri_signal, signal_number};

/// Runtime handlers that are this runtime; the empty one is kubelet's default.
pub const HANDLERS: [&str; 2] = ["", "caisson"];

/// Refuses a runtime handler that is not one of ours.
pub(crate) fn handler(field: &str, handler: &str, refusals: &mut Refusals) {
    if !HANDLERS.contains(&handler) {
        refusals.add(
            field,
            format!(
                "{handler:?} is not a runtime handler of this node; it has \"caisson\" and the default \"\""
            ),
        );
    }
}
