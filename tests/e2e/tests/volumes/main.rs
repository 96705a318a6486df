//! Volumes, asked for as kubelet does, one module for each kind; and what happens when one cannot be had, or the host has no space.

use std::{fs, path::Path, process::Command};

use anyhow::Result;
use caisson_e2e::{
    host::{Host, command},
    image::{self, Image, Layer},
};

mod disks;
mod empty_dirs;
mod full_host;
mod projected;
mod shared;
mod sockets_below;
mod unusable;

/// busybox, and `/probe` for what it lacks (probe.c).
fn probe_image(host: &Host) -> Result<Image> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/volumes/probe.c");
    let binary = host.dir().join("probe");
    command(
        Command::new("gcc")
            .args(["-O1", "-static", "-Wall", "-Werror", "-o"])
            .arg(&binary)
            .arg(&source),
    )?;
    let probe = Layer::default()
        .file("probe", 0o755, &fs::read(&binary)?)?
        .gzip()?;
    let config = serde_json::json!({ "Env": ["PATH=/bin"] });
    Ok(Image::new(vec![image::busybox_layer()?, probe], &config))
}
