//! Each device behind its transport, with its thread, and a driver that does as it likes with rings, buffers and registers.
#![no_main]

#[path = "../../vmm/devices/tests/machine/mod.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod machine;
#[path = "../../vmm/devices/tests/virtio/wire.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod wire;

use std::{fs::File, os::unix::net::UnixListener, sync::OnceLock};

use caisson_devices::virtio::{
    VirtioDevice,
    balloon::Balloon,
    block::{Block, BlockConfig},
    mem::{Layout, Mem},
    net::{Net, NetConfig},
    pmem::{ALIGNMENT, Pmem, PmemConfig},
    rng::Rng,
    vsock::VsockDevice,
};
use libfuzzer_sys::fuzz_target;
use machine::{DATA, Machine, NOTIFY};
use rustix::fs::{MemfdFlags, memfd_create};

/// Bytes of the disk.
const DISK: u64 = 1 << 20;
/// Rings begin here in the driver's memory, this far from each other.
const RINGS: u64 = 0x10_0000;
const RING_BYTES: u64 = 0x2_0000;
/// Bytes of one step.
const STEP: usize = 16;

fn file(bytes: u64) -> File {
    let file = File::from(memfd_create("file", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

/// A tap in a network of its own, made once: taps take long to go. None where that is not allowed.
fn tap() -> Option<File> {
    static TAP: OnceLock<Option<File>> = OnceLock::new();
    let make = || {
        let queues = wire::enter_namespace().then(|| wire::queues(1, libc::IFF_VNET_HDR));
        queues?.ok()?.pop()
    };
    TAP.get_or_init(make).as_ref()?.try_clone().ok()
}

fn device(kind: u8, machine: &Machine, dir: &tempfile::TempDir) -> Box<dyn VirtioDevice> {
    match kind % 7 {
        0 => Box::new(Rng::new(machine.host())),
        1 => Box::new(Balloon::new(machine.host()).0),
        2 => {
            let config = BlockConfig {
                files: vec![file(DISK)],
                read_only: kind & 0x80 != 0,
                serial: "fuzz".into(),
                block_bytes: 512,
            };
            Box::new(Block::new(config, machine.host()).unwrap().0)
        }
        3 => {
            let layout = Layout {
                address: 1 << 32,
                region: 64 << 20,
                block: 2 << 20,
                chunk: 16 << 20,
            };
            let (device, handle) = Mem::new(layout, machine.slots(), machine.host()).unwrap();
            handle.request(32 << 20).unwrap();
            Box::new(device)
        }
        4 => {
            let config = PmemConfig {
                file: file(ALIGNMENT),
                address: 1 << 32,
                read_only: kind & 0x80 != 0,
            };
            Box::new(Pmem::new(config, machine.slots(), machine.host()).unwrap())
        }
        5 if tap().is_some() => {
            let Some(tap) = tap() else { unreachable!("it is there") };
            let config = NetConfig {
                taps: vec![tap],
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                offloads: true,
            };
            Box::new(Net::new(config, machine.host()).unwrap())
        }
        _ => {
            let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
            Box::new(VsockDevice::new(3, listener, machine.host()).unwrap())
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let [kind, size, data @ ..] = data else { return };
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::new();
    let device = device(*kind, &machine, &dir);
    let queues = u64::try_from(device.queue_sizes().len()).unwrap();
    let mut driver = machine.plug(device);
    driver.start(0, 1 << (size % 9));
    for step in data.chunks_exact(STEP) {
        let number = u64::from_le_bytes(step[8..16].try_into().unwrap());
        let offset = u64::from(u16::from_le_bytes([step[2], step[3]]));
        let queue = u64::from(step[1]) % queues;
        match step[0] % 9 {
            // Descriptors, rings and indices, and what they point to.
            0 | 1 => driver.fill(RINGS + RING_BYTES * queue + offset, &step[8..16]),
            2 => {
                let at = RINGS + RING_BYTES * queue + 16 * (offset % 256);
                driver.fill(at, &(DATA + number % 0x10_0000).to_le_bytes());
                driver.fill(at + 8, &step[4..8]);
            }
            3 => driver.fill(DATA + offset, &step[4..16]),
            4 | 5 => driver.kick(u16::try_from(queue).unwrap_or_default()),
            6 => {
                machine.mmio.write(driver.bar + offset % 0x3000, &step[8..8 + 1 + usize::from(step[4] & 7)]);
            }
            // The machine is paused, looked at, and goes on.
            7 => {
                driver.function.suspend();
                assert!(driver.function.state().is_ok());
                driver.function.resume();
            }
            _ => {
                let mut bytes = [0; 8];
                machine.mmio.read(driver.bar + offset % (NOTIFY + 0x1000), &mut bytes);
            }
        }
    }
    // Its thread ends with it.
    machine.root.shut_down();
    // Failures are the host's, and there were none.
    let failed = machine.board.events.lock().unwrap();
    assert!(
        failed.iter().all(|event| !matches!(event, caisson_devices::ports::DeviceEvent::Failed { .. })),
        "{failed:?}"
    );
});
