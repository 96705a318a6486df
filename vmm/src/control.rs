//! The control server: one client at a time, one request at a time (`caisson_vmm_api::control`).
//!
//! Must not know what a request does to the machine: that is behind [`Operations`]. Nobody but the daemon can reach the socket, and yet nothing that
//! comes over it is believed: sizes are capped, waits bounded, and a client that talks nonsense loses its connection and no more.

use std::os::fd::{AsFd, OwnedFd};

use caisson_vmm_api::control::{
    NEWEST_PROTOCOL, OLDEST_PROTOCOL, Refusal, Reply, Request, Status, common_protocol,
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
    fn add_disk(&self, serial: &str, files: Vec<OwnedFd>, read_only: bool) -> Result<(), Refused>;
    fn remove_disk(&self, serial: &str) -> Result<(), Refused>;
    fn resize_disk(&self, serial: &str) -> Result<(), Refused>;
    fn resize(&self, what: Resize) -> Result<(), Refused>;
    fn pause(&self, paused: bool) -> Result<(), Refused>;
    /// Ends the VM, at once or by asking the guest.
    fn end(&self, how: Ending) -> Result<(), Refused>;
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
    ByTheGuest,
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
    let wants_files = matches!(request, Request::AddDisk { .. });
    if packet.descriptors.is_empty() == wants_files {
        let message = if wants_files {
            "a disk without a file"
        } else {
            "descriptors that nothing needs"
        };
        return refuse(Refused::new(Refusal::Invalid, message));
    }
    let done = match request {
        Request::Hello { .. } => Err(Refused::new(Refusal::Invalid, "a second hello")),
        Request::Status => return Answer::Reply(Reply::Status(operations.status())),
        Request::AddDisk { serial, read_only } => operations.add_disk(&serial, packet.descriptors, read_only),
        Request::RemoveDisk { serial } => operations.remove_disk(&serial),
        Request::ResizeDisk { serial } => operations.resize_disk(&serial),
        Request::ResizeVcpus { count } => operations.resize(Resize::Vcpus(count)),
        Request::ResizeMemory { mib } => operations.resize(Resize::MemoryMib(mib)),
        Request::Pause => operations.pause(true),
        Request::Resume => operations.pause(false),
        Request::Shutdown => operations.end(Ending::ByTheGuest),
        Request::Kill => return Answer::KillAfter,
    };
    match done {
        Ok(()) => Answer::Reply(Reply::Done),
        Err(refused) => refuse(refused),
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
