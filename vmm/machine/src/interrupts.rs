//! Interrupts of devices.
//!
//! A message signalled interrupt from one of our own threads is one call into KVM (KVM_SIGNAL_MSI): no route and no event are needed
//! for it, so a boot makes none, and a change of an MSI-X table costs no grace period in the host's kernel. Only what is raised inside
//! the host's kernel (vhost) gets an irqfd and a route, on demand.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_devices::ports::{Interrupts, MsiMessage, MsiVectors};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Inputs of the I/O APIC.
const LINES: u32 = 24;
/// KVM's table has 4096 entries (KVM_MAX_IRQ_ROUTES) on x86; no machine of ours comes near.
const MAX_ROUTES: usize = 1024;

/// The machine's interrupt controllers, all of them inside KVM.
#[derive(Debug)]
pub(crate) struct Controller {
    vm: Arc<VmFd>,
    events: bool,
    /// Messages of the interrupt numbers beyond the lines.
    routes: Mutex<BTreeMap<u32, MsiMessage>>,
}

impl Controller {
    pub(crate) fn new(vm: Arc<VmFd>, events: bool) -> Self {
        Self {
            vm,
            events,
            routes: Mutex::default(),
        }
    }

    /// Reserves an interrupt number.
    fn allocate(&self) -> io::Result<u32> {
        let mut routes = lock(&self.routes);
        if routes.len() >= MAX_ROUTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let gsi = (LINES..)
            .find(|gsi| !routes.contains_key(gsi))
            .ok_or(io::ErrorKind::StorageFull)?;
        routes.insert(gsi, MsiMessage::default());
        Ok(gsi)
    }

    fn release(&self, gsi: u32) {
        lock(&self.routes).remove(&gsi);
    }

    /// Interrupt `gsi` is `message` from now on.
    fn route(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut routes = lock(&self.routes);
        if routes.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        let entries = table(&routes);
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::StorageFull)?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

/// The whole table: KVM only takes it as a whole. The lines are as KVM made them; messages without an address have no entry.
fn table(routes: &BTreeMap<u32, MsiMessage>) -> Vec<kvm_irq_routing_entry> {
    let lines = (0..LINES).map(|pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry.u.irqchip.pin = pin;
        entry
    });
    let messages = routes.iter().filter(|(_, message)| message.address != 0);
    let messages = messages.map(|(&gsi, message)| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        let (low, high) = halves(message.address);
        entry.u.msi.address_lo = low;
        entry.u.msi.address_hi = high;
        entry.u.msi.data = message.data;
        entry
    });
    lines.chain(messages).collect()
}

/// The lower and the upper 32 bits.
fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

/// [`Interrupts`] of one machine.
#[derive(Debug, Clone)]
pub(crate) struct KvmInterrupts(pub(crate) Arc<Controller>);

impl Interrupts for KvmInterrupts {
    fn msi(&self, vectors: u16) -> io::Result<Arc<dyn MsiVectors>> {
        let state = (0..vectors).map(|_| Vector::default()).collect();
        Ok(Arc::new(Vectors {
            controller: Arc::clone(&self.0),
            state: Mutex::new(state),
        }))
    }

    fn line(&self, gsi: u32) -> io::Result<EventFd> {
        if !self.0.events {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.0.vm.register_irqfd(&event, gsi)?;
        Ok(event)
    }
}

/// One vector: its message while it is unmasked, and its event if somebody wanted one.
#[derive(Debug, Default)]
struct Vector {
    message: Option<MsiMessage>,
    event: Option<(EventFd, u32)>,
}

#[derive(Debug)]
struct Vectors {
    controller: Arc<Controller>,
    state: Mutex<Vec<Vector>>,
}

impl MsiVectors for Vectors {
    fn update(&self, index: u16, message: MsiMessage, masked: bool) -> io::Result<()> {
        let mut state = lock(&self.state);
        let vector = state
            .get_mut(usize::from(index))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let was_unmasked = vector.message.is_some();
        vector.message = (!masked).then_some(message);
        let Some((event, gsi)) = &vector.event else {
            return Ok(());
        };
        if masked {
            if was_unmasked {
                self.controller.vm.unregister_irqfd(event, *gsi)?;
            }
            return Ok(());
        }
        self.controller.route(*gsi, message)?;
        if !was_unmasked {
            // KVM looks at the event when it is registered: what was written meanwhile is delivered now.
            self.controller.vm.register_irqfd(event, *gsi)?;
        }
        Ok(())
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        let message = lock(&self.state)
            .get(usize::from(index))
            .ok_or(io::ErrorKind::InvalidInput)?
            .message;
        let Some(message) = message else { return Ok(()) };
        let (address_lo, address_hi) = halves(message.address);
        // KVM says 0 if the guest has switched its interrupt controller off, which is the guest's own affair.
        self.controller.vm.signal_msi(kvm_msi {
            address_lo,
            address_hi,
            data: message.data,
            ..Default::default()
        })?;
        Ok(())
    }

    fn eventfd(&self, index: u16) -> io::Result<EventFd> {
        if !self.controller.events {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut state = lock(&self.state);
        let vector = state
            .get_mut(usize::from(index))
            .ok_or(io::ErrorKind::InvalidInput)?;
        if let Some((event, _)) = &vector.event {
            return event.try_clone();
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let theirs = event.try_clone()?;
        let gsi = self.controller.allocate()?;
        if let Some(message) = vector.message {
            let registered = self
                .controller
                .route(gsi, message)
                .and_then(|()| Ok(self.controller.vm.register_irqfd(&event, gsi)?));
            if let Err(error) = registered {
                self.controller.release(gsi);
                return Err(error);
            }
        }
        vector.event = Some((event, gsi));
        Ok(theirs)
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        for vector in lock(&self.state).drain(..) {
            if let Some((event, gsi)) = vector.event {
                if vector.message.is_some() {
                    // Closing the last copy of the event would undo it as well; somebody else may hold one.
                    self.controller.vm.unregister_irqfd(&event, gsi).ok();
                }
                self.controller.release(gsi);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[expect(unsafe_code, reason = "reads the fields of a union that it has written")]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_line_and_every_message_that_has_been_set() {
        let routes = BTreeMap::from([
            (24, MsiMessage::default()),
            (
                25,
                MsiMessage {
                    address: 0x1_fee0_1000,
                    data: 0x4021,
                },
            ),
        ]);
        let table = table(&routes);
        assert_eq!(table.len(), 25);
        let last = table[24];
        assert_eq!((last.gsi, last.type_), (25, KVM_IRQ_ROUTING_MSI));
        // SAFETY: entries of this type have been made by writing exactly these fields.
        let msi = unsafe { last.u.msi };
        assert_eq!(
            (msi.address_lo, msi.address_hi, msi.data),
            (0xfee0_1000, 1, 0x4021)
        );
    }
}
