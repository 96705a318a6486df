//! Between vhost-user and the device: which queue was kicked, and whom to notify.
//!
//! vhost-user knows no reset of a single device: a guest that starts its driver anew is recognized by its queues, which begin at zero
//! again, while those of a VM that was only stopped go on where they were.

use std::{io, ops::Deref};

use caisson_devices::virtio::vsock::{Progress, RX_QUEUE, TX_QUEUE, Vsock};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringState, VringT};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

/// The event queue stays with the hypervisor.
const QUEUES: usize = 2;

/// QEMU asks for 128.
const QUEUE_SIZE: usize = 256;

/// vhost-user's own feature bit: there are protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Token of the device's own descriptor; those below belong to the queues and the exit event.
pub(crate) const HOST_EVENT: u16 = QUEUES as u16 + 1;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The device, as vhost-user sees it.
#[derive(Debug)]
pub(crate) struct Backend {
    vsock: Vsock,
    memory: Memory,
    /// Where each queue was left: its next available index.
    left_at: [Option<u16>; QUEUES],
}

impl Backend {
    pub(crate) fn new(vsock: Vsock, memory: Memory) -> Self {
        Self {
            vsock,
            memory,
            left_at: [None; QUEUES],
        }
    }

    /// Takes packets until the guest offers none, each round followed by what they called forth.
    fn serve_tx(&mut self, vrings: &[VringMutex]) -> io::Result<()> {
        loop {
            self.with_queue(vrings, TX_QUEUE, |vsock, vring, memory| {
                // Fails only when the ring is not in memory; then there is nothing in it either.
                drop(vring.disable_notification());
                vsock.process_tx(vring.get_queue_mut(), memory)
            })?;
            self.serve_rx(vrings)?;
            let mut more = false;
            self.with_queue(vrings, TX_QUEUE, |_, vring, _| {
                more = vring.enable_notification().unwrap_or(false);
                Progress::default()
            })?;
            if !more {
                return Ok(());
            }
        }
    }

    /// Gives packets to the guest. When it has no buffers left, it is asked to say when it has.
    fn serve_rx(&mut self, vrings: &[VringMutex]) -> io::Result<()> {
        loop {
            let mut again = false;
            self.with_queue(vrings, RX_QUEUE, |vsock, vring, memory| {
                drop(vring.disable_notification());
                let progress = vsock.process_rx(vring.get_queue_mut(), memory);
                again = progress.starved && vring.enable_notification().unwrap_or(false);
                progress
            })?;
            if !again {
                return Ok(());
            }
        }
    }

    /// Runs `work` on a queue that is in use, and notifies the guest afterwards if it wants to know.
    fn with_queue(
        &mut self,
        vrings: &[VringMutex],
        index: usize,
        work: impl FnOnce(&mut Vsock, &mut VringState, &GuestMemoryMmap) -> Progress,
    ) -> io::Result<()> {
        let (Some(vring), Some(left_at)) = (vrings.get(index), self.left_at.get_mut(index)) else {
            return Ok(());
        };
        let mut guard = vring.get_mut();
        if !guard.is_enabled() || !guard.get_queue().ready() {
            return Ok(());
        }
        let start = guard.get_queue().next_avail();
        let restarted = left_at.is_some_and(|left| left != start);
        if restarted {
            self.vsock.reset();
            // The other queue has begun anew as well.
            self.left_at = [None; QUEUES];
        }
        let memory = self.memory.memory();
        let progress = work(&mut self.vsock, &mut guard, memory.deref());
        if let Some(left_at) = self.left_at.get_mut(index) {
            *left_at = Some(guard.get_queue().next_avail());
        }
        if progress.used && guard.needs_notification().unwrap_or(true) {
            guard.signal_used_queue()?;
        }
        Ok(())
    }
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&mut self, _enabled: bool) {
        // The queues are told by the library, and act on it.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.vsock.config(offset, size)
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _ready: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let outcome = match usize::from(event) {
            TX_QUEUE => self.serve_tx(vrings),
            RX_QUEUE => self.serve_rx(vrings),
            _ => {
                self.vsock.process_host();
                self.serve_rx(vrings)
            }
        };
        // An error from here would end the thread and leave a dead device; a notification that cannot be sent means that the
        // hypervisor is going, and then the whole process ends.
        if let Err(e) = outcome {
            eprintln!("vsock: cannot notify the guest: {e}");
        }
        Ok(())
    }
}
