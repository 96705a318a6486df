//! Doorbells by ioeventfd: the write of a guest wakes a device's thread inside the kernel.

use std::{io, sync::Arc};

use caisson_devices::ports::{Doorbell, Doorbells};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Registers doorbells with KVM, where it can.
#[derive(Debug)]
pub(crate) struct KvmDoorbells {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) available: bool,
}

impl Doorbells for KvmDoorbells {
    fn register(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        if !self.available {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let address = IoEventAddress::Mmio(doorbell.address);
        Ok(self.vm.register_ioevent(event, &address, NoDatamatch)?)
    }

    fn unregister(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(doorbell.address);
        Ok(self.vm.unregister_ioevent(event, &address, NoDatamatch)?)
    }
}
