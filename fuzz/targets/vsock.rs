//! Packets and descriptors of the socket device, beside a host that reads, writes and hangs up.
#![no_main]

#[path = "../../vmm/devices/tests/driver/mod.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod driver;

use std::io::Write;

use caisson_devices::virtio::vsock::{HEADER_BYTES, Header};
use driver::{Driver, read_now};
use libfuzzer_sys::fuzz_target;

/// What precedes the bytes of a packet: what to do, and how much payload.
const PREFIX: usize = 2;

fuzz_target!(|data: &[u8]| {
    let mut guest = Driver::new(512);
    let mut host = Some(guest.dial(7));
    guest.run();
    guest.received();
    for step in data.chunks(PREFIX + HEADER_BYTES) {
        let [kind, payload, header @ ..] = step else { break };
        match kind % 8 {
            0 => {
                if let Some(mut host) = host.as_ref() {
                    // The connection may be gone by now.
                    drop(host.write(header));
                }
            }
            1 => host = None,
            2 => {
                let chain: Vec<_> = header.chunks_exact(20).map(raw).collect();
                guest.send_raw(&chain);
                guest.give_raw(&chain);
            }
            _ => {
                let mut bytes = [0; HEADER_BYTES];
                for (slot, byte) in bytes.iter_mut().zip(header) {
                    *slot = *byte;
                }
                if guest.can_send() {
                    guest.send(&Header::decode(&bytes), &vec![0; usize::from(*payload)]);
                }
            }
        }
        guest.run();
        guest.received();
        drop(host.as_ref().map(read_now));
    }
});

/// A descriptor: address, length, flags, next.
fn raw(bytes: &[u8]) -> (u64, u32, u16, u16) {
    let number = |range: std::ops::Range<usize>| {
        let mut eight = [0; 8];
        eight[..range.len()].copy_from_slice(&bytes[range]);
        u64::from_le_bytes(eight)
    };
    (
        number(0..8),
        number(8..12) as u32,
        number(12..14) as u16,
        number(14..16) as u16,
    )
}
