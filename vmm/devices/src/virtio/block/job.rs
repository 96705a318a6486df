//! A request on its way: it keeps the guest's memory mapped until it is done, wherever it waits.
#![expect(
    unsafe_code,
    reason = "pointers to the guest's memory outlive the borrow they came from"
)]

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::{
    disk::Vectors,
    request::{Command, Extent, Request, SERIAL_BYTES, Status},
};
use crate::virtio::chain::Pieces;

/// What is left to do.
#[derive(Debug)]
pub(super) enum Work {
    Read {
        offset: u64,
        data: Vectors,
    },
    Write {
        offset: u64,
        data: Vectors,
    },
    Flush,
    Discard(Vec<Extent>),
    Zero(Vec<Extent>),
    /// The answer is known.
    Nothing(Status),
}

impl Work {
    /// So many bytes have been moved; whether some are left.
    pub(super) fn advance(&mut self, moved: usize) -> bool {
        match self {
            Self::Read { offset, data } | Self::Write { offset, data } => {
                data.advance(moved);
                *offset += moved as u64;
                data.len() > 0
            }
            _ => false,
        }
    }
}

/// A request, with the memory that it points to.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) head: u16,
    pub(super) work: Work,
    /// Bytes that the driver gets, beside the status.
    length: u32,
    status: *mut u8,
    /// Keeps what `work` and `status` point to.
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the pointers are to memory that `_memory` keeps mapped, which any thread may write to.
unsafe impl Send for Job {}

fn vectors(data: &Pieces<'_>) -> Vectors {
    // SAFETY: `Job::new` puts the result next to the memory that `data` borrows from, which keeps it mapped.
    unsafe { Vectors::new(data.iovecs().to_vec()) }
}

impl Job {
    /// `request` must be of `memory`. `None` if it has no place for a status.
    pub(super) fn new(
        head: u16,
        request: Request<'_>,
        memory: &Arc<GuestMemoryMmap>,
        serial: &[u8; SERIAL_BYTES],
    ) -> Option<Self> {
        let status = request.status.iovecs().first()?.iov_base.cast();
        let mut length = 0;
        let work = match request.command {
            Ok(Command::Read { offset, data }) => {
                length = u32::try_from(data.len()).ok()?;
                let data = vectors(&data);
                Work::Read { offset, data }
            }
            Ok(Command::Write { offset, data }) => Work::Write {
                offset,
                data: vectors(&data),
            },
            Ok(Command::Flush) => Work::Flush,
            Ok(Command::Serial(mut data)) => {
                let count = data.len().min(SERIAL_BYTES);
                data.write(serial.get(..count)?);
                length = u32::try_from(count).ok()?;
                Work::Nothing(Status::Ok)
            }
            Ok(Command::Discard(extents)) => Work::Discard(extents),
            Ok(Command::Zero(extents)) => Work::Zero(extents),
            Err(status) => Work::Nothing(status),
        };
        Some(Self {
            head,
            work,
            length,
            status,
            _memory: Arc::clone(memory),
        })
    }

    /// Tells the driver how it ended; the bytes written to its buffers.
    pub(super) fn finish(&self, status: Status) -> u32 {
        // SAFETY: `status` points to a byte of the guest's memory that `_memory` keeps mapped; it is written as a device writes it.
        unsafe { self.status.write_volatile(status as u8) };
        if status == Status::Ok { self.length + 1 } else { 1 }
    }
}
