//! Finding devices that the VM was given, by what they say of themselves: a disk by its virtio serial, an interface by its MAC.
//!
//! Waits for the kernel's own announcement (uevent). Names such as vdb or eth1 depend on the order of discovery and mean nothing.
//! Blocking.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
        recv, socket_with,
    },
};

use crate::error::{AgentError, At};

/// How long a disk that has been attached may take to appear.
const DISK_BOUND: Duration = Duration::from_secs(10);

/// How long an interface may take; it was there at boot.
const INTERFACE_BOUND: Duration = Duration::from_secs(5);

/// After this long without the disk, the PCI bus is asked to look again, once: not every hypervisor can announce.
const RESCAN_AFTER: Duration = Duration::from_millis(500);

/// This word on the kernel's command line says that the hypervisor never announces, so that there is nothing to wait for.
const RESCAN_WORD: &str = "caisson.rescan";

/// Longest sleep between two looks: an announcement can be lost when the socket's buffer overflows.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The device node of the disk with this virtio serial.
pub(crate) fn disk(serial: &str) -> Result<PathBuf, AgentError> {
    wait("disk with serial", serial, DISK_BOUND, true, || {
        find_disk(Path::new("/sys/block"), serial)
    })
}

/// The same, if it is there now.
pub(crate) fn present_disk(serial: &str) -> Option<PathBuf> {
    find_disk(Path::new("/sys/block"), serial)
}

/// Kernel's name and index of the interface with this MAC.
pub(crate) fn interface(mac: &[u8]) -> Result<(String, u32), AgentError> {
    let text: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = text.join(":");
    wait("interface with MAC", &text, INTERFACE_BOUND, false, || {
        find_interface(Path::new("/sys/class/net"), &text)
    })
}

fn wait<T>(
    what: &'static str,
    id: &str,
    bound: Duration,
    rescan: bool,
    look: impl Fn() -> Option<T>,
) -> Result<T, AgentError> {
    if let Some(found) = look() {
        return Ok(found);
    }
    let announcements = announcements()?;
    let begin = Instant::now();
    let mut rescan_due = rescan;
    let rescan_after = if rescan && hypervisor_never_announces() {
        Duration::ZERO
    } else {
        RESCAN_AFTER
    };
    loop {
        // After the socket exists, so that nothing falls between.
        if let Some(found) = look() {
            return Ok(found);
        }
        let waited = begin.elapsed();
        if waited >= bound {
            return Err(AgentError::Missing {
                what,
                id: id.to_owned(),
                seconds: bound.as_secs(),
            });
        }
        if rescan_due && waited >= rescan_after {
            rescan_due = false;
            if fs::write("/sys/bus/pci/rescan", "1").is_err() {
                // No PCI: then the device has to announce itself.
            }
            continue;
        }
        drain(&announcements, LOOK_AGAIN)?;
    }
}

fn hypervisor_never_announces() -> bool {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_ascii_whitespace().any(|word| word == RESCAN_WORD)
}

fn announcements() -> Result<OwnedFd, AgentError> {
    let step = || "listening for device announcements";
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(KOBJECT_UEVENT),
    )
    .at(step)?;
    bind(&socket, &SocketAddrNetlink::new(0, 1)).at(step)?;
    Ok(socket)
}

/// Waits for an announcement and takes all that are there. What they say is not looked at: sysfs is.
fn drain(socket: &OwnedFd, limit: Duration) -> Result<(), AgentError> {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    let mut polled = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).at(|| "waiting for device announcements"),
    }
    let mut buffer = [0; 4096];
    while recv(socket, &mut buffer, RecvFlags::empty()).is_ok() {}
    Ok(())
}

fn find_disk(directory: &Path, serial: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(directory).ok()?.flatten() {
        let own = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if own.trim_end_matches(['\n', '\0', ' ']) == serial {
            let node = Path::new("/dev").join(entry.file_name());
            return node.exists().then_some(node);
        }
    }
    None
}

fn find_interface(directory: &Path, mac: &str) -> Option<(String, u32)> {
    for entry in fs::read_dir(directory).ok()?.flatten() {
        let own = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if own.trim() == mac {
            let name = entry.file_name().into_string().ok()?;
            return Some((name, index(directory, &entry.file_name().into_string().ok()?)?));
        }
    }
    None
}

fn index(directory: &Path, name: &str) -> Option<u32> {
    fs::read_to_string(directory.join(name).join("ifindex"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Index of the interface that has this name now.
pub(crate) fn interface_index(name: &str) -> Option<u32> {
    index(Path::new("/sys/class/net"), name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_its_mac_only() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mac, index) in [("ens3", "02:00:00:00:00:01", 2), ("ens4", "02:00:00:00:00:02", 3)] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("address"), format!("{mac}\n")).unwrap();
            fs::write(dir.path().join(name).join("ifindex"), format!("{index}\n")).unwrap();
        }
        assert_eq!(
            find_interface(dir.path(), "02:00:00:00:00:02"),
            Some(("ens4".to_owned(), 3))
        );
        assert_eq!(find_interface(dir.path(), "02:00:00:00:00:03"), None);
    }

    #[test]
    fn a_disk_without_a_node_is_not_there_yet() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("caisson-no-such-disk")).unwrap();
        fs::write(dir.path().join("caisson-no-such-disk/serial"), "abc\n").unwrap();
        assert_eq!(find_disk(dir.path(), "abc"), None);
    }
}
