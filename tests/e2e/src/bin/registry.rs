//! `make registry`: a registry in the foreground on 127.0.0.1:5000 that holds demo/busybox:1, for trying a pod by hand.

use std::path::Path;

use anyhow::Result;
use caisson_e2e::{image, registry::Registry, run};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> Result<()> {
    run(async {
        let registry = Registry::start_at(Path::new("/tmp/caisson/registry"), 5000).await?;
        let reference = registry.push("demo/busybox", "1", &image::busybox()?)?;
        println!("{reference} is there; end with Ctrl-C");
        let mut told = signal(SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted?,
            _ = told.recv() => {}
        }
        Ok(())
    })
}
