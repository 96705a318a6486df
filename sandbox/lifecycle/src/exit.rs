//! How a container's end is named: exit code, reason and message as kubelet and people expect them.

use std::time::SystemTime;

/// How a container ended. Complete in itself, so no state has an exit only in part.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// `None` when it never started.
    pub started_at: Option<SystemTime>,
    /// When it ended.
    pub finished_at: SystemTime,
    /// 0-255; 128 + signal when killed by one.
    pub code: i32,
    /// Why, in one word.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// Why a container ended (CRI `ContainerStatus.reason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Reason {
    /// Exit code 0.
    Completed,
    /// Any other exit code, or a signal.
    Error,
    /// The guest's OOM killer ended it.
    OomKilled,
    /// Its process could not be started.
    StartError,
    /// Its VM ended, and nobody saw how the container did.
    Unknown,
}

impl Reason {
    /// The word that kubelet shows.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::Unknown => "Unknown",
        }
    }
}

/// Exit code of a container whose process could not be started, as runc and containerd have it.
pub const START_ERROR_CODE: i32 = 128;

/// Exit code of a container that was killed.
pub const KILLED_CODE: i32 = 137;

/// Exit code of a container whose end nobody saw.
pub const UNKNOWN_CODE: i32 = 255;

/// Names the end of a process that the guest has seen. The numbers come from the guest, so any value is possible.
#[must_use]
pub fn observed(
    started_at: Option<SystemTime>,
    finished_at: SystemTime,
    code: i32,
    oom_killed: bool,
) -> Exit {
    let code = if (0..=255).contains(&code) {
        code
    } else {
        UNKNOWN_CODE
    };
    let (reason, message) = if oom_killed && code != 0 {
        (Reason::OomKilled, "the container ran out of memory".to_owned())
    } else if code == 0 {
        (Reason::Completed, String::new())
    } else {
        (Reason::Error, String::new())
    };
    Exit {
        started_at,
        finished_at: finished_at.max(started_at.unwrap_or(finished_at)),
        code,
        reason,
        message,
    }
}

/// Names the end of a container that could not be started.
#[must_use]
pub fn start_error(at: SystemTime, message: String) -> Exit {
    Exit {
        started_at: None,
        finished_at: at,
        code: START_ERROR_CODE,
        reason: Reason::StartError,
        message,
    }
}

/// Names the end of a container whose pod was stopped: its VM was killed by the host.
#[must_use]
pub fn killed(started_at: Option<SystemTime>, at: SystemTime) -> Exit {
    Exit {
        started_at,
        finished_at: at,
        code: KILLED_CODE,
        reason: Reason::Error,
        message: "killed with its pod sandbox".into(),
    }
}

/// Names the end of a container whose VM ended by itself.
#[must_use]
pub fn vm_gone(started_at: Option<SystemTime>, at: SystemTime, why: &str) -> Exit {
    Exit {
        started_at,
        finished_at: at,
        code: UNKNOWN_CODE,
        reason: Reason::Unknown,
        message: format!("its VM ended: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const T: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn exits_are_named_by_code_and_oom() {
        let reason = |code, oom| observed(Some(T), T, code, oom).reason;
        assert_eq!(reason(0, false), Reason::Completed);
        // A container that ended well after one of its children was OOM-killed has completed.
        assert_eq!(reason(0, true), Reason::Completed);
        assert_eq!(reason(1, false), Reason::Error);
        assert_eq!(reason(137, true), Reason::OomKilled);
        assert_eq!(reason(137, false), Reason::Error);
    }

    #[test]
    fn a_guest_cannot_report_an_exit_code_that_does_not_exist_or_an_end_before_the_start() {
        let exit = observed(Some(T + Duration::from_secs(5)), T, -7, false);
        assert_eq!(exit.code, UNKNOWN_CODE);
        assert_eq!(exit.finished_at, T + Duration::from_secs(5));
    }

    #[test]
    fn a_failed_start_has_no_start_time() {
        let exit = start_error(T, "exec: \"x\": no such file or directory".into());
        assert_eq!(
            (exit.started_at, exit.code, exit.reason.as_str()),
            (None, 128, "StartError")
        );
    }
}
