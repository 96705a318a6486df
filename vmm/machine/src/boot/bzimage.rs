//! A bzImage: a compressed kernel behind a header, which unpacks itself.

use std::{fs::File, io, os::unix::fs::FileExt};

use linux_loader::{
    bootparam::{XLF_KERNEL_64, setup_header},
    loader::{BzImage, KernelLoader},
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{KernelError, Loaded, check_place};
use crate::layout::{HIGH_MEMORY, Layout};

/// Where the header is in the file (boot protocol, "The Real-Mode Kernel Header").
const HEADER: u64 = 0x1f1;
/// The 64-bit entry is that far behind the start of what is loaded.
const ENTRY_64: u64 = 0x200;
/// Boot protocol 2.12 is the first to say whether there is a 64-bit entry.
const PROTOCOL_2_12: u16 = 0x20c;

pub(super) fn load(memory: &GuestMemoryMmap, layout: &Layout, image: &File) -> Result<Loaded, KernelError> {
    let failed = |source| KernelError::Load {
        what: "kernel",
        source,
    };
    let mut header = setup_header::default();
    image
        .read_exact_at(header.as_mut_slice(), HEADER)
        .map_err(|_| KernelError::Image("too short for a header"))?;
    if header.header.to_le_bytes() != *b"HdrS" {
        return Err(KernelError::Image("no header"));
    }
    if header.version < PROTOCOL_2_12 {
        return Err(KernelError::Image("a boot protocol older than 2.12"));
    }
    let mut image = image.try_clone().map_err(failed)?;
    let loaded = BzImage::load(memory, Some(GuestAddress(HIGH_MEMORY)), &mut image, None)
        .map_err(|e| failed(io::Error::other(e)))?;
    // It unpacks itself to where it prefers to be, and needs init_size bytes there.
    let preferred = header.pref_address;
    let end = preferred
        .checked_add(header.init_size.into())
        .ok_or(KernelError::Image("larger than all memory"))?;
    check_place(layout, preferred, end)?;
    check_place(layout, HIGH_MEMORY, loaded.kernel_end)?;
    let has_entry = header.xloadflags & XLF_KERNEL_64 != 0;
    Ok(Loaded {
        entry64: has_entry.then_some(HIGH_MEMORY + ENTRY_64),
        pvh: None,
        end: end.max(loaded.kernel_end),
        initramfs_limit: u64::from(header.initrd_addr_max),
        header: loaded.setup_header,
    })
}
