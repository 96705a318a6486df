//! The control protocol: one request, one reply, each one packet of a SOCK_SEQPACKET socket, in JSON.
//!
//! The first request of a connection is [`Request::Hello`]; the VMM answers with the version that both speak from then on, or refuses.
//! Descriptors travel as SCM_RIGHTS with the request that names them. The VMM serves one connection at a time and ends it when nothing
//! comes for [`IDLE_SECONDS`].

use serde::{Deserialize, Serialize};

use crate::{DecodeError, decode, is_serial, spec::FILES_PER_DISK_MAX};

/// Oldest version that this code speaks.
pub const OLDEST_PROTOCOL: u32 = 1;
/// Newest version that this code speaks.
pub const NEWEST_PROTOCOL: u32 = 1;
/// Longest request or reply, bytes of JSON.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Most descriptors with one request.
pub const DESCRIPTORS_MAX: usize = FILES_PER_DISK_MAX;
/// How long a connection may be silent, seconds.
pub const IDLE_SECONDS: u64 = 10;
/// How long the guest may take to let go of a device, seconds; the reply to [`Request::RemoveDisk`] comes within it.
pub const RELEASE_SECONDS: u64 = 10;

/// What is asked of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// Begins the connection: the versions that the client speaks.
    Hello {
        /// Oldest.
        oldest: u32,
        /// Newest.
        newest: u32,
    },
    /// What the VM is doing.
    Status,
    /// Adds a disk made of the files whose descriptors come with the request, in their order.
    AddDisk {
        /// How the guest finds it.
        serial: String,
        /// The device refuses writes.
        read_only: bool,
    },
    /// Takes a disk away. The guest should have unmounted it.
    RemoveDisk {
        /// Which.
        serial: String,
    },
    /// Lets the device tell the guest a new size, after the file of a disk has grown.
    ResizeDisk {
        /// Which.
        serial: String,
    },
    /// Makes this many vCPUs available; the guest brings them online.
    ResizeVcpus {
        /// How many.
        count: u32,
    },
    /// Makes this much memory available.
    ResizeMemory {
        /// MiB.
        mib: u64,
    },
    /// Stops the vCPUs.
    Pause,
    /// Lets them run again.
    Resume,
    /// Asks the guest to end in its own time.
    Shutdown,
    /// Ends the VM now; the reply comes before the end.
    Kill,
}

/// What the VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Reply {
    /// To the hello.
    Welcome {
        /// The version that both speak.
        protocol: u32,
        /// The program's version.
        vmm: String,
        /// The VM's id.
        id: String,
    },
    /// Done.
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// Not done.
    Refused {
        /// Which kind of failure, for programs.
        kind: Refusal,
        /// What was tried and why not, for people.
        message: String,
    },
}

/// Why a request was not fulfilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It makes no sense, now or ever.
    Invalid,
    /// No common version of the protocol.
    Version,
    /// This VMM or this VM cannot do it.
    Unsupported,
    /// Every place for devices is taken.
    NoSlot,
    /// There is one of that name.
    Exists,
    /// There is none of that name.
    NotFound,
    /// The guest did not let go in time.
    Busy,
    /// It was tried and failed.
    Failed,
}

/// What the VM is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether vCPUs run.
    pub state: State,
    /// vCPUs that the guest may use now.
    pub vcpus: u32,
    /// vCPUs that it may ever use.
    pub vcpus_max: u32,
    /// Memory that the guest may use now, MiB.
    pub memory_mib: u64,
    /// Serials of the disks that were added since the boot.
    pub disks: Vec<String>,
    /// Places for disks that are free.
    pub free_slots: u32,
    /// Exits of vCPUs to the VMM by reason, as counted by the VMM.
    pub exits: Vec<(String, u64)>,
}

/// Whether vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// They do.
    Running,
    /// They were stopped by a request.
    Paused,
}

impl Request {
    /// Reads and checks a request.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "a request";
        let request: Self = decode(what, bytes, MESSAGE_BYTES_MAX)?;
        match &request {
            Self::AddDisk { serial, .. } | Self::RemoveDisk { serial } | Self::ResizeDisk { serial }
                if !is_serial(serial) =>
            {
                let problems = vec![format!("{serial:?} is no serial of a disk")];
                Err(DecodeError::Invalid { what, problems })
            }
            _ => Ok(request),
        }
    }

    /// Its JSON.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        encode("a request", self)
    }

    /// Its name on the wire, for errors.
    #[must_use]
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Status => "status",
            Self::AddDisk { .. } => "add_disk",
            Self::RemoveDisk { .. } => "remove_disk",
            Self::ResizeDisk { .. } => "resize_disk",
            Self::ResizeVcpus { .. } => "resize_vcpus",
            Self::ResizeMemory { .. } => "resize_memory",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Shutdown => "shutdown",
            Self::Kill => "kill",
        }
    }
}

impl Reply {
    /// Reads a reply.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        decode("a reply", bytes, MESSAGE_BYTES_MAX)
    }

    /// Its JSON.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        encode("a reply", self)
    }
}

fn encode<T: Serialize>(what: &'static str, message: &T) -> Result<Vec<u8>, DecodeError> {
    let bytes = serde_json::to_vec(message).map_err(|source| DecodeError::Json { what, source })?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(DecodeError::TooLong {
            what,
            length: bytes.len(),
            limit: MESSAGE_BYTES_MAX,
        });
    }
    Ok(bytes)
}

/// The newest version that both speak, if any.
#[must_use]
pub fn common_protocol(oldest: u32, newest: u32) -> Option<u32> {
    let version = newest.min(NEWEST_PROTOCOL);
    (version >= oldest.max(OLDEST_PROTOCOL)).then_some(version)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_and_replies_survive_the_wire() {
        let requests = [
            Request::Hello { oldest: 1, newest: 3 },
            Request::Status,
            Request::AddDisk {
                serial: "img-1".into(),
                read_only: true,
            },
            Request::RemoveDisk {
                serial: "img-1".into(),
            },
            Request::ResizeDisk {
                serial: "img-1".into(),
            },
            Request::ResizeVcpus { count: 3 },
            Request::ResizeMemory { mib: 512 },
            Request::Pause,
            Request::Resume,
            Request::Shutdown,
            Request::Kill,
        ];
        for request in requests {
            let bytes = request.encode().unwrap();
            let named = format!("\"verb\":\"{}\"", request.verb());
            assert!(String::from_utf8_lossy(&bytes).contains(&named), "{named}");
            assert_eq!(Request::decode(&bytes).unwrap(), request);
        }
        let status = Reply::Status(Status {
            state: State::Paused,
            vcpus: 1,
            vcpus_max: 2,
            memory_mib: 64,
            disks: vec!["scratch".into()],
            free_slots: 3,
            exits: vec![("io".into(), 12)],
        });
        assert_eq!(Reply::decode(&status.encode().unwrap()).unwrap(), status);
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(common_protocol(1, 1), Some(1));
        assert_eq!(common_protocol(1, 9), Some(NEWEST_PROTOCOL));
        assert_eq!(common_protocol(NEWEST_PROTOCOL + 1, 9), None);
        assert_eq!(common_protocol(0, 0), None);
        assert_eq!(common_protocol(5, 1), None);
    }

    #[test]
    fn what_is_no_serial_reaches_no_device() {
        let bytes = br#"{"verb":"remove_disk","serial":"../x"}"#;
        assert!(matches!(Request::decode(bytes), Err(DecodeError::Invalid { .. })));
    }

    #[test]
    fn a_status_of_a_newer_vmm_can_be_read() {
        let text = br#"{"answer":"status","state":"running","vcpus":1,"vcpus_max":1,"memory_mib":1,"disks":[],"free_slots":0,
                        "exits":[],"later":{"x":1}}"#;
        assert!(Reply::decode(text).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_decoders(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(Request::decode(&bytes));
            drop(Reply::decode(&bytes));
        }
    }
}
