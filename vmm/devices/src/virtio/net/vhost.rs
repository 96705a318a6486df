//! Pairs of queues that the host's kernel serves (vhost-net): frames go between the tap and the guest's memory without this process.
#![expect(
    unsafe_code,
    reason = "the backend of vhost-net is set by an ioctl that has no wrapper for a given descriptor"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, atomic::Ordering},
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_kern::{VhostKernBackend, vhost_binding::vhost_vring_file},
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::VIRTIO_NET_F_MRG_RXBUF,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::tap::Tap;
use crate::{
    followed_memory::{FollowedMemory, FollowsMemory},
    ports::GuestRam,
    virtio::{
        device::ActiveQueue,
        interrupt::Interrupt,
        worker::{Serve, Source},
    },
};

/// `_IOW(0xAF, 0x30, struct vhost_vring_file)` of linux/vhost.h.
const VHOST_NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;

/// What the guest may have negotiated that vhost must know of, and must be able to do.
const NEEDED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A descriptor of `/dev/vhost-net`: one pair of queues.
pub(super) struct VhostNet {
    file: File,
    memory: GuestRam,
}

impl AsRawFd for VhostNet {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for VhostNet {
    type AS = GuestRam;

    fn mem(&self) -> &GuestRam {
        &self.memory
    }
}

impl FollowsMemory for VhostNet {
    fn follow(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        self.set_mem_table(&regions).map(drop).map_err(io::Error::other)
    }
}

impl VhostNet {
    /// Takes a descriptor that nobody else uses; this process becomes its owner.
    pub(super) fn new(file: File, memory: GuestRam) -> io::Result<Self> {
        let vhost = Self { file, memory };
        vhost.set_owner().map_err(io::Error::other)?;
        let features = vhost.get_features().map_err(io::Error::other)?;
        if features & NEEDED != NEEDED {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("vhost-net lacks features {:#x}", NEEDED & !features),
            ));
        }
        Ok(vhost)
    }

    /// Connects one ring with a queue of the tap, or ends it.
    fn set_backend(&self, index: u32, tap: Option<&Tap>) -> io::Result<()> {
        let backend = vhost_vring_file {
            index,
            fd: tap.map_or(-1, AsRawFd::as_raw_fd),
        };
        // SAFETY: the descriptor is open, and the request reads one `vhost_vring_file`.
        let answer = unsafe { libc::ioctl(self.as_raw_fd(), VHOST_NET_SET_BACKEND, &raw const backend) };
        if answer < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    fn set_up(&self, index: usize, queue: &ActiveQueue, interrupt: &Interrupt) -> Result<(), vhost::Error> {
        let state = &queue.queue;
        self.set_vring_num(index, state.size())?;
        self.set_vring_base(index, state.next_avail())?;
        self.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: state.max_size(),
                queue_size: state.size(),
                flags: 0,
                desc_table_addr: state.desc_table(),
                used_ring_addr: state.used_ring(),
                avail_ring_addr: state.avail_ring(),
                log_addr: None,
            },
        )?;
        self.set_vring_kick(index, &queue.kick)?;
        // A driver that wants no interrupts gets none.
        match interrupt.queue_event(queue.index) {
            Ok(Some(event)) => self.set_vring_call(index, &event),
            Ok(None) => Ok(()),
            Err(e) => Err(vhost::Error::IoctlError(e)),
        }
    }
}

/// A pair that the kernel serves, as long as this exists.
pub(super) struct VhostPair {
    pub(super) vhost: Arc<VhostNet>,
    pub(super) tap: Tap,
    /// Receives, transmits.
    pub(super) queues: [ActiveQueue; 2],
}

impl VhostPair {
    fn start(&self, features: u64, memory: &FollowedMemory, interrupt: &Interrupt) -> io::Result<()> {
        let vhost = &self.vhost;
        vhost.set_features(features & NEEDED).map_err(io::Error::other)?;
        let follower: Arc<dyn FollowsMemory> = Arc::<VhostNet>::clone(vhost);
        memory.add_follower(&follower)?;
        for (index, queue) in self.queues.iter().enumerate() {
            vhost.set_up(index, queue, interrupt).map_err(io::Error::other)?;
        }
        vhost.set_backend(0, Some(&self.tap))?;
        vhost.set_backend(1, Some(&self.tap))
    }
}

impl VhostPair {
    /// The kernel lets go of both rings; how far it has come is in the queues.
    fn stop(self) -> [ActiveQueue; 2] {
        let Self {
            vhost, mut queues, ..
        } = self;
        let memory = vhost.memory.memory();
        for (index, ActiveQueue { queue, .. }) in queues.iter_mut().enumerate() {
            // Both fail only when the ring was never set up; then nothing of it has been served.
            drop(vhost.set_backend(index as u32, None));
            let Ok(base) = vhost.get_vring_base(index) else {
                continue;
            };
            // The ring's index has 16 bits.
            queue.set_next_avail(base as u16);
            if let Ok(used) = queue.used_idx(&*memory, Ordering::Acquire) {
                queue.set_next_used(used.0);
            }
        }
        queues
    }
}

/// All pairs of a device. Its thread waits for its end, and for nothing else.
pub(super) struct VhostPairs {
    pairs: Vec<VhostPair>,
    ended: Vec<ActiveQueue>,
}

impl VhostPairs {
    /// The kernel begins to serve.
    pub(super) fn start(
        pairs: Vec<VhostPair>,
        features: u64,
        memory: &FollowedMemory,
        interrupt: &Interrupt,
    ) -> io::Result<Self> {
        let all = Self {
            pairs,
            ended: Vec::new(),
        };
        for pair in &all.pairs {
            pair.start(features, memory, interrupt)?;
        }
        Ok(all)
    }

    /// What the kernel has left, after its end.
    pub(super) fn into_queues(mut self) -> Vec<ActiveQueue> {
        std::mem::take(&mut self.ended)
    }
}

impl Drop for VhostPairs {
    fn drop(&mut self) {
        // Those of a start that failed half-way.
        self.quiesce();
    }
}

impl Serve for VhostPairs {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn serve(&mut self, _token: u64) -> io::Result<()> {
        Ok(())
    }

    fn quiesce(&mut self) {
        self.ended.extend(self.pairs.drain(..).flat_map(VhostPair::stop));
    }
}
