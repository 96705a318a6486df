//! What the VMM process and whoever starts it say to each other.
//!
//! - [`spec`]: what a VM is made of. Read once, from an inherited descriptor; the guest starts when everything in it is built.
//! - [`control`]: requests and replies on the control socket, with a hello that settles the version.
//! - [`exit`]: how the VM ended, written by the VMM itself as its last act.
//!
//! Owns types, their bounds and their JSON. Must not touch sockets or files: each side moves the bytes by its own means. Both sides
//! distrust the other's bytes: every decoder has a cap, and unknown fields are errors in what starts a VM.

pub mod control;
pub mod exit;
pub mod spec;

/// Longest virtio-blk serial in bytes (VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6).
pub const SERIAL_BYTES: usize = 20;

/// Whether this can be a disk's serial: 1 to [`SERIAL_BYTES`] letters, digits and hyphens.
#[must_use]
pub fn is_serial(serial: &str) -> bool {
    (1..=SERIAL_BYTES).contains(&serial.len())
        && serial
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// What cannot be understood of the other side.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Longer than the cap.
    #[error("{what} of {length} bytes is longer than {limit}")]
    TooLong {
        /// Which message.
        what: &'static str,
        /// Its length, bytes.
        length: usize,
        /// The cap, bytes.
        limit: usize,
    },
    /// Not the JSON that it should be.
    #[error("cannot read {what}")]
    Json {
        /// Which message.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Well-formed and impossible.
    #[error("{what} is invalid: {}", problems.join("; "))]
    Invalid {
        /// Which message.
        what: &'static str,
        /// Each problem.
        problems: Vec<String>,
    },
}

fn decode<T: serde::de::DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
    limit: usize,
) -> Result<T, DecodeError> {
    if bytes.len() > limit {
        return Err(DecodeError::TooLong {
            what,
            length: bytes.len(),
            limit,
        });
    }
    serde_json::from_slice(bytes).map_err(|source| DecodeError::Json { what, source })
}
