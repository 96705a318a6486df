//! The memory device (virtio 1.2, section 5.15): memory that the guest plugs and unplugs block by block, up to what it is asked for.
//!
//! - `blocks`: which are plugged, pure;
//! - this module: the device, its requests, and the machine's memory behind it.
//!
//! The memory stays as it is when the driver is reset: a driver that starts anew unplugs everything by itself.

mod blocks;

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

pub use blocks::{Blocks, Layout, Plugged};

use super::{
    chain::Buffers,
    device::{ActivateError, Activation, ActiveQueue, DeviceType, Outcome, VirtioDevice, read_space},
    discard::discard_in,
    interrupt::Interrupt,
    state::{DeviceState, RestoreError, SaveError},
    worker::{Host, Serve, Source, Worker},
};
use crate::{
    complaints::Complaints,
    ports::{GuestRam, MemoryControl, ThreadKind},
};

/// Feature bit (5.15.3): what is not plugged cannot be read either.
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// Requests (5.15.6).
const VIRTIO_MEM_REQ_PLUG: u16 = 0;
const VIRTIO_MEM_REQ_UNPLUG: u16 = 1;
const VIRTIO_MEM_REQ_UNPLUG_ALL: u16 = 2;
const VIRTIO_MEM_REQ_STATE: u16 = 3;
/// Responses: done; not now, as it is too much; not now, for other reasons; makes no sense.
const VIRTIO_MEM_RESP_ACK: u16 = 0;
const VIRTIO_MEM_RESP_NACK: u16 = 1;
const VIRTIO_MEM_RESP_BUSY: u16 = 2;
const VIRTIO_MEM_RESP_ERROR: u16 = 3;
const VIRTIO_MEM_STATE_PLUGGED: u16 = 0;
const VIRTIO_MEM_STATE_UNPLUGGED: u16 = 1;
const VIRTIO_MEM_STATE_MIXED: u16 = 2;

const QUEUE_SIZES: [u16; 1] = [64];
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: usize = 10;

/// Why there is no memory device.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Sizes that do not fit each other.
    #[error("a memory device cannot be laid out as {0:?}")]
    Layout(Layout),
    /// More than the region, or not whole blocks.
    #[error("{bytes:#x} bytes cannot be asked for: a multiple of {block:#x} up to {region:#x} can")]
    Size {
        /// What was wanted.
        bytes: u64,
        /// Size of a block.
        block: u64,
        /// Size of the region.
        region: u64,
    },
}

#[derive(Debug)]
struct State {
    blocks: Blocks,
    requested: u64,
}

struct Shared {
    layout: Layout,
    state: Mutex<State>,
    interrupt: Mutex<Option<Interrupt>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device.
pub struct Mem {
    host: Host,
    control: Arc<dyn MemoryControl>,
    shared: Arc<Shared>,
    worker: Option<Worker<Server>>,
}

impl fmt::Debug for Mem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mem")
            .field("layout", &self.shared.layout)
            .finish_non_exhaustive()
    }
}

/// Reaches a memory device that is in use.
#[derive(Clone)]
pub struct MemHandle(Arc<Shared>);

impl fmt::Debug for MemHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemHandle")
            .field("layout", &self.0.layout)
            .finish_non_exhaustive()
    }
}

impl MemHandle {
    /// Asks the guest to bring the plugged memory to so many bytes. It does so in its own time, and down only as far as it can.
    pub fn request(&self, bytes: u64) -> Result<(), MemError> {
        let Layout { block, region, .. } = self.0.layout;
        if bytes > region || !bytes.is_multiple_of(block) {
            return Err(MemError::Size { bytes, block, region });
        }
        self.0.state().requested = bytes;
        let interrupt = self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupt.as_ref() {
            interrupt.config_changed();
        }
        Ok(())
    }

    /// Bytes that are plugged now.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.0.state().blocks.bytes()
    }

    /// Bytes that the guest was asked for.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.0.state().requested
    }
}

impl Mem {
    /// Memory to be plugged, and what reaches it later.
    pub fn new(
        layout: Layout,
        control: Arc<dyn MemoryControl>,
        host: Host,
    ) -> Result<(Self, MemHandle), MemError> {
        if !layout.is_valid() {
            return Err(MemError::Layout(layout));
        }
        let shared = Arc::new(Shared {
            layout,
            state: Mutex::new(State {
                blocks: Blocks::new(layout),
                requested: 0,
            }),
            interrupt: Mutex::new(None),
        });
        let handle = MemHandle(Arc::clone(&shared));
        let device = Self {
            host,
            control,
            shared,
            worker: None,
        };
        Ok((device, handle))
    }
}

/// What a driver wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Plug so many blocks from an address on.
    Plug(u64, u16),
    /// Unplug so many blocks from an address on.
    Unplug(u64, u16),
    /// Unplug everything.
    UnplugAll,
    /// Say whether so many blocks from an address on are plugged.
    State(u64, u16),
}

impl Request {
    /// As it lies in memory; `None` if it is none.
    #[must_use]
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let [
            k0,
            k1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            n0,
            n1,
            ..,
        ] = *bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let blocks = u16::from_le_bytes([n0, n1]);
        match u16::from_le_bytes([k0, k1]) {
            VIRTIO_MEM_REQ_PLUG => Some(Self::Plug(address, blocks)),
            VIRTIO_MEM_REQ_UNPLUG => Some(Self::Unplug(address, blocks)),
            VIRTIO_MEM_REQ_UNPLUG_ALL => Some(Self::UnplugAll),
            VIRTIO_MEM_REQ_STATE => Some(Self::State(address, blocks)),
            _ => None,
        }
    }
}

/// The thread of a memory device.
struct Server {
    queue: ActiveQueue,
    shared: Arc<Shared>,
    control: Arc<dyn MemoryControl>,
    memory: GuestRam,
    interrupt: Interrupt,
    complaints: Complaints,
}

/// A response: its type, and the state if it has one.
type Response = (u16, u16);

fn do_request(
    request: Request,
    shared: &Shared,
    control: &dyn MemoryControl,
    memory: &GuestRam,
) -> io::Result<Response> {
    let mut state = shared.state();
    let State { blocks, requested } = &mut *state;
    match request {
        Request::Plug(address, count) => {
            let Some(range) = blocks.range(address, count) else {
                return Ok((VIRTIO_MEM_RESP_ERROR, 0));
            };
            if blocks.state(range.clone()) != Plugged::None {
                return Ok((VIRTIO_MEM_RESP_ERROR, 0));
            }
            let (_, bytes) = blocks.place(&range);
            if blocks.bytes() + bytes > *requested {
                return Ok((VIRTIO_MEM_RESP_NACK, 0));
            }
            let fresh = blocks.empty_chunks(range.clone());
            for (done, &chunk) in fresh.iter().enumerate() {
                if let Err(e) = control.add_ram(GuestAddress(chunk), shared.layout.chunk) {
                    // Neither all nor some of it.
                    for &chunk in fresh.iter().take(done) {
                        control.unmap(GuestAddress(chunk), shared.layout.chunk)?;
                    }
                    return Err(e);
                }
            }
            blocks.mark(range, true);
            Ok((VIRTIO_MEM_RESP_ACK, 0))
        }
        Request::Unplug(address, count) => {
            let Some(range) = blocks.range(address, count) else {
                return Ok((VIRTIO_MEM_RESP_ERROR, 0));
            };
            if blocks.state(range.clone()) != Plugged::All {
                return Ok((VIRTIO_MEM_RESP_ERROR, 0));
            }
            let (start, bytes) = blocks.place(&range);
            blocks.mark(range.clone(), false);
            for chunk in blocks.empty_chunks(range) {
                control.unmap(GuestAddress(chunk), shared.layout.chunk)?;
            }
            forget(&memory.memory(), &shared.layout, start, bytes)?;
            Ok((VIRTIO_MEM_RESP_ACK, 0))
        }
        Request::UnplugAll => {
            let used = blocks.used_chunks();
            let all = blocks.all();
            blocks.mark(all, false);
            for chunk in used {
                control.unmap(GuestAddress(chunk), shared.layout.chunk)?;
            }
            Ok((VIRTIO_MEM_RESP_ACK, 0))
        }
        Request::State(address, count) => Ok(match blocks.range(address, count) {
            None => (VIRTIO_MEM_RESP_ERROR, 0),
            Some(range) => {
                let answer = match blocks.state(range) {
                    Plugged::All => VIRTIO_MEM_STATE_PLUGGED,
                    Plugged::None => VIRTIO_MEM_STATE_UNPLUGGED,
                    Plugged::Some => VIRTIO_MEM_STATE_MIXED,
                };
                (VIRTIO_MEM_RESP_ACK, answer)
            }
        }),
    }
}

/// Gives back what is still mapped of a range; chunks that are gone are gone as a whole.
fn forget(memory: &GuestMemoryMmap, layout: &Layout, start: u64, bytes: u64) -> io::Result<()> {
    let mut at = start;
    let end = start + bytes;
    while at < end {
        let next = (at / layout.chunk + 1).saturating_mul(layout.chunk).min(end);
        if let Some((region, within)) = memory.to_region_addr(GuestAddress(at)) {
            let offset = usize::try_from(within.0).unwrap_or(usize::MAX);
            discard_in(region, offset, usize::try_from(next - at).unwrap_or(usize::MAX))?;
        }
        at = next;
    }
    Ok(())
}

impl Server {
    fn answer(&mut self) {
        let memory = self.memory.memory();
        let Self {
            queue,
            shared,
            control,
            complaints,
            ..
        } = self;
        let ram = &self.memory;
        queue.serve(&memory, &self.interrupt, |_, mut buffers: Buffers<'_>| {
            let mut bytes = [0; REQUEST_BYTES];
            let known = buffers.readable.read(&mut bytes).then(|| Request::decode(&bytes));
            let (kind, state) = match known.flatten() {
                None => (VIRTIO_MEM_RESP_ERROR, 0),
                Some(request) => do_request(request, shared, control.as_ref(), ram).unwrap_or_else(|e| {
                    complaints.say(format_args!("memory could not be changed: {e}"));
                    // The host has none to give, for now.
                    (VIRTIO_MEM_RESP_BUSY, 0)
                }),
            };
            let ([k0, k1], [s0, s1]) = (kind.to_le_bytes(), state.to_le_bytes());
            let response: [u8; RESPONSE_BYTES] = [k0, k1, 0, 0, 0, 0, 0, 0, s0, s1];
            Outcome::Used(if buffers.writable.write(&response) {
                RESPONSE_BYTES as u32
            } else {
                0
            })
        });
    }
}

impl Serve for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Source::edge(&self.queue.kick, 0)]
    }

    fn serve(&mut self, _token: u64) -> io::Result<()> {
        self.answer();
        Ok(())
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Layout {
            address,
            region,
            block,
            ..
        } = self.shared.layout;
        let state = self.shared.state();
        // Block size, NUMA node (none), then address, region, usable region, plugged, requested.
        let space = [
            block,
            0,
            address,
            region,
            region,
            state.blocks.bytes(),
            state.requested,
        ];
        read_space(&space.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn connect(&mut self, interrupt: &Interrupt) {
        let mut slot = self
            .shared
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = Some(interrupt.clone());
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queue(0) else {
            return Ok(());
        };
        let server = Server {
            queue,
            shared: Arc::clone(&self.shared),
            control: Arc::clone(&self.control),
            memory: activation.memory,
            interrupt: activation.interrupt,
            complaints: Complaints::new("mem"),
        };
        let worker = Worker::start(ThreadKind::Mem, &self.host, move || Ok(server));
        self.worker = Some(worker.map_err(|source| ActivateError {
            device: "mem",
            source,
        })?);
        Ok(())
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        let server = self.worker.take().and_then(Worker::stop);
        server.map_or_else(Vec::new, |server| vec![server.queue])
    }

    fn state(&self) -> Result<DeviceState, SaveError> {
        let state = self.shared.state();
        Ok(DeviceState::Mem {
            requested: state.requested,
            plugged: state.blocks.pieces(),
        })
    }

    /// The memory comes back zeroed; its contents are in the hands of whoever kept them.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Mem { requested, plugged } = state else {
            return Err(self.foreign_state());
        };
        let differs = |what| RestoreError::Mismatch { device: "mem", what };
        let Layout {
            block, region, chunk, ..
        } = self.shared.layout;
        let mut state = self.shared.state();
        if *requested > region || !requested.is_multiple_of(block) || state.blocks.bytes() > 0 {
            return Err(differs("size"));
        }
        let mut blocks = state.blocks.clone();
        for (start, bytes) in plugged {
            blocks.restore(*start, *bytes).ok_or_else(|| differs("region"))?;
        }
        let chunks = blocks.used_chunks();
        for (done, &at) in chunks.iter().enumerate() {
            if let Err(source) = self.control.add_ram(GuestAddress(at), chunk) {
                for &at in chunks.iter().take(done) {
                    // What cannot be taken back stays until the machine ends, which is what follows.
                    drop(self.control.unmap(GuestAddress(at), chunk));
                }
                return Err(RestoreError::Memory {
                    device: "mem",
                    source,
                });
            }
        }
        state.blocks = blocks;
        state.requested = *requested;
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.worker.take().map(Worker::stop));
    }
}
