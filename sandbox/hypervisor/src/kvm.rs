//! What the host's KVM can do. Placeholder while the workspace is laid out.
