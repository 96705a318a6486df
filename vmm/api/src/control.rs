//! The control protocol: one request, one reply, each one packet of a SOCK_SEQPACKET socket, in JSON.
//!
//! The first request of a connection is [`Request::Hello`]; the VMM answers with the version that both speak from then on, or refuses.
//! Descriptors travel as SCM_RIGHTS with the request that names them. The VMM serves one connection at a time and ends it when nothing
//! comes for [`IDLE_SECONDS`].
//!
//! Version 1 knew disks only; 2 has NICs, persistent memory, the state of a paused VM, and the way by which a guest is asked to end.

use serde::{Deserialize, Serialize};

use crate::{
    DecodeError, decode, is_serial,
    spec::{FILES_PER_DISK_MAX, QUEUES_PER_NIC_MAX},
};

/// Oldest version that this code speaks.
pub const OLDEST_PROTOCOL: u32 = 1;
/// Newest version that this code speaks.
pub const NEWEST_PROTOCOL: u32 = 2;
/// Longest request or reply, bytes of JSON.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Most descriptors with one request.
pub const DESCRIPTORS_MAX: usize = FILES_PER_DISK_MAX;
/// Most model-specific registers that [`Request::SaveState`] names.
pub const NAMED_MSRS_MAX: usize = 256;
/// Version of what [`Request::SaveState`] writes.
pub const STATE_VERSION: u32 = 1;
/// Longest state, bytes of JSON: 254 vCPUs, and as many devices as fit.
pub const STATE_BYTES_MAX: usize = 64 << 20;
/// How long the guest may take to answer [`Request::Shutdown`], seconds.
pub const ANSWER_SECONDS: u64 = 2;
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
    /// Adds a NIC. With the request come `queues` taps, and then as many descriptors of vhost-net, or none.
    AddNic {
        /// Names it in later requests; shaped as a disk's serial.
        name: String,
        /// Hardware address.
        mac: [u8; 6],
        /// Bytes.
        mtu: u16,
        /// Pairs of queues.
        queues: u32,
    },
    /// Takes a NIC away that [`Request::AddNic`] has added. The guest should have let go of it.
    RemoveNic {
        /// Which.
        name: String,
    },
    /// Adds persistent memory: the file whose descriptor comes with the request, a multiple of 2 MiB long.
    AddPmem {
        /// Names it in later requests; shaped as a disk's serial.
        name: String,
        /// The guest's writes stay its own.
        read_only: bool,
    },
    /// Takes persistent memory away that [`Request::AddPmem`] has added. The guest should have let go of it.
    RemovePmem {
        /// Which.
        name: String,
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
    /// Stops the vCPUs, and then the devices: until [`Request::Resume`], nothing changes the guest's memory.
    Pause,
    /// Lets them run again.
    Resume,
    /// Writes what a paused VM is, as JSON, into the file whose descriptor comes with the request: its vCPUs, interrupt controllers, clock and
    /// devices, and where its memory lies. Neither the memory's contents nor the host's files are in it.
    SaveState {
        /// Model-specific registers to save beyond those that KVM lists: each must be readable.
        msrs: Vec<u32>,
    },
    /// Asks the guest to end in its own time, by a connection to a port of its vsock; done when somebody there has accepted it.
    Shutdown {
        /// Which port.
        port: u32,
    },
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
    /// Names of the NICs that were added since the boot.
    #[serde(default)]
    pub nics: Vec<String>,
    /// Names of the persistent memory that was added since the boot.
    #[serde(default)]
    pub pmems: Vec<String>,
    /// Serials of the disks whose writes wait because the host has no space for them.
    #[serde(default)]
    pub full_disks: Vec<String>,
    /// Places for devices that are free.
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
        match request.problem() {
            Some(problem) => Err(DecodeError::Invalid {
                what,
                problems: vec![problem],
            }),
            None => Ok(request),
        }
    }

    /// What is wrong with it, if anything is.
    fn problem(&self) -> Option<String> {
        match self {
            Self::AddDisk { serial, .. } | Self::RemoveDisk { serial } | Self::ResizeDisk { serial } => {
                (!is_serial(serial)).then(|| format!("{serial:?} is no serial of a disk"))
            }
            Self::AddNic { name, .. }
            | Self::RemoveNic { name }
            | Self::AddPmem { name, .. }
            | Self::RemovePmem { name }
                if !is_serial(name) =>
            {
                Some(format!("{name:?} is no name of a device"))
            }
            Self::AddNic { queues, .. } => {
                let possible = (1..=QUEUES_PER_NIC_MAX).contains(&(*queues as usize));
                (!possible)
                    .then(|| format!("a NIC of {queues} queues: 1 to {QUEUES_PER_NIC_MAX} are possible"))
            }
            Self::SaveState { msrs } => (msrs.len() > NAMED_MSRS_MAX)
                .then(|| format!("{} registers are named, {NAMED_MSRS_MAX} can be", msrs.len())),
            _ => None,
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
            Self::AddNic { .. } => "add_nic",
            Self::RemoveNic { .. } => "remove_nic",
            Self::AddPmem { .. } => "add_pmem",
            Self::RemovePmem { .. } => "remove_pmem",
            Self::ResizeVcpus { .. } => "resize_vcpus",
            Self::ResizeMemory { .. } => "resize_memory",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SaveState { .. } => "save_state",
            Self::Shutdown { .. } => "shutdown",
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
            Request::AddNic {
                name: "eth1".into(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                queues: 2,
            },
            Request::RemoveNic { name: "eth1".into() },
            Request::AddPmem {
                name: "pmem-1".into(),
                read_only: true,
            },
            Request::RemovePmem {
                name: "pmem-1".into(),
            },
            Request::SaveState { msrs: vec![0x10a] },
            Request::Shutdown { port: 1020 },
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
            nics: vec!["eth1".into()],
            pmems: Vec::new(),
            full_disks: vec!["scratch".into()],
            free_slots: 3,
            exits: vec![("io".into(), 12)],
        });
        assert_eq!(Reply::decode(&status.encode().unwrap()).unwrap(), status);
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(common_protocol(1, 1), Some(1), "of an older client");
        assert_eq!(common_protocol(1, 9), Some(NEWEST_PROTOCOL));
        assert_eq!(common_protocol(NEWEST_PROTOCOL + 1, 9), None);
        assert_eq!(common_protocol(0, 0), None);
        assert_eq!(common_protocol(5, 1), None);
    }

    #[test]
    fn what_makes_no_sense_reaches_no_device() {
        for text in [
            r#"{"verb":"remove_disk","serial":"../x"}"#,
            r#"{"verb":"remove_nic","name":"../x"}"#,
            r#"{"verb":"add_pmem","name":"","read_only":true}"#,
            r#"{"verb":"add_nic","name":"a","mac":[2,0,0,0,0,1],"mtu":1500,"queues":0}"#,
            r#"{"verb":"add_nic","name":"a","mac":[2,0,0,0,0,1],"mtu":1500,"queues":17}"#,
        ] {
            let refused = Request::decode(text.as_bytes());
            assert!(matches!(refused, Err(DecodeError::Invalid { .. })), "{text}");
        }
        let msrs = vec![1; NAMED_MSRS_MAX + 1];
        let bytes = Request::SaveState { msrs }.encode().unwrap();
        assert!(matches!(
            Request::decode(&bytes),
            Err(DecodeError::Invalid { .. })
        ));
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
