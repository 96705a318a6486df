//! Messages about a misbehaving guest, to standard error, so few that a guest cannot fill a disk with them.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Messages in each window; the rest is counted.
const MESSAGES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(30);

/// A rate-limited log.
#[derive(Debug)]
pub(crate) struct Complaints {
    device: &'static str,
    window: Option<Instant>,
    said: u32,
    swallowed: u64,
}

impl Complaints {
    pub(crate) fn new(device: &'static str) -> Self {
        Self {
            device,
            window: None,
            said: 0,
            swallowed: 0,
        }
    }

    pub(crate) fn say(&mut self, message: fmt::Arguments<'_>) {
        if self.window.is_none_or(|start| start.elapsed() >= WINDOW) {
            if self.swallowed > 0 {
                eprintln!("{}: {} more messages", self.device, self.swallowed);
            }
            *self = Self::new(self.device);
            self.window = Some(Instant::now());
        }
        if self.said < MESSAGES {
            self.said += 1;
            eprintln!("{}: {message}", self.device);
        } else {
            self.swallowed = self.swallowed.saturating_add(1);
        }
    }
}
