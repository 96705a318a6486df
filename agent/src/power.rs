//! The guest's power button: a connection of the host's to [`POWER_PORT`](caisson_agent_api::POWER_PORT). Containers get SIGTERM and some time,
//! files are written out, the agent ends, and PID 1 switches the VM off.
//!
//! A virtual machine without firmware has no button of its own: one by ACPI would need a driver, an input layer and a listener in each guest's
//! kernel, where the agent listens to the host anyway.

use std::{future::Future, time::Duration};

use tokio::{sync::Notify, time::timeout};

use crate::{console::complain, error::chain, guest::Guest};

/// How long containers may take to end after SIGTERM. Whoever wants them to have longer stops them first, one by one.
const GRACE: Duration = Duration::from_secs(10);
/// How long the kernel may take to write out what is dirty; a volume of the host's that hangs must not hold up the end.
const SYNC_LIMIT: Duration = Duration::from_secs(10);

const SIGTERM: u32 = libc::SIGTERM.unsigned_abs();

/// Waits for the button, and does what it asks for; `never` runs beside it and has no end.
pub(crate) async fn until_pressed(pressed: &Notify, guest: &Guest, never: impl Future) -> Result<(), ()> {
    let press = async {
        pressed.notified().await;
        wind_down(guest).await;
    };
    tokio::select! {
        () = press => Ok(()),
        _ = never => Err(()),
    }
}

/// Ends all containers and writes out all files, each within its bound.
async fn wind_down(guest: &Guest) {
    let running: Vec<_> = guest
        .containers()
        .iter()
        .filter_map(|container| container.started().ok())
        .filter(|started| started.process.ended().is_none())
        .collect();
    for started in &running {
        if let Err(error) = started.process.signal(SIGTERM) {
            complain(&format!("ending a container: {}", chain(&error)));
        }
    }
    let all = async {
        for started in &running {
            started.process.end().await;
        }
    };
    if timeout(GRACE, all).await.is_err() {
        complain("containers still run after their time; switching off all the same");
    }
    let synced = tokio::task::spawn_blocking(rustix::fs::sync);
    if timeout(SYNC_LIMIT, synced).await.is_err() {
        complain("files cannot be written out in time; switching off all the same");
    }
}
