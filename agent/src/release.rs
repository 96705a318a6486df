//! `ReleaseDisk`: the guest lets go of a disk, before the hypervisor takes it away.
//!
//! The kernel's driver is unbound and the function removed here (`remove` in sysfs), so that the hypervisor need not ask the guest: one that
//! announces nothing has no way to. Blocking.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use caisson_agent_api::v1;
use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
};

use crate::{
    devices,
    error::{AgentError, At},
    guest::{Container, Guest},
    names,
};

/// How long a file system that was unmounted may take to let go of its disk.
const IDLE_BOUND: Duration = Duration::from_secs(2);

/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Lets go of a disk.
pub(crate) fn release(
    guest: &Guest,
    request: &v1::ReleaseDiskRequest,
) -> Result<v1::ReleaseDiskReply, AgentError> {
    let serial = &request.serial;
    names::serial("serial", serial)?;
    let in_use = || AgentError::State {
        what: "disk",
        id: serial.clone(),
        reason: "is in use",
    };
    let held = |container: &Arc<Container>| {
        let disks = &container.spec.block_devices;
        disks.iter().any(|disk| disk.serial == *serial)
    };
    if guest.images.has_users(serial) || guest.containers().iter().any(held) {
        return Err(in_use());
    }
    let Some(node) = devices::present_disk(serial) else {
        return Ok(v1::ReleaseDiskReply {});
    };
    if !is_idle(&node).at(|| format!("opening {}", node.display()))? {
        return Err(in_use());
    }
    let function = function_of(&node).at(|| format!("finding the function of {}", node.display()))?;
    fs::write(function.join("remove"), "1").at(|| format!("removing {}", function.display()))?;
    Ok(v1::ReleaseDiskReply {})
}

/// Whether nothing has it mounted. The kernel takes file systems apart behind our back, so it gets a moment.
fn is_idle(node: &Path) -> rustix::io::Result<bool> {
    let deadline = Instant::now() + IDLE_BOUND;
    loop {
        // Without O_CREAT, this asks to be the only holder.
        match open(
            node,
            OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Ok(_) => return Ok(true),
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
            Err(Errno::BUSY) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// The PCI function that a virtio disk is: the parent of its device.
fn function_of(node: &Path) -> std::io::Result<PathBuf> {
    let name = node.file_name().unwrap_or_default();
    let device = fs::canonicalize(Path::new("/sys/block").join(name).join("device"))?;
    let parent = device.parent().unwrap_or(&device);
    Ok(parent.to_owned())
}
