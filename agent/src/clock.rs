//! The guest's clocks in nanoseconds.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// Since the VM started.
pub(crate) fn boot_nanos() -> u64 {
    nanos(clock_gettime(ClockId::Boottime))
}

/// Since the epoch, as far as the guest knows.
pub(crate) fn real_nanos() -> u64 {
    nanos(clock_gettime(ClockId::Realtime))
}

/// Sets the guest's idea of the time since the epoch.
pub(crate) fn set_real(nanos: u64) -> rustix::io::Result<()> {
    let seconds = i64::try_from(nanos / NANOS).map_err(|_| rustix::io::Errno::INVAL)?;
    let tv_nsec = i64::try_from(nanos % NANOS).map_err(|_| rustix::io::Errno::INVAL)?;
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: seconds,
            tv_nsec,
        },
    )
}

const NANOS: u64 = 1_000_000_000;

fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(NANOS).saturating_add(rest)
}
