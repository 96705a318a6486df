//! One queue of a tap: frames behind a virtio-net header, in both directions.
#![expect(
    unsafe_code,
    reason = "taps are set up by ioctls, and frames lie in the guest's memory"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use crate::virtio::chain::IoVecs;

/// Bytes of the header in front of each frame, as virtio 1.x has it.
pub const HEADER_BYTES: usize = 12;

/// A descriptor of `/dev/net/tun` that has been attached to a tap, or of a macvtap.
#[derive(Debug, Clone)]
pub(super) struct Tap(Arc<File>);

fn ioctl<T>(fd: RawFd, request: libc::Ioctl, argument: *mut T) -> io::Result<()> {
    // SAFETY: the callers below pass an argument of the type that their request reads or writes, which lives as long as the call.
    let answer = unsafe { libc::ioctl(fd, request, argument) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn flags_request(flags: libc::c_int) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            // The flags of taps fit: they are the low sixteen bits.
            ifru_flags: flags as libc::c_short,
        },
    }
}

impl Tap {
    /// Takes an attached descriptor, and makes it fit; an error says that it is no tap with virtio-net headers.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let tap = Self(Arc::new(file));
        let mut request = flags_request(0);
        ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request)?;
        // SAFETY: TUNGETIFF has written the flags, which are plain numbers in any case.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if libc::c_int::from(flags) & libc::IFF_VNET_HDR == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the tap has no virtio-net headers",
            ));
        }
        let mut bytes = HEADER_BYTES as libc::c_int;
        ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut bytes)?;
        rustix::io::ioctl_fionbio(&*tap.0, true)?;
        Ok(tap)
    }

    /// Which frames the guest can take without the host having finished them: `TUN_F_` bits.
    pub(super) fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        let argument = std::ptr::without_provenance_mut::<libc::c_void>(offloads as usize);
        ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, argument)
    }

    /// A queue that is not in use is detached, so that no frame is steered to it. Doing so twice is no error.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request = flags_request(if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        });
        match ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    /// The next frame with its header; `None` if there is none. What does not fit is lost.
    pub(super) fn receive(&self, buffers: &[libc::iovec]) -> io::Result<Option<usize>> {
        let most = buffers.get(..buffers.len().min(MAX_VECTORS)).unwrap_or_default();
        // SAFETY: the elements come from `IoVecs`, which borrow the guest's memory; `Rx` keeps it borrowed for the call.
        let count = unsafe { libc::readv(self.as_raw_fd(), most.as_ptr(), most.len() as libc::c_int) };
        match outcome(count) {
            // Nothing comes from a queue that is detached.
            Err(e) if e.raw_os_error() == Some(libc::EBADFD) => Ok(None),
            other => other,
        }
    }

    /// Sends a frame with its header; `None` if there is no room for it now.
    pub(super) fn send(&self, frame: &IoVecs<'_>) -> io::Result<Option<usize>> {
        let most = frame.get(..frame.len().min(MAX_VECTORS)).unwrap_or_default();
        // SAFETY: the elements borrow the guest's memory, which therefore stays mapped during the call.
        let count = unsafe { libc::writev(self.as_raw_fd(), most.as_ptr(), most.len() as libc::c_int) };
        outcome(count)
    }
}

/// What one system call takes.
const MAX_VECTORS: usize = crate::virtio::chain::MAX_PIECES;

fn outcome(count: isize) -> io::Result<Option<usize>> {
    match usize::try_from(count) {
        Ok(count) => Ok(Some(count)),
        Err(_) => {
            let e = io::Error::last_os_error();
            match e.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                _ => Err(e),
            }
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
