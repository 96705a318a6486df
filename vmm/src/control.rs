//! The control server: one client at a time, one request at a time (`caisson_vmm_api::control`).
//!
//! Must not know what a request does to the machine: that is behind [`Operations`]. Nobody but the daemon can reach the socket, and yet nothing that
//! comes over it is believed: sizes are capped, waits bounded, and a client that talks nonsense loses its connection and no more.

use std::os::fd::{AsFd, OwnedFd};

use caisson_vmm_api::{
    control::{NEWEST_PROTOCOL, OLDEST_PROTOCOL, Refusal, Reply, Request, Status, common_protocol},
    spec::FILES_PER_DISK_MAX,
};

use crate::wire::{Connection, Packet};

/// Why something was not done, for the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) kind: Refusal,
    pub(crate) message: String,
}

impl Refused {
    pub(crate) fn new(kind: Refusal, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// It was tried and failed.
    pub(crate) fn failed(error: &dyn std::error::Error) -> Self {
        Self::new(Refusal::Failed, crate::chain(error))
    }
}

/// What can be done to a running VM.
pub(crate) trait Operations {
    fn id(&self) -> &str;
    fn status(&self) -> Status;
    /// Adds a device that is made of these files.
    fn add(&self, device: Added, files: Vec<OwnedFd>) -> Result<(), Refused>;
    fn remove(&self, kind: Kind, name: &str) -> Result<(), Refused>;
    fn resize_disk(&self, serial: &str) -> Result<(), Refused>;
    fn resize(&self, what: Resize) -> Result<(), Refused>;
    fn pause(&self, paused: bool) -> Result<(), Refused>;
    /// Writes what the paused VM is into a file.
    fn save(&self, file: OwnedFd, msrs: &[u32]) -> Result<(), Refused>;
    /// Ends the VM, at once or by asking the guest.
    fn end(&self, how: Ending) -> Result<(), Refused>;
}

/// Devices that come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Disk,
    Nic,
    Pmem,
}

/// A device to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Added {
    Disk {
        serial: String,
        read_only: bool,
    },
    Nic {
        name: String,
        mac: [u8; 6],
        mtu: u16,
        queues: usize,
    },
    Pmem {
        name: String,
        read_only: bool,
    },
}

/// What becomes larger or smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resize {
    Vcpus(u32),
    MemoryMib(u64),
}

/// How a VM shall end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By whoever listens on this port of its vsock.
    ByTheGuest(u32),
    Now,
}

/// Serves clients for as long as the process lives.
pub(crate) fn serve(listener: impl AsFd, operations: &impl Operations) {
    loop {
        match Connection::accept(&listener) {
            Ok(connection) => converse(&connection, operations),
            Err(e) => {
                // Out of descriptors or memory; the client may try again.
                eprintln!("caisson-vmm: cannot accept a connection on the control socket: {e}");
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

fn converse(connection: &Connection, operations: &impl Operations) {
    let mut greeted = false;
    loop {
        let packet = match connection.receive() {
            Ok(Some(packet)) => packet,
            // Its end, its silence, or an oversized packet.
            Ok(None) | Err(_) => return,
        };
        let answer = answer(packet, &mut greeted, operations);
        let kill = matches!(answer, Answer::KillAfter);
        let reply = match answer {
            Answer::Reply(reply) => reply,
            Answer::KillAfter => Reply::Done,
        };
        let sent = reply.encode().map_err(std::io::Error::other);
        let sent = sent.and_then(|bytes| connection.send(&bytes));
        if kill {
            // The client hears of it before it is done.
            drop(operations.end(Ending::Now));
        }
        if sent.is_err() || !greeted {
            return;
        }
    }
}

enum Answer {
    Reply(Reply),
    KillAfter,
}

fn answer(packet: Packet, greeted: &mut bool, operations: &impl Operations) -> Answer {
    let request = match Request::decode(&packet.bytes) {
        Ok(request) => request,
        Err(e) => return refuse(Refused::new(Refusal::Invalid, crate::chain(&e))),
    };
    if !*greeted {
        return Answer::Reply(greet(&request, greeted, operations));
    }
    let count = packet.descriptors.len();
    if !wanted_files(&request).contains(&count) {
        let message = format!("{} with {count} descriptors", request.verb());
        return refuse(Refused::new(Refusal::Invalid, message));
    }
    let done = match request {
        Request::Hello { .. } => Err(Refused::new(Refusal::Invalid, "a second hello")),
        Request::Status => return Answer::Reply(Reply::Status(operations.status())),
        Request::AddDisk { serial, read_only } => {
            operations.add(Added::Disk { serial, read_only }, packet.descriptors)
        }
        Request::RemoveDisk { serial } => operations.remove(Kind::Disk, &serial),
        Request::AddNic {
            name,
            mac,
            mtu,
            queues,
        } => {
            let queues = queues as usize;
            let nic = Added::Nic {
                name,
                mac,
                mtu,
                queues,
            };
            operations.add(nic, packet.descriptors)
        }
        Request::RemoveNic { name } => operations.remove(Kind::Nic, &name),
        Request::AddPmem { name, read_only } => {
            operations.add(Added::Pmem { name, read_only }, packet.descriptors)
        }
        Request::RemovePmem { name } => operations.remove(Kind::Pmem, &name),
        Request::ResizeDisk { serial } => operations.resize_disk(&serial),
        Request::ResizeVcpus { count } => operations.resize(Resize::Vcpus(count)),
        Request::ResizeMemory { mib } => operations.resize(Resize::MemoryMib(mib)),
        Request::Pause => operations.pause(true),
        Request::Resume => operations.pause(false),
        Request::SaveState { msrs } => match packet.descriptors.into_iter().next() {
            Some(file) => operations.save(file, &msrs),
            None => Err(Refused::new(Refusal::Invalid, "a state without a file")),
        },
        Request::Shutdown { port } => operations.end(Ending::ByTheGuest(port)),
        Request::Kill => return Answer::KillAfter,
    };
    match done {
        Ok(()) => Answer::Reply(Reply::Done),
        Err(refused) => refuse(refused),
    }
}

/// How many descriptors may come with a request.
fn wanted_files(request: &Request) -> std::ops::RangeInclusive<usize> {
    match request {
        Request::AddDisk { .. } => 1..=FILES_PER_DISK_MAX,
        Request::AddNic { queues, .. } => *queues as usize..=2 * *queues as usize,
        Request::AddPmem { .. } | Request::SaveState { .. } => 1..=1,
        _ => 0..=0,
    }
}

fn refuse(refused: Refused) -> Answer {
    Answer::Reply(Reply::Refused {
        kind: refused.kind,
        message: refused.message,
    })
}

fn greet(request: &Request, greeted: &mut bool, operations: &impl Operations) -> Reply {
    let Request::Hello { oldest, newest } = *request else {
        return Reply::Refused {
            kind: Refusal::Invalid,
            message: format!("{} before hello", request.verb()),
        };
    };
    match common_protocol(oldest, newest) {
        Some(protocol) => {
            *greeted = true;
            Reply::Welcome {
                protocol,
                vmm: env!("CARGO_PKG_VERSION").into(),
                id: operations.id().into(),
            }
        }
        None => Reply::Refused {
            kind: Refusal::Version,
            message: format!(
                "versions {oldest} to {newest} of the control protocol are none of {OLDEST_PROTOCOL} to {NEWEST_PROTOCOL}"
            ),
        },
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
