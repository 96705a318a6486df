//! Tap devices in a network namespace of the test's own.

#![expect(unsafe_code, reason = "taps are made by ioctl")]

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsRawFd, OwnedFd},
};

/// One tap with one queue, and one with two; `None` (said aloud) where that is not allowed.
pub(crate) fn in_own_namespace() -> Option<(OwnedFd, Vec<OwnedFd>)> {
    let making = std::thread::spawn(|| {
        // SAFETY: takes flags by value, and concerns this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let single = tap("single0", 0)?;
        let several = vec![
            tap("several0", libc::IFF_MULTI_QUEUE)?,
            tap("several0", libc::IFF_MULTI_QUEUE)?,
        ];
        Ok((single, several))
    });
    match making.join().unwrap() {
        Ok(taps) => Some(taps),
        Err(error) => {
            eprintln!("skipped: cannot make taps in a new network namespace: {error}");
            None
        }
    }
}

fn tap(name: &str, flags: libc::c_int) -> std::io::Result<OwnedFd> {
    let file: File = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives across the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(file.into())
}
