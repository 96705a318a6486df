//! The keyboard controller, as far as a kernel without a keyboard uses it: it resets the machine (command 0xfe, the kernel's
//! `reboot=k`). Everything else reads as "nothing there".

use vmm_sys_util::eventfd::EventFd;

use crate::ports::BusDevice;

/// First of its ports: 0x60 for data.
pub const PORT: u64 = 0x60;
/// Ports until 0x64, which takes commands.
pub const PORTS: u64 = 5;

const COMMAND: u64 = 4;
const RESET_CPU: u8 = 0xfe;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    reset: EventFd,
}

impl I8042 {
    /// A guest that resets itself makes `reset` readable.
    #[must_use]
    pub fn new(reset: EventFd) -> Self {
        Self { reset }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The status register without any bit: no byte waits, and commands are taken.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [RESET_CPU] {
            // Fails only when the counter is full: then the reset is known already.
            drop(self.reset.write(1));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let device = I8042::new(event.try_clone().unwrap());
        device.write(0, &[0xfe]);
        device.write(4, &[0xfd]);
        device.write(4, &[0xfe, 0]);
        assert!(event.read().is_err());
        device.write(4, &[0xfe]);
        assert_eq!(event.read().unwrap(), 1);
        let mut status = [0xff];
        device.read(4, &mut status);
        assert_eq!(status, [0]);
    }
}
