//! How a machine ends, and the one place where that is written down: the first end counts.

use std::{
    fmt, io,
    sync::{Condvar, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How a machine has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest has switched itself off.
    PowerOff,
    /// The guest wants to start again; machines do not, pods do.
    Reset,
    /// The guest's CPU has met a fault while it handled faults: a kernel without a working fault handler, as after a failed boot.
    TripleFault,
    /// Whoever embeds the machine has stopped it.
    Stopped,
    /// KVM or the host cannot run it any further.
    Failed(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest has switched itself off"),
            Self::Reset => f.write_str("the guest has reset itself"),
            Self::TripleFault => f.write_str("the guest has died of a triple fault"),
            Self::Stopped => f.write_str("stopped"),
            Self::Failed(why) => write!(f, "the virtual machine cannot go on: {why}"),
        }
    }
}

/// Remembers the first end that is reported, and tells whoever waits.
#[derive(Debug)]
pub struct Ends {
    first: Mutex<Option<End>>,
    changed: Condvar,
    event: EventFd,
}

impl Ends {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            first: Mutex::new(None),
            changed: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// The machine ends now. Only the first report counts. The vCPU that calls this from a bus does not run again.
    pub fn report(&self, end: End) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(end);
            self.changed.notify_all();
            // Fails only if the counter is full, and then it is readable already.
            drop(self.event.write(1));
        }
    }

    /// The end, if there has been one.
    #[must_use]
    pub fn reported(&self) -> Option<End> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Becomes readable once the machine has ended; for whoever waits for several things. Nobody should read from it.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Waits for the end.
    #[must_use]
    pub fn wait(&self) -> End {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(end) = &*first {
                return end.clone();
            }
            first = self.changed.wait(first).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let ends = Ends::new().unwrap();
        assert_eq!(ends.reported(), None);
        ends.report(End::PowerOff);
        ends.report(End::TripleFault);
        assert_eq!(ends.wait(), End::PowerOff);
        assert_eq!(ends.event().read().unwrap(), 1);
    }
}
