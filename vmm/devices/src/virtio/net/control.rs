//! The control queue (virtio 1.2, 5.1.6.5): how many pairs of queues the driver uses.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::GuestAddressSpace;

use super::tap::Tap;
use crate::{
    complaints::Complaints,
    ports::GuestRam,
    virtio::{
        chain::Buffers,
        device::{ActiveQueue, Outcome},
        interrupt::Interrupt,
        worker::{Serve, Source},
    },
};

/// The thread of the control queue.
pub(super) struct Control {
    pub(super) taps: Vec<Tap>,
    /// Pairs that the driver uses, for the next thread.
    pub(super) in_use: Arc<AtomicUsize>,
    pub(super) queue: ActiveQueue,
    pub(super) memory: GuestRam,
    pub(super) interrupt: Interrupt,
    pub(super) complaints: Complaints,
}

/// The first `pairs` queues of a tap are in use, the others are not.
pub(super) fn use_pairs(taps: &[Tap], pairs: usize) -> io::Result<()> {
    // A tap of one queue has nothing to attach.
    if taps.len() > 1 {
        for (index, tap) in taps.iter().enumerate() {
            tap.set_attached(index < pairs)?;
        }
    }
    Ok(())
}

impl Serve for Control {
    fn sources(&self) -> Vec<Source> {
        vec![Source::edge(&self.queue.kick, 0)]
    }

    fn serve(&mut self, _token: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        let Self {
            taps,
            in_use,
            complaints,
            queue,
            ..
        } = self;
        queue.serve(&memory, &self.interrupt, |_, buffers| {
            Outcome::Used(command(buffers, taps, in_use, complaints))
        });
        Ok(())
    }
}

/// Does one command; the bytes written.
fn command(mut buffers: Buffers<'_>, taps: &[Tap], in_use: &AtomicUsize, complaints: &mut Complaints) -> u32 {
    let mut command = [0; 4];
    let known = buffers.readable.read(&mut command);
    let [class, kind, low, high] = command;
    let pairs = usize::from(u16::from_le_bytes([low, high]));
    let meant = known
        && u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(kind) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
        && (1..=taps.len()).contains(&pairs);
    let outcome = if meant { use_pairs(taps, pairs) } else { Ok(()) };
    if let Err(e) = &outcome {
        complaints.say(format_args!("cannot use {pairs} queues of the tap: {e}"));
    }
    let answer = if meant && outcome.is_ok() {
        in_use.store(pairs, Ordering::Relaxed);
        VIRTIO_NET_OK
    } else {
        VIRTIO_NET_ERR
    };
    // The acknowledgement is the last byte; a driver that left no room for it does not want it.
    let space = buffers.writable.len().checked_sub(1);
    space.and_then(|before| buffers.writable.take(before));
    u32::from(buffers.writable.write(&[answer as u8]))
}
