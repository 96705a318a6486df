//! The registers by which a guest switches itself off or resets itself (ACPI 6.5, 4.8.3.7 sleep control, 4.8.3.6 reset).

use std::sync::Arc;

use caisson_devices::ports::BusDevice;

use crate::{
    ends::{End, Ends},
    layout::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT},
};

/// The sleep type of S5, as the DSDT's `\_S5` says.
pub(crate) const S5_TYPE: u8 = 5;
/// SLP_EN: go to sleep now.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Sleep control, sleep status and reset, on consecutive ports.
#[derive(Debug)]
pub(crate) struct Power {
    ends: Arc<Ends>,
}

impl Power {
    /// Where it goes on the bus of ports.
    pub(crate) const START: u64 = SLEEP_CONTROL_PORT as u64;
    pub(crate) const SIZE: u64 = RESET_PORT as u64 - Self::START + 1;

    pub(crate) fn new(ends: Arc<Ends>) -> Self {
        Self { ends }
    }
}

impl BusDevice for Power {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // No wake-up has happened, ever.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const CONTROL: u64 = 0;
        const RESET: u64 = (RESET_PORT - SLEEP_CONTROL_PORT) as u64;
        const _: () = assert!(SLEEP_STATUS_PORT == SLEEP_CONTROL_PORT + 1);
        let &[value] = data else { return };
        match offset {
            CONTROL if value == S5_TYPE << 2 | SLEEP_ENABLE => self.ends.report(End::PowerOff),
            RESET if value == RESET_VALUE => self.ends.report(End::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_s5_with_the_enable_bit_switches_off_and_nothing_less_does() {
        let ends = Arc::new(Ends::new().unwrap());
        let power = Power::new(Arc::clone(&ends));
        power.write(0, &[S5_TYPE << 2]);
        power.write(0, &[SLEEP_ENABLE]);
        power.write(0, &[S5_TYPE << 2 | SLEEP_ENABLE, 0]);
        power.write(1, &[0xff]);
        power.write(2, &[0]);
        power.write(u64::MAX, &[1]);
        assert_eq!(ends.reported(), None);
        power.write(0, &[S5_TYPE << 2 | SLEEP_ENABLE]);
        assert_eq!(ends.reported(), Some(End::PowerOff));
    }

    #[test]
    fn writing_the_reset_register_resets() {
        let ends = Arc::new(Ends::new().unwrap());
        Power::new(Arc::clone(&ends)).write(2, &[RESET_VALUE]);
        assert_eq!(ends.reported(), Some(End::Reset));
    }
}
