//! The Unix sockets on which somebody on this host listens, in whatever network namespace: by the files that they are bound to.
//!
//! A socket in a directory says nothing of who made it. That of a container in a VM, and that of a server that is gone, look the same, and
//! are nobody's here: only the kernel's own list (sock_diag(7), `unix_diag`) tells them from those of the host. Asking changes nothing, and
//! no server notices.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
};

use rustix::{
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// Bytes of one part of the kernel's answer; it never makes larger ones.
const MAX_PART: usize = 32 << 10;

/// linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const UDIAG_SHOW_VFS: u32 = 2;
const UNIX_DIAG_VFS: u16 = 1;
/// TCP_LISTEN, which is the state of listeners of every family.
const LISTEN: u32 = 10;

/// struct nlmsghdr, struct unix_diag_msg and struct nlattr: bytes.
const HEADER: usize = 16;
const SOCKET: usize = 16;
const ATTRIBUTE: usize = 4;

/// Files that stream sockets listen on, by the device of their file system and the lower half of their number: the kernel says no more.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Listeners(HashSet<(u32, u32)>);

impl Listeners {
    /// Asks in the namespaces of all processes that there are. Blocking.
    pub(crate) fn read() -> io::Result<Self> {
        let thread = std::thread::Builder::new()
            .name("unix-listeners".to_owned())
            // It does not come back from where it goes.
            .spawn(|| {
                let mut all = Self::default();
                ask(&mut all)?;
                for namespace in others()? {
                    // One that has ended meanwhile has no sockets.
                    if move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).is_ok()
                    {
                        ask(&mut all)?;
                    }
                }
                Ok(all)
            })?;
        thread
            .join()
            .map_err(|_| io::Error::other("the thread that asks for sockets has panicked"))?
    }

    /// Whether somebody listens on this file of the file system with this device.
    pub(crate) fn have(&self, device: (u32, u32), inode: u64) -> bool {
        self.0.contains(&key(device, inode))
    }
}

fn key((major, minor): (u32, u32), inode: u64) -> (u32, u32) {
    let lower = inode & u64::from(u32::MAX);
    // The kernel's own form of a device's number.
    (major << 20 | minor, u32::try_from(lower).unwrap_or_default())
}

/// Network namespaces of processes, each once, without this thread's own; opened one at a time.
fn others() -> io::Result<impl Iterator<Item = File>> {
    let own = fs::metadata("/proc/thread-self/ns/net")?;
    let mut seen = HashSet::from([(own.dev(), own.ino())]);
    let processes = fs::read_dir("/proc")?.filter_map(Result::ok).filter(|entry| {
        entry
            .file_name()
            .as_encoded_bytes()
            .iter()
            .all(u8::is_ascii_digit)
    });
    Ok(processes.filter_map(move |process| {
        let path = process.path().join("ns/net");
        // Whoever has ended meanwhile has none.
        let found = fs::metadata(&path).ok()?;
        let new = seen.insert((found.dev(), found.ino()));
        new.then(|| File::open(&path).ok()).flatten()
    }))
}

/// Adds what is listened on in the network namespace of this thread.
fn ask(all: &mut Listeners) -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(netlink::SOCK_DIAG),
    )?;
    send(&socket, &request(), SendFlags::empty())?;
    let mut part = vec![0; MAX_PART];
    loop {
        let (length, _) = recv(&socket, &mut *part, RecvFlags::empty())?;
        if all.take(part.get(..length).unwrap_or_default())? {
            return Ok(());
        }
    }
}

/// struct nlmsghdr and struct unix_diag_req: all that listen, with the files that they are bound to.
fn request() -> Vec<u8> {
    const LENGTH: u32 = 40;
    let mut bytes = Vec::new();
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([
        libc::AF_UNIX.to_ne_bytes().first().copied().unwrap_or_default(),
        0,
        0,
        0,
    ]);
    for word in [1 << LISTEN, 0, UDIAG_SHOW_VFS, u32::MAX, u32::MAX] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

impl Listeners {
    /// Adds what a part of the answer has; true when it was the last one. Pure.
    fn take(&mut self, part: &[u8]) -> io::Result<bool> {
        let mut rest = part;
        while !rest.is_empty() {
            let length = u32_at(rest, 0)? as usize;
            let message = rest.get(HEADER..length).ok_or_else(torn)?;
            match u16_at(rest, 4)? {
                NLMSG_DONE => return Ok(true),
                NLMSG_ERROR => {
                    let errno = u32_at(message, 0)?.cast_signed();
                    return Err(io::Error::from_raw_os_error(-errno));
                }
                SOCK_DIAG_BY_FAMILY => self.take_one(message)?,
                _ => {}
            }
            rest = rest.get(aligned(length)..).unwrap_or_default();
        }
        // An empty part would be followed by no other.
        Ok(part.is_empty())
    }

    fn take_one(&mut self, socket: &[u8]) -> io::Result<()> {
        let is_stream = socket
            .get(1)
            .is_some_and(|kind| i32::from(*kind) == libc::SOCK_STREAM);
        let mut rest = socket.get(SOCKET..).ok_or_else(torn)?;
        while is_stream && !rest.is_empty() {
            let length = usize::from(u16_at(rest, 0)?);
            let content = rest.get(ATTRIBUTE..length).ok_or_else(torn)?;
            if u16_at(rest, 2)? == UNIX_DIAG_VFS {
                // struct unix_diag_vfs
                self.0.insert((u32_at(content, 4)?, u32_at(content, 0)?));
            }
            rest = rest.get(aligned(length)..).unwrap_or_default();
        }
        Ok(())
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn torn() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's list of sockets is torn")
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map(u32::from_ne_bytes).ok_or_else(torn)
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    let word = bytes.get(at..at + 2).and_then(|word| word.try_into().ok());
    word.map(u16::from_ne_bytes).ok_or_else(torn)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    /// One message of a type, with its content.
    fn message(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(HEADER + content.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(content);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn socket(kind: u8, inode: u32, device: u32) -> Vec<u8> {
        let mut bytes = vec![1, kind, 10, 0];
        bytes.extend([0; 12]);
        // A name first, of a length that is not aligned.
        bytes.extend([5, 0, 0, 0, b'x', 0, 0, 0]);
        bytes.extend([12, 0, 1, 0]);
        bytes.extend(inode.to_ne_bytes());
        bytes.extend(device.to_ne_bytes());
        message(SOCK_DIAG_BY_FAMILY, &bytes)
    }

    #[test]
    fn streams_are_taken_and_other_kinds_are_not() {
        let mut listeners = Listeners::default();
        let part = [socket(1, 7, 8 << 20 | 1), socket(5, 9, 8 << 20 | 1)].concat();
        assert!(!listeners.take(&part).unwrap());
        assert!(listeners.take(&message(NLMSG_DONE, &[0; 4])).unwrap());
        assert!(listeners.have((8, 1), 7) && listeners.have((8, 1), 7 | 1 << 32));
        assert!(!listeners.have((8, 1), 9) && !listeners.have((8, 2), 7));
    }

    #[test]
    fn what_the_kernel_refuses_or_tears_is_an_error() {
        let mut listeners = Listeners::default();
        let refused = message(NLMSG_ERROR, &(-libc::ENOENT).to_ne_bytes());
        let error = listeners.take(&refused).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        let whole = socket(1, 7, 1);
        for length in 1..whole.len() {
            listeners.take(&whole[..length]).unwrap_err();
        }
        for length in [0u32, 15, 1000] {
            let mut lying = whole.clone();
            lying[..4].copy_from_slice(&length.to_ne_bytes());
            listeners.take(&lying).unwrap_err();
        }
    }

    #[test]
    fn a_socket_on_which_nobody_listens_is_not_among_them() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let server = UnixListener::bind(at("server")).unwrap();
        let _datagrams = UnixDatagram::bind(at("datagrams")).unwrap();
        drop(UnixListener::bind(at("gone")).unwrap());
        // As a container of a VM binds: a node of the file server's.
        mknodat(CWD, at("guest's"), FileType::Socket, Mode::RWXU, 0).unwrap();
        let have = |name: &str| {
            let found = fs::metadata(at(name)).unwrap();
            let device = (libc::major(found.dev()), libc::minor(found.dev()));
            Listeners::read().unwrap().have(device, found.ino())
        };
        assert!(have("server"));
        for name in ["datagrams", "gone", "guest's"] {
            assert!(!have(name), "{name}");
        }
        drop(server);
        assert!(!have("server"));
    }
}
