//! Threads and what they may do: each gets the filter of its kind, and those of devices are started by a thread that has the widest one.
//!
//! A driver in the guest starts a device by a register, so on a vCPU's thread; a thread that is started there would inherit that one's filter and
//! could never do what a device must. Hence the [`Maker`]. It also hears what devices have to tell.

use std::{
    collections::BTreeSet,
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::{Builder, JoinHandle},
};

use caisson_confinement::{Filters, ThreadKind};
use caisson_devices::{
    complaints::Complaints,
    ports::{self, DeviceEvent, Events, Threads},
};

/// What a new thread does.
type Work = Box<dyn FnOnce() + Send>;

struct Order {
    builder: Builder,
    work: Work,
    answer: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Starts threads for whoever asks.
pub(crate) struct Maker {
    filters: Arc<Filters>,
    orders: Mutex<Sender<Order>>,
}

impl fmt::Debug for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maker").finish_non_exhaustive()
    }
}

impl Maker {
    /// To be called on a thread that has the filter of [`ThreadKind::Control`] already.
    pub(crate) fn start(filters: Arc<Filters>) -> io::Result<Arc<Self>> {
        let (orders, received) = channel();
        Builder::new()
            .name("maker".to_owned())
            .stack_size(MAKER_STACK)
            .spawn(move || make(&received))?;
        Ok(Arc::new(Self {
            filters,
            orders: Mutex::new(orders),
        }))
    }
}

const MAKER_STACK: usize = 64 << 10;

fn make(orders: &Receiver<Order>) {
    for order in orders {
        // Fails only if nobody waits any more.
        drop(order.answer.send(order.builder.spawn(order.work)));
    }
}

impl Threads for Maker {
    fn enter(&self, kind: ports::ThreadKind) -> io::Result<()> {
        use ports::ThreadKind as Kind;
        let kind = match kind {
            Kind::Block => ThreadKind::Block,
            Kind::Net => ThreadKind::Net,
            Kind::Vsock => ThreadKind::Vsock,
            Kind::Rng => ThreadKind::Entropy,
            Kind::Balloon | Kind::Pmem | Kind::Mem => ThreadKind::Memory,
            other => {
                return Err(io::Error::other(format!(
                    "no filter of system calls for {} threads",
                    other.name()
                )));
            }
        };
        self.filters.enter(kind).map_err(io::Error::other)
    }

    fn spawn(&self, builder: Builder, work: Work) -> io::Result<JoinHandle<()>> {
        let (answer, made) = sync_channel(1);
        let order = Order {
            builder,
            work,
            answer,
        };
        // A sender is as good as before, whatever happened to a thread that held it.
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner).clone();
        orders
            .send(order)
            .map_err(|_| io::Error::other("the thread that starts others has ended"))?;
        made.recv()
            .map_err(|_| io::Error::other("the thread that starts others has ended"))?
    }
}

/// Writes what devices tell into the VM's log, and knows which disks wait. A guest may have a hand in it: who starts a device that cannot start,
/// again and again, gives cause each time. So there are not many lines of it.
#[derive(Debug)]
pub(crate) struct Log(Mutex<Told>);

#[derive(Debug)]
struct Told {
    failures: Complaints,
    /// Apart from the failures, so that those cannot hide it: a new line has the daemon ask for the disks.
    space: Complaints,
    full_disks: BTreeSet<String>,
}

impl Default for Log {
    fn default() -> Self {
        Self(Mutex::new(Told {
            failures: Complaints::new("caisson-vmm"),
            space: Complaints::new("caisson-vmm"),
            full_disks: BTreeSet::new(),
        }))
    }
}

impl Log {
    /// Serials of the disks whose writes wait for space on the host.
    pub(crate) fn full_disks(&self) -> Vec<String> {
        self.told().full_disks.iter().cloned().collect()
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // A thread that panics takes the process with it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Events for Log {
    fn happened(&self, event: DeviceEvent) {
        let mut told = self.told();
        let said = format_args!("{event}");
        match &event {
            DeviceEvent::DiskFull { disk } => {
                told.full_disks.insert(disk.clone());
                told.space.say(said);
            }
            DeviceEvent::DiskHasSpace { disk } => {
                told.full_disks.remove(disk);
                told.space.say(said);
            }
            _ => told.failures.say(said),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_wait_until_they_have_space() {
        let log = Log::default();
        let [one, other] = ["scratch", "vol-0"].map(str::to_owned);
        log.happened(DeviceEvent::DiskFull { disk: one.clone() });
        log.happened(DeviceEvent::DiskFull { disk: other.clone() });
        log.happened(DeviceEvent::DiskHasSpace { disk: one });
        log.happened(DeviceEvent::Failed {
            device: "disk".into(),
            reason: "test".into(),
        });
        assert_eq!(log.full_disks(), [other]);
    }
}
