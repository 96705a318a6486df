//! How the VM ended, as the VMM itself saw it. What is killed from outside leaves none.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{DecodeError, decode};

/// Longest record, bytes of JSON.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;

/// The last thing that a VMM writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// What ended the VM.
    pub cause: Cause,
    /// How long the guest ran, milliseconds; 0 when it never did.
    pub ran_ms: u64,
    /// Exits of vCPUs to the VMM by reason.
    #[serde(default)]
    pub exits: Vec<(String, u64)>,
}

/// What ended the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum Cause {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset, as a kernel does that panics.
    Reset,
    /// The guest's processor met a fault that it could not report (a triple fault).
    TripleFault,
    /// A request on the control socket.
    Killed,
    /// The VMM could not build or run the VM.
    Failure {
        /// The chain of errors.
        message: String,
    },
    /// A mistake in the VMM itself.
    Panic {
        /// What the panic said.
        message: String,
        /// File and line.
        location: String,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::TripleFault => f.write_str("the guest's processor met a triple fault"),
            Self::Killed => f.write_str("it was told to end"),
            Self::Failure { message } => f.write_str(message),
            Self::Panic { message, location } => write!(f, "the VMM failed at {location}: {message}"),
        }
    }
}

impl ExitRecord {
    /// Reads a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        decode("an exit record", bytes, RECORD_BYTES_MAX)
    }

    /// Its JSON, with a final line feed.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        let mut bytes = serde_json::to_vec(self).map_err(|source| DecodeError::Json {
            what: "an exit record",
            source,
        })?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_survives_the_file_and_reads_as_a_sentence() {
        let failure = Cause::Failure {
            message: "cannot set MSR 0x10a".into(),
        };
        let panic = Cause::Panic {
            message: "index out of bounds".into(),
            location: "devices.rs:7".into(),
        };
        let causes = [
            Cause::PowerOff,
            Cause::Reset,
            Cause::TripleFault,
            Cause::Killed,
            failure,
            panic,
        ];
        for cause in causes {
            let record = ExitRecord {
                cause,
                ran_ms: 12,
                exits: vec![("hlt".into(), 3)],
            };
            assert_eq!(ExitRecord::decode(&record.encode().unwrap()).unwrap(), record);
            assert!(!record.cause.to_string().is_empty());
        }
    }

    #[test]
    fn an_empty_file_is_no_record() {
        assert!(ExitRecord::decode(b"").is_err());
    }
}
