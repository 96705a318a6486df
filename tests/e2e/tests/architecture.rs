//! The direction of dependencies that ARCHITECTURE.md draws, checked against what cargo says.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{checkout, host::text};

/// Which rooms each room may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "caissond",
        &[
            "caisson-builtin",
            "caisson-cri-api",
            "caisson-hypervisor",
            "caisson-image",
            "caisson-net",
            "caisson-nri",
            "caisson-qemu",
            "caisson-sandbox",
            "caisson-seccomp",
            "caisson-streaming",
        ],
    ),
    ("caisson-cri-api", &[]),
    ("caisson-streaming", &[]),
    ("caisson-image", &["caisson-erofs", "caisson-layer-converter"]),
    ("caisson-erofs", &[]),
    ("caisson-layer-converter", &["caisson-erofs"]),
    (
        "caisson-sandbox",
        &[
            "caisson-agent-api",
            "caisson-apparmor",
            "caisson-guest",
            "caisson-hypervisor",
            "caisson-lifecycle",
            "caisson-net",
        ],
    ),
    ("caisson-apparmor", &[]),
    ("caisson-lifecycle", &[]),
    ("caisson-seccomp", &[]),
    ("caisson-guest", &["caisson-agent-api"]),
    ("caisson-file-server", &[]),
    ("caisson-hypervisor", &[]),
    ("caisson-qemu", &["caisson-hypervisor"]),
    ("caisson-net", &[]),
    ("caisson-nri", &[]),
    ("caisson-agent", &["caisson-agent-api"]),
    ("caisson-agent-api", &[]),
    ("caisson-builtin", &["caisson-hypervisor", "caisson-vmm-api"]),
    (
        "caisson-vmm",
        &[
            "caisson-confinement",
            "caisson-devices",
            "caisson-machine",
            "caisson-vmm-api",
        ],
    ),
    ("caisson-vmm-api", &[]),
    ("caisson-confinement", &[]),
    ("caisson-machine", &["caisson-devices"]),
    ("caisson-devices", &[]),
    ("caisson-vhost-vsock", &["caisson-devices"]),
    ("caisson-e2e", &[]),
];

/// Crates that only some rooms may use, because knowing them means knowing too much.
const RESERVED: &[(&str, &[&str])] = &[
    ("rtnetlink", &["caisson-net"]),
    ("reqwest", &["caisson-image"]),
    ("k8s-cri", &["caisson-e2e"]),
    ("kvm-ioctls", &["caisson-machine"]),
    // The vhost-user framework hands its rings over in this crate's types.
    ("virtio-queue", &["caisson-devices", "caisson-vhost-vsock"]),
];

#[test]
fn dependencies_point_one_way() -> Result<()> {
    let metadata = text(Command::new("cargo").current_dir(checkout()).args([
        "metadata",
        "--no-deps",
        "--offline",
        "--format-version=1",
    ]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let mut rooms = BTreeMap::new();
    for package in metadata["packages"].as_array().context("no packages")? {
        let name = package["name"].as_str().context("no name")?;
        let dependencies: BTreeSet<&str> = package["dependencies"]
            .as_array()
            .context("no dependencies")?
            .iter()
            // Tests may use what they like.
            .filter(|d| d["kind"] != "dev")
            .filter_map(|d| d["name"].as_str())
            .collect();
        rooms.insert(name, dependencies);
    }
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    for (room, dependencies) in &rooms {
        let may = allowed
            .get(room)
            .with_context(|| format!("{room} is not in the list of rooms"))?;
        for dependency in dependencies.iter().filter(|d| rooms.contains_key(*d)) {
            ensure!(may.contains(dependency), "{room} must not depend on {dependency}");
        }
    }
    for (library, owners) in RESERVED {
        for (room, dependencies) in &rooms {
            ensure!(
                !dependencies.contains(library) || owners.contains(room),
                "{room} must not use {library}: {owners:?} own it"
            );
        }
    }
    // The pure rooms stay pure.
    for impure in ["tokio", "tonic", "rustix", "libc", "nix"] {
        for room in ["caisson-lifecycle", "caisson-seccomp"] {
            ensure!(!rooms[room].contains(impure), "{room} must not use {impure}");
        }
    }
    for asynchronous in ["tokio", "tonic"] {
        for room in [
            "caisson-confinement",
            "caisson-devices",
            "caisson-file-server",
            "caisson-layer-converter",
            "caisson-machine",
            "caisson-vhost-vsock",
            "caisson-vmm",
            "caisson-vmm-api",
        ] {
            ensure!(
                !rooms[room].contains(asynchronous),
                "{room} must not use {asynchronous}"
            );
        }
    }
    Ok(())
}
