//! A running VM gets more memory and vCPUs: what is asked of the VMM, and how long the guest may take.

use std::{path::Path, time::Duration};

use caisson_hypervisor::{HypervisorError, VmGrowth};
use caisson_vmm_api::control::{Reply, Request, Status};
use tokio::time::{Instant, sleep};

use crate::client::{ask, unexpected};

/// What the guest plugs at once, MiB: less would never arrive.
const STEP_MIB: u64 = 4;

/// First and longest pause between two questions how far the guest is: it takes milliseconds, unless it is busy.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// Asks for both, and waits until the guest has the memory.
pub(crate) async fn grow(control: &Path, growth: VmGrowth) -> Result<(), HypervisorError> {
    let before = status(control).await?;
    if growth.vcpus > before.vcpus {
        request(control, Request::ResizeVcpus { count: growth.vcpus }).await?;
    }
    if growth.memory_mib <= before.memory_mib {
        return Ok(());
    }
    let mib = growth.memory_mib.next_multiple_of(STEP_MIB);
    request(control, Request::ResizeMemory { mib }).await?;
    let deadline = Instant::now() + growth.deadline;
    let mut pause = PAUSES.0;
    loop {
        let memory_mib = status(control).await?.memory_mib;
        if memory_mib >= growth.memory_mib {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(HypervisorError::Deadline {
                what: format!("the guest's way to {mib} MiB of memory, of which it has {memory_mib},"),
                limit: growth.deadline,
            });
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn request(control: &Path, request: Request) -> Result<(), HypervisorError> {
    let verb = request.verb();
    match ask(control, request, Vec::new()).await {
        Ok(Reply::Done) => Ok(()),
        Ok(other) => Err(unexpected(&other).of(verb)),
        Err(failure) => Err(failure.of(verb)),
    }
}

async fn status(control: &Path) -> Result<Status, HypervisorError> {
    match ask(control, Request::Status, Vec::new()).await {
        Ok(Reply::Status(status)) => Ok(status),
        Ok(other) => Err(unexpected(&other).of("status")),
        Err(failure) => Err(failure.of("status")),
    }
}
