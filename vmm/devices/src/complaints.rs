//! Messages about a misbehaving guest, to standard error, so few that a guest cannot fill a disk with them.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Messages in each window; the rest is counted.
pub const MESSAGES: u32 = 5;
/// How long a window lasts.
pub const WINDOW: Duration = Duration::from_secs(30);

/// A rate-limited log.
#[derive(Debug)]
pub struct Complaints {
    device: &'static str,
    window: Option<Instant>,
    said: u32,
    swallowed: u64,
}

/// What becomes of a message.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is said, after how many others that were not.
    Said { swallowed: u64 },
    /// It is counted.
    Swallowed,
}

impl Complaints {
    /// Of one device, whose name comes before each message.
    #[must_use]
    pub fn new(device: &'static str) -> Self {
        Self {
            device,
            window: None,
            said: 0,
            swallowed: 0,
        }
    }

    /// Says it, unless too much has been said lately.
    pub fn say(&mut self, message: fmt::Arguments<'_>) {
        if let Verdict::Said { swallowed } = self.judge(Instant::now()) {
            if swallowed > 0 {
                eprintln!("{}: {swallowed} more messages", self.device);
            }
            eprintln!("{}: {message}", self.device);
        }
    }

    fn judge(&mut self, now: Instant) -> Verdict {
        let over = |start| now.saturating_duration_since(start) >= WINDOW;
        let mut swallowed = 0;
        if self.window.is_none_or(over) {
            swallowed = std::mem::take(&mut self.swallowed);
            self.said = 0;
            self.window = Some(now);
        }
        if self.said < MESSAGES {
            self.said += 1;
            Verdict::Said { swallowed }
        } else {
            self.swallowed = self.swallowed.saturating_add(1);
            Verdict::Swallowed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_gives_cause_without_end_gets_a_few_messages_in_each_window() {
        let start = Instant::now();
        let mut complaints = Complaints::new("test");
        let mut count = |from: Duration, times: u32| {
            let verdicts =
                (0..times).map(|at| complaints.judge(start + from + Duration::from_millis(at.into())));
            let said: Vec<u64> = verdicts
                .filter_map(|verdict| match verdict {
                    Verdict::Said { swallowed } => Some(swallowed),
                    Verdict::Swallowed => None,
                })
                .collect();
            said
        };
        assert_eq!(count(Duration::ZERO, 1000), [0; MESSAGES as usize]);
        assert_eq!(count(WINDOW / 2, 1000), [0; 0], "not in the same window");
        assert_eq!(count(WINDOW, 2), [2 * 1000 - u64::from(MESSAGES), 0]);
        assert_eq!(count(3 * WINDOW, 1), [0], "nothing was swallowed meanwhile");
    }
}
