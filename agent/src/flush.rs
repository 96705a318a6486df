//! What a container has written and only the guest knows of goes to the host before its end is told: the VM may be gone a moment later,
//! and with it what a memory map or a disk's cache still holds. On a host's own kernel it would survive the container.

use std::{fs::File, path::PathBuf, time::Duration};

use caisson_agent_api::v1::mount::Source;

use crate::{
    console::complain,
    error::{AgentError, At},
    guest::Container,
    service::blocking,
    shared,
};

/// How long the end of a container may wait for it: the other side may be a host's disk that hangs.
const BOUND: Duration = Duration::from_secs(10);

/// Flushes what this container could write to, as well as can be.
pub(crate) async fn container(container: &Container) {
    let spec = &container.spec;
    let shared: Vec<PathBuf> = spec
        .mounts
        .iter()
        .filter(|mount| !mount.readonly)
        .filter_map(|mount| match &mount.source {
            Some(Source::Shared(shared)) if !shared.socket => {
                Some(shared::path(shared.session, &shared.export))
            }
            _ => None,
        })
        .collect();
    let disks: Vec<String> = spec
        .block_devices
        .iter()
        .filter(|disk| !disk.readonly)
        .map(|disk| disk.serial.clone())
        .collect();
    if shared.is_empty() && disks.is_empty() {
        return;
    }
    let flushed = tokio::time::timeout(BOUND, blocking(move || flush(&shared, &disks))).await;
    match flushed {
        Ok(Ok(())) => {}
        Ok(Err(error)) => complain(&format!("flushing volumes of {}: {error}", container.id)),
        Err(_) => complain(&format!("flushing volumes of {} took too long", container.id)),
    }
}

fn flush(shared: &[PathBuf], disks: &[String]) -> Result<(), AgentError> {
    for path in shared {
        let step = || format!("flushing {}", path.display());
        let top = File::open(path).at(step)?;
        rustix::fs::syncfs(&top).at(step)?;
    }
    for serial in disks {
        let node = crate::devices::disk(serial)?;
        let step = || format!("flushing {}", node.display());
        File::open(&node).and_then(|disk| disk.sync_all()).at(step)?;
    }
    Ok(())
}
