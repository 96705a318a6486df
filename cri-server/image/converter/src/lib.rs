//! The confined process that reads what registries send: one layer in, one converted layer out; or converted layers in, the metadata of
//! an image or the archive of a layer out.
//!
//! Owns the request, the confinement, decompression and the digests of what it reads and writes. Must not know registries, stores or
//! names: it gets descriptors. Whoever starts it hashes the compressed bytes itself, so that a process that was taken over by a layer can
//! lie about that layer only.

pub mod confinement;
mod decompression;
mod job;
pub mod protocol;
mod socket;
pub mod verity;

use std::{error::Error, io::Write, process::ExitCode};

use confinement::Needs;
use protocol::{Fault, Reply, Request};

/// Why there is no answer at all.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot receive the request")]
    Request(#[source] std::io::Error),
    #[error("cannot understand the request")]
    Form(#[source] serde_json::Error),
    #[error("cannot confine the process")]
    Confinement(#[from] confinement::ConfinementError),
    #[error("cannot answer")]
    Answer(#[source] std::io::Error),
}

/// The program: takes one request from the socket that is its standard input, fulfils it, answers and ends.
#[must_use]
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("caisson-layer-converter: {}", chain(&failure));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), Failure> {
    let (mut socket, bytes, files) = socket::receive().map_err(Failure::Request)?;
    let request: Request = serde_json::from_slice(&bytes).map_err(Failure::Form)?;
    confinement::confine(needs(&request))?;
    let reply = match request {
        Request::Convert { limits, diff_id } => job::convert(files, limits, diff_id),
        Request::Compose { limits } => job::compose(files, limits),
        Request::Restore { limits, modes } => job::restore(files, limits, modes),
    };
    let reply = reply.unwrap_or_else(|failed| failed);
    let bytes = serde_json::to_vec(&reply).map_err(Failure::Form)?;
    socket.write_all(&bytes).map_err(Failure::Answer)
}

fn needs(request: &Request) -> Needs {
    match request {
        // The largest window of zstd, and buffers.
        Request::Convert { limits, .. } => Needs {
            memory_bytes: 1 << 30,
            file_bytes: limits.max_image_bytes,
        },
        // Names and metadata are counted by their parts; what lies between them is not.
        Request::Compose { limits } | Request::Restore { limits, .. } => Needs {
            memory_bytes: 4 << 30,
            file_bytes: limits.max_image_bytes,
        },
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// The answer that something failed.
fn failed(fault: Fault, layer: usize, error: &dyn Error) -> Reply {
    let mut message = chain(error);
    if let Some((cut, _)) = message.char_indices().nth(protocol::MESSAGE_CHARS_MAX) {
        message.truncate(cut);
    }
    Reply::Failed {
        fault,
        layer,
        message,
    }
}
