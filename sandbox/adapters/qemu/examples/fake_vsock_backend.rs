//! Stands in for the vsock backend in this room's tests: speaks as much vhost-user as QEMU needs to start, and carries nothing.
//!
//! `fake_vsock_backend --socket-fd N --uds-fd N --cid N`. Ends when QEMU closes the connection; under the name `failing`, at once.

#![expect(unsafe_code, reason = "the listening socket arrives as a descriptor number")]

use std::{
    io::{Read, Write},
    os::{fd::FromRawFd, unix::net::UnixListener},
};

const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_CONFIG: u32 = 24;

/// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// VHOST_USER_PROTOCOL_F_CONFIG, without which QEMU refuses a vsock device.
const PROTOCOL_FEATURES: u64 = 1 << 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    if args.first().is_some_and(|name| name.ends_with("/failing")) {
        eprintln!("no vsock today");
        std::process::exit(7);
    }
    let value = |name: &str| {
        args.windows(2)
            .find(|pair| pair[0] == name)
            .map(|pair| pair[1].clone())
    };
    let fd = value("--socket-fd").ok_or("--socket-fd is missing")?.parse()?;
    let cid: u64 = value("--cid").ok_or("--cid is missing")?.parse()?;
    // SAFETY: whoever started this program passed a listening socket under this number, and nothing else here uses it.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    let (mut stream, _) = listener.accept()?;
    let mut header = [0_u8; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word = |at: usize| {
            header
                .get(at..at + 4)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u32::from_le_bytes)
        };
        let (request, size) = (word(0), word(8) as usize);
        let mut payload = vec![0; size];
        stream.read_exact(&mut payload)?;
        let reply = match request {
            GET_FEATURES => FEATURES.to_le_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => PROTOCOL_FEATURES.to_le_bytes().to_vec(),
            GET_VRING_BASE => [payload.get(..4).unwrap_or_default(), &[0; 4]].concat(),
            GET_CONFIG => [payload.get(..12).unwrap_or_default(), &cid.to_le_bytes()].concat(),
            _ => continue,
        };
        let mut message = Vec::new();
        message.extend(request.to_le_bytes());
        // Version 1, reply.
        message.extend(5_u32.to_le_bytes());
        message.extend(u32::try_from(reply.len())?.to_le_bytes());
        message.extend(reply);
        stream.write_all(&message)?;
    }
    Ok(())
}
