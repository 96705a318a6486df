//! Opening a tap in the calling thread's network namespace.
#![expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// The clone device of taps.
pub(crate) const TUN_DEVICE: &str = "/dev/net/tun";

/// Makes the tap `name`; it lives as long as the descriptor, so that a VMM that dies leaks none. Non-blocking, close-on-exec, each
/// frame with a virtio-net header (10 bytes until the VMM asks for another size).
pub(crate) fn open(name: &str) -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN_DEVICE)?;
    let flags =
        i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).map_err(io::Error::other)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {name:?} is too long"),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the descriptor is open for the whole call, and TUNSETIFF reads and writes one ifreq, which `request` is.
    let answer = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::TUNSETIFF as libc::Ioctl,
            &raw mut request,
        )
    };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(device.into())
    }
}
