//! The network device (virtio 1.2, section 5.1) on a tap whose frames have virtio-net headers: so checksums and segmentation are left
//! to whoever does them best, end to end.
//!
//! - `tap`: one queue of the tap;
//! - `pair`: a receive and a transmit queue, with a thread of their own;
//! - `vhost`: the same two, served by the host's kernel;
//! - `control`: how many pairs are in use;
//! - this module: the device and its configuration space.

mod control;
mod pair;
mod tap;
mod vhost;

use std::{
    fmt,
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use pair::MAX_FRAME;
pub use tap::HEADER_BYTES;

use super::{
    device::{ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_space},
    state::{DeviceState, RestoreError, SaveError},
    worker::{Host, Worker},
};
use crate::{
    complaints::Complaints,
    followed_memory::FollowedMemory,
    ports::{GuestRam, ThreadKind},
};
use control::{Control, use_pairs};
use pair::{Framing, Pair};
use tap::Tap;
use vhost::{VhostNet, VhostPair, VhostPairs};

/// Pairs of queues that one device may have.
pub const MAX_PAIRS: usize = 64;

/// Smallest and largest MTU that a link can have here.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65521;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;

/// What a network card is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// One descriptor for each queue of the tap (`IFF_MULTI_QUEUE` if there are several), with `IFF_VNET_HDR` and `IFF_NO_PI`.
    pub taps: Vec<File>,
    /// The guest's address on the link.
    pub mac: [u8; 6],
    /// Longest packet of the link, in bytes.
    pub mtu: u16,
    /// Checksums and segmentation may be left to the other side.
    pub offloads: bool,
}

/// Why there is no network card.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No queue, or more than [`MAX_PAIRS`].
    #[error("a network device of {count} queues: 1 to {MAX_PAIRS} are possible")]
    Pairs {
        /// How many were given.
        count: usize,
    },
    /// No link has this.
    #[error("a link cannot have an MTU of {mtu}")]
    Mtu {
        /// Bytes.
        mtu: u16,
    },
    /// The descriptor is no tap, or one without virtio-net headers.
    #[error("cannot use queue {0} of the tap")]
    Tap(usize, #[source] io::Error),
    /// One descriptor for each queue of the tap is needed.
    #[error("{count} descriptors of vhost-net for {pairs} queues of a tap")]
    VhostCount {
        /// How many were given.
        count: usize,
        /// Queues of the tap.
        pairs: usize,
    },
    /// The descriptor is none of vhost-net, or of one that can do too little.
    #[error("cannot use descriptor {0} of vhost-net")]
    Vhost(usize, #[source] io::Error),
}

/// The host's kernel instead of threads.
struct InKernel {
    pairs: Vec<Arc<VhostNet>>,
    memory: Arc<FollowedMemory>,
    worker: Option<Worker<VhostPairs>>,
}

/// The device.
pub struct Net {
    host: Host,
    taps: Vec<Tap>,
    mac: [u8; 6],
    mtu: u16,
    offloads: bool,
    queue_sizes: Vec<u16>,
    /// Pairs that the driver uses: one until it says otherwise.
    in_use: Arc<AtomicUsize>,
    pairs: Vec<Worker<Pair>>,
    control: Option<Worker<Control>>,
    vhost: Option<InKernel>,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("taps", &self.taps)
            .field("mac", &self.mac)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// A network card.
    pub fn new(config: NetConfig, host: Host) -> Result<Self, NetError> {
        let count = config.taps.len();
        if !(1..=MAX_PAIRS).contains(&count) {
            return Err(NetError::Pairs { count });
        }
        if !MTUS.contains(&config.mtu) {
            return Err(NetError::Mtu { mtu: config.mtu });
        }
        let mut taps = Vec::with_capacity(count);
        for (index, file) in config.taps.into_iter().enumerate() {
            taps.push(Tap::new(file).map_err(|e| NetError::Tap(index, e))?);
        }
        use_pairs(&taps, 1).map_err(|e| NetError::Tap(0, e))?;
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * count];
        if count > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Self {
            host,
            taps,
            mac: config.mac,
            mtu: config.mtu,
            offloads: config.offloads,
            queue_sizes,
            in_use: Arc::new(AtomicUsize::new(1)),
            pairs: Vec::new(),
            control: None,
            vhost: None,
        })
    }

    /// Lets the host's kernel do the work: `descriptors` of `/dev/vhost-net`, one for each queue of the tap. All that changes the guest's
    /// memory must go through `memory`, whose regions vhost-net limits (to 64, mostly).
    pub fn with_vhost(
        mut self,
        descriptors: Vec<File>,
        memory: Arc<FollowedMemory>,
        ram: &GuestRam,
    ) -> Result<Self, NetError> {
        let (count, pairs) = (descriptors.len(), self.taps.len());
        if count != pairs {
            return Err(NetError::VhostCount { count, pairs });
        }
        let mut pairs = Vec::with_capacity(count);
        for (index, file) in descriptors.into_iter().enumerate() {
            let vhost = VhostNet::new(file, ram.clone()).map_err(|e| NetError::Vhost(index, e))?;
            pairs.push(Arc::new(vhost));
        }
        self.vhost = Some(InKernel {
            pairs,
            memory,
            worker: None,
        });
        Ok(self)
    }

    fn space(&self) -> [u8; 12] {
        let [a, b, c, d, e, f] = self.mac;
        let [status_low, status_high] = (VIRTIO_NET_S_LINK_UP as u16).to_le_bytes();
        let [pairs_low, pairs_high] = (self.taps.len() as u16).to_le_bytes();
        let [mtu_low, mtu_high] = self.mtu.to_le_bytes();
        [
            a,
            b,
            c,
            d,
            e,
            f,
            status_low,
            status_high,
            pairs_low,
            pairs_high,
            mtu_low,
            mtu_high,
        ]
    }

    /// The kernel's pairs.
    fn start_in_kernel(&mut self, activation: &mut Activation) -> io::Result<()> {
        let Some(kernel) = self.vhost.as_mut() else {
            return Ok(());
        };
        let mut pairs = Vec::new();
        for ((index, vhost), tap) in kernel.pairs.iter().enumerate().zip(&self.taps) {
            let (rx, tx) = (activation.queue(2 * index), activation.queue(2 * index + 1));
            if let (Some(rx), Some(tx)) = (rx, tx) {
                pairs.push(VhostPair {
                    vhost: Arc::clone(vhost),
                    tap: tap.clone(),
                    queues: [rx, tx],
                });
            }
        }
        let (taps, offloads, features) = (self.taps.clone(), offloads(activation), activation.features);
        let (memory, interrupt) = (Arc::clone(&kernel.memory), activation.interrupt.clone());
        let in_use = self.in_use.load(Ordering::Relaxed);
        let start = move || {
            use_pairs(&taps, in_use)?;
            if let Some(tap) = taps.first() {
                tap.set_offloads(offloads)?;
            }
            VhostPairs::start(pairs, features, &memory, &interrupt)
        };
        kernel.worker = Some(Worker::start(ThreadKind::Net, &self.host, start)?);
        Ok(())
    }

    /// The threads' pairs.
    fn start_threads(&mut self, activation: &mut Activation) -> io::Result<()> {
        let segmented = activation.has(VIRTIO_NET_F_GUEST_TSO4) || activation.has(VIRTIO_NET_F_GUEST_TSO6);
        let framing = Framing {
            merged: activation.has(VIRTIO_NET_F_MRG_RXBUF),
            longest: if segmented {
                MAX_FRAME
            } else {
                // Ethernet's header and one VLAN tag.
                usize::from(self.mtu) + 18
            },
        };
        let offloads = offloads(activation);
        let in_use = self.in_use.load(Ordering::Relaxed);
        for (index, tap) in self.taps.iter().enumerate() {
            let (rx, tx) = (activation.queue(2 * index), activation.queue(2 * index + 1));
            let (Some(rx), Some(tx)) = (rx, tx) else {
                continue;
            };
            let (memory, interrupt) = (activation.memory.clone(), activation.interrupt.clone());
            let (taps, tap) = (self.taps.clone(), tap.clone());
            let pair = move || {
                if index == 0 {
                    // One setting for all queues.
                    use_pairs(&taps, in_use)?;
                    tap.set_offloads(offloads)?;
                }
                Ok(Pair::new(tap, rx, tx, framing, memory, interrupt))
            };
            self.pairs.push(Worker::start(ThreadKind::Net, &self.host, pair)?);
        }
        Ok(())
    }

    fn start(&mut self, activation: &mut Activation) -> io::Result<()> {
        if self.vhost.is_some() {
            self.start_in_kernel(activation)?;
        } else {
            self.start_threads(activation)?;
        }
        if let Some(queue) = activation.queue(2 * self.taps.len()) {
            let control = Control {
                taps: self.taps.clone(),
                in_use: Arc::clone(&self.in_use),
                queue,
                memory: activation.memory.clone(),
                interrupt: activation.interrupt.clone(),
                complaints: Complaints::new("net"),
            };
            self.control = Some(Worker::start(ThreadKind::Net, &self.host, move || Ok(control))?);
        }
        Ok(())
    }
}

/// What the tap may leave to the guest.
fn offloads(activation: &Activation) -> libc::c_uint {
    if !activation.has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (feature, flag) in [
        (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    ] {
        if activation.has(feature) {
            flags |= flag;
        }
    }
    // Only together with segmentation.
    if flags != libc::TUN_F_CSUM && activation.has(VIRTIO_NET_F_GUEST_ECN) {
        flags |= libc::TUN_F_TSO_ECN;
    }
    flags
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let mut features = vec![
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        if self.offloads {
            features.extend([
                VIRTIO_NET_F_CSUM,
                VIRTIO_NET_F_HOST_TSO4,
                VIRTIO_NET_F_HOST_TSO6,
                VIRTIO_NET_F_HOST_ECN,
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
            ]);
        }
        if self.taps.len() > 1 {
            features.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        }
        features.iter().fold(0, |bits, feature| bits | 1 << feature)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.start(&mut activation).map_err(|source| {
            self.reset();
            ActivateError {
                device: "net",
                source,
            }
        })
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        let control = self.control.take().and_then(Worker::stop);
        let kernel = self.vhost.as_mut().and_then(|kernel| kernel.worker.take());
        let kernel = kernel.and_then(Worker::stop).map(VhostPairs::into_queues);
        let pairs = self.pairs.drain(..).filter_map(Worker::stop);
        let mut queues: Vec<_> = pairs.flat_map(Pair::into_queues).collect();
        queues.extend(kernel.into_iter().flatten());
        queues.extend(control.map(|control| control.queue));
        queues
    }

    fn state(&self) -> Result<DeviceState, SaveError> {
        let pairs = self.in_use.load(Ordering::Relaxed);
        Ok(DeviceState::Net {
            pairs: u16::try_from(pairs).unwrap_or(u16::MAX),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net { pairs } = state else {
            return Err(self.foreign_state());
        };
        let pairs = usize::from(*pairs);
        if !(1..=self.taps.len()).contains(&pairs) {
            return Err(RestoreError::Mismatch {
                device: "net",
                what: "number of queues",
            });
        }
        self.in_use.store(pairs, Ordering::Relaxed);
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.suspend());
        self.in_use.store(1, Ordering::Relaxed);
    }
}
