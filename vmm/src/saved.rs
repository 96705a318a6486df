//! What a paused VM is, on its way into a file: version, machine and devices as one JSON document (`Request::SaveState`).
//!
//! Must not know what is in the parts: they are `caisson-machine`'s and `caisson-devices`'.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
};

use caisson_devices::{
    pci::PciAddress,
    serial::PortState,
    virtio::state::{FunctionState, SaveError},
};
use caisson_machine::MachineState;
use caisson_vmm_api::control::{STATE_BYTES_MAX, STATE_VERSION};
use rustix::fs::{FileType, fstat, ftruncate};
use serde::{Deserialize, Serialize};

/// Why a state was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("cannot get the state of the machine")]
    Machine(#[from] caisson_machine::Error),
    #[error("cannot get the state of the function at {1}")]
    Function(#[source] SaveError, PciAddress),
    #[error("the state goes into a file, and this is none")]
    NoFile,
    #[error("the state does not become JSON")]
    Json(#[source] serde_json::Error),
    #[error("the state has {0} bytes, {STATE_BYTES_MAX} are the most")]
    TooLong(usize),
    #[error("cannot write the state")]
    Write(#[source] io::Error),
}

/// A whole VM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmState {
    pub(crate) version: u32,
    /// The VMM that wrote it.
    pub(crate) vmm: String,
    /// The VM's id.
    pub(crate) id: String,
    pub(crate) machine: MachineState,
    pub(crate) console: PortState,
    /// By place on the bus.
    pub(crate) functions: Vec<Function>,
}

/// A function, and where it is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Function {
    pub(crate) device: u8,
    pub(crate) function: u8,
    pub(crate) state: FunctionState,
}

impl VmState {
    pub(crate) fn new(id: &str, machine: MachineState, console: PortState, functions: Vec<Function>) -> Self {
        Self {
            version: STATE_VERSION,
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
            id: id.to_owned(),
            machine,
            console,
            functions,
        }
    }

    /// Writes it into a file, whose contents it becomes. Only into a file: anything else might make the writer wait.
    pub(crate) fn write(&self, file: OwnedFd) -> Result<(), StateError> {
        let kind = fstat(&file).map(|status| FileType::from_raw_mode(status.st_mode));
        if kind != Ok(FileType::RegularFile) {
            return Err(StateError::NoFile);
        }
        let bytes = serde_json::to_vec(self).map_err(StateError::Json)?;
        if bytes.len() > STATE_BYTES_MAX {
            return Err(StateError::TooLong(bytes.len()));
        }
        ftruncate(&file, 0).map_err(|e| StateError::Write(e.into()))?;
        File::from(file).write_all(&bytes).map_err(StateError::Write)
    }
}
