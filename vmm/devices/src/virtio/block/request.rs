//! What a driver asks of a disk (virtio 1.2, section 5.2.6), taken apart and checked, before anything is done.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::virtio::chain::{Buffers, Pieces};

/// Bytes of a sector, whatever the size of the disk's blocks is.
pub const SECTOR: u64 = 512;

/// Bytes of a serial; shorter ones are padded with zeros.
pub const SERIAL_BYTES: usize = 20;

/// Ranges that one request may discard or zero.
pub const MAX_RANGES: usize = 64;

/// Sectors that one range may discard: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Sectors that one range may zero: 64 MiB, since a file system may have to write them.
pub const MAX_ZERO_SECTORS: u32 = 1 << 17;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
/// The only flag of a range.
const UNMAP: u32 = 1;

/// How a request ended, as the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Not done.
    Error = VIRTIO_BLK_S_IOERR as u8,
    /// No such request.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// Bytes of the disk that are to read as zeros, or to be forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// Their space may be given back.
    pub unmap: bool,
}

/// What is to be done. Offsets and lengths are multiples of [`SECTOR`], and lie on the disk.
#[derive(Debug)]
pub enum Command<'m> {
    /// Fill the buffers from the disk.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Where the bytes go.
        data: Pieces<'m>,
    },
    /// Write the buffers to the disk.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Where the bytes are.
        data: Pieces<'m>,
    },
    /// What has been written is to outlive a crash of the host.
    Flush,
    /// Fill the buffer with the serial.
    Serial(Pieces<'m>),
    /// The contents of these are of no use any more.
    Discard(Vec<Extent>),
    /// These are to read as zeros.
    Zero(Vec<Extent>),
}

/// A request that makes sense, or the answer to one that does not.
#[derive(Debug)]
pub struct Request<'m> {
    /// What to do, or what to answer at once.
    pub command: Result<Command<'m>, Status>,
    /// Where the status goes.
    pub status: Pieces<'m>,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Bytes of the disk.
    pub capacity: u64,
    /// Nothing can be written.
    pub read_only: bool,
}

impl Geometry {
    fn on_disk(&self, sector: u64, bytes: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        (offset.checked_add(bytes)? <= self.capacity).then_some(offset)
    }
}

impl<'m> Request<'m> {
    /// Takes a request apart; `None` if there is not even room for a status.
    pub fn parse(mut buffers: Buffers<'m>, geometry: &Geometry) -> Option<Self> {
        let data = buffers.writable.take_all_but(1)?;
        Some(Self {
            command: command(buffers.readable, data, geometry),
            status: buffers.writable,
        })
    }
}

fn command<'m>(
    mut readable: Pieces<'m>,
    writable: Pieces<'m>,
    geometry: &Geometry,
) -> Result<Command<'m>, Status> {
    let mut header = [0; HEADER_BYTES];
    if !readable.read(&mut header) {
        return Err(Status::Error);
    }
    let [a, b, c, d, _, _, _, _, s @ ..] = header;
    let sector = u64::from_le_bytes(s);
    let place = |data: &Pieces<'_>| {
        let bytes = data.len() as u64;
        let whole = bytes.is_multiple_of(SECTOR);
        geometry
            .on_disk(sector, bytes)
            .filter(|_| whole)
            .ok_or(Status::Error)
    };
    let kind = u32::from_le_bytes([a, b, c, d]);
    let changes = matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    if changes && geometry.read_only {
        return Err(Status::Error);
    }
    match kind {
        VIRTIO_BLK_T_IN => Ok(Command::Read {
            offset: place(&writable)?,
            data: writable,
        }),
        VIRTIO_BLK_T_OUT => Ok(Command::Write {
            offset: place(&readable)?,
            data: readable,
        }),
        VIRTIO_BLK_T_FLUSH => Ok(Command::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Command::Serial(writable)),
        VIRTIO_BLK_T_DISCARD => extents(readable, geometry, MAX_DISCARD_SECTORS, 0).map(Command::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => extents(readable, geometry, MAX_ZERO_SECTORS, UNMAP).map(Command::Zero),
        _ => Err(Status::Unsupported),
    }
}

fn extents(
    mut readable: Pieces<'_>,
    geometry: &Geometry,
    most: u32,
    known_flags: u32,
) -> Result<Vec<Extent>, Status> {
    let count = readable.len() / RANGE_BYTES;
    if !readable.len().is_multiple_of(RANGE_BYTES) || count == 0 || count > MAX_RANGES {
        return Err(Status::Error);
    }
    let mut extents = Vec::with_capacity(count);
    let mut range = [0; RANGE_BYTES];
    while readable.read(&mut range) {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f @ ..] = range;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(f);
        if flags & !known_flags != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > most {
            return Err(Status::Error);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        extents.push(Extent {
            offset: geometry.on_disk(sector, bytes).ok_or(Status::Error)?,
            bytes,
            unmap: flags & UNMAP != 0,
        });
    }
    Ok(extents)
}
