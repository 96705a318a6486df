//! A tap in a network namespace of the calling thread, and the host's end of its wire.
#![expect(
    unsafe_code,
    reason = "taps and packet sockets are set up by ioctls and raw addresses"
)]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, RawFd},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sched::{CloneFlags, unshare};

const NAME: &[u8] = b"tap0";

fn request(flags: i32) -> libc::ifreq {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = *from as libc::c_char;
    }
    request
}

fn ioctl(fd: RawFd, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all codes used here read and write one ifreq.
    match unsafe { libc::ioctl(fd, code, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Leaves the host's network; nothing, said aloud, where that is not allowed.
pub(crate) fn enter_namespace() -> bool {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => true,
        Err(e) => {
            eprintln!("SKIPPED: no network namespace of one's own: {e}");
            false
        }
    }
}

/// Queues of a tap that is up, and a socket that hears and sends everything on its wire.
pub(crate) struct Wire {
    pub(crate) queues: Vec<File>,
    pub(crate) host: File,
}

/// Makes a tap of so many queues, with flags beside the usual ones. There is one for each namespace.
pub(crate) fn queues(count: usize, flags: i32) -> io::Result<Vec<File>> {
    let several = if count > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    (0..count)
        .map(|_| {
            let file = File::options().read(true).write(true).open("/dev/net/tun")?;
            let mut request = request(libc::IFF_TAP | libc::IFF_NO_PI | flags | several);
            ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request)?;
            Ok(file)
        })
        .collect()
}

impl Wire {
    pub(crate) fn new(count: usize) -> Self {
        let queues = queues(count, libc::IFF_VNET_HDR).unwrap();
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a plain system call; the descriptor belongs to the file from here on.
        let host = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        let mut up = request(libc::IFF_UP);
        ioctl(host.as_raw_fd(), libc::SIOCSIFFLAGS, &mut up).unwrap();
        let mut index = request(0);
        ioctl(host.as_raw_fd(), libc::SIOCGIFINDEX, &mut index).unwrap();
        // SAFETY: SIOCGIFINDEX has written the index; an address of zeros is one, and its length is given.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = all;
            address.sll_ifindex = index.ifr_ifru.ifru_ifindex;
            let length = size_of_val(&address) as u32;
            let bound = libc::bind(host.as_raw_fd(), (&raw const address).cast(), length);
            assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        }
        Self { queues, host }
    }

    /// Sends a frame to the guest.
    pub(crate) fn send(&self, frame: &[u8]) {
        (&self.host).write_all(frame).unwrap();
    }

    /// The next frame of the kind that [`frame`] makes; what the host's own stack says is passed over.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        while let Ok(count) = (&self.host).read(&mut bytes) {
            if bytes.get(12..14) == Some(&KIND) {
                bytes.truncate(count);
                return Some(bytes);
            }
        }
        None
    }
}

/// An EtherType that nobody uses.
pub(crate) const KIND: [u8; 2] = [0x88, 0xb5];

/// A frame of so many bytes, unlike any other.
pub(crate) fn frame(bytes: usize) -> Vec<u8> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, KIND[0], KIND[1]];
    frame.extend(
        (0..)
            .map(|at: u32| (at.wrapping_mul(31) ^ number.rotate_left(at % 32)) as u8)
            .take(bytes - 14),
    );
    frame
}
