//! A VM that becomes larger while it runs: the hypervisor makes memory and CPUs available, the guest takes them.
//!
//! Never smaller: memory that the guest does not need goes back to the host by itself, and a CPU that is idle costs nothing. Must not
//! decide how large (`limits` does).

use caisson_hypervisor::VmGrowth;
use caisson_lifecycle::sizing::VmSize;

use crate::{SandboxError, container::Live};

/// How large a VM is, and how large it can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) size: VmSize,
    /// `None`: it cannot grow.
    pub(crate) ceiling: Option<VmSize>,
}

/// Brings the VM to `wanted` at least, and answers its size. Repeating it is harmless.
pub(crate) async fn grow(live: &Live, pod: &str, wanted: VmSize) -> Result<VmSize, SandboxError> {
    // One at a time; whoever waits finds what the one before has reached.
    let mut size = live.size.lock().await;
    let next = VmSize {
        memory_mib: wanted.memory_mib.max(size.memory_mib),
        vcpus: wanted.vcpus.max(size.vcpus),
    };
    if next == *size {
        return Ok(next);
    }
    let what = || {
        format!(
            "grow the VM of pod sandbox {pod} to {} MiB and {} CPUs",
            next.memory_mib, next.vcpus
        )
    };
    let growth = VmGrowth {
        memory_mib: next.memory_mib,
        vcpus: next.vcpus,
        deadline: live.deadline,
    };
    live.vm
        .grow(growth)
        .await
        .map_err(SandboxError::hypervisor(what()))?;
    if next.vcpus > size.vcpus {
        let online = live.guest.online_cpus(next.vcpus, live.deadline).await;
        let online = online.map_err(SandboxError::guest(what()))?;
        if online < next.vcpus {
            return Err(SandboxError::Unmet {
                what: what(),
                reason: format!("only {online} CPUs are online in the guest"),
            });
        }
    }
    tracing::info!(
        sandbox.id = pod,
        memory_mib = next.memory_mib,
        vcpus = next.vcpus,
        "VM has grown"
    );
    *size = next;
    Ok(next)
}
