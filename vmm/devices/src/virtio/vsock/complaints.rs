//! Messages about a misbehaving guest, to standard error, so few that a guest cannot fill a disk with them.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Messages in each window; the rest is counted.
const MESSAGES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(30);

/// A rate-limited log.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    window: Option<Instant>,
    said: u32,
    swallowed: u64,
}

impl Complaints {
    pub(crate) fn say(&mut self, message: fmt::Arguments<'_>) {
        if self.window.is_none_or(|start| start.elapsed() >= WINDOW) {
            if self.swallowed > 0 {
                eprintln!("vsock: {} more messages", self.swallowed);
            }
            *self = Self {
                window: Some(Instant::now()),
                ..Self::default()
            };
        }
        if self.said < MESSAGES {
            self.said += 1;
            eprintln!("vsock: {message}");
        } else {
            self.swallowed = self.swallowed.saturating_add(1);
        }
    }
}
