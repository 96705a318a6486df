//! Giving the guest's pages back to the host.
#![expect(unsafe_code, reason = "pages are given back by madvise")]

use std::io;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::chain::Pieces;

/// Smallest page of the host.
pub(crate) const PAGE: usize = 4096;

/// Forgets what is in the whole pages of these pieces; they read as zeros (or as the file that they were mapped from) afterwards. The
/// bytes given back.
pub(crate) fn discard(memory: &GuestMemoryMmap, pieces: &Pieces<'_>) -> io::Result<u64> {
    let mut bytes = 0;
    for vector in pieces.iovecs().iter() {
        let start = vector.iov_base.addr();
        let region = memory.iter().find(|region| {
            let first = region.as_ptr().addr();
            start
                .checked_sub(first)
                .is_some_and(|offset| (offset as u64) < region.len())
        });
        if let Some(region) = region {
            bytes += discard_in(region, start - region.as_ptr().addr(), vector.iov_len)?;
        }
    }
    Ok(bytes)
}

/// As [`discard`], for `length` bytes at `offset` of a region.
pub(crate) fn discard_in(region: &GuestRegionMmap, offset: usize, length: usize) -> io::Result<u64> {
    let base = region.as_ptr().addr();
    let whole = region.len().try_into().unwrap_or(usize::MAX);
    let end = offset.saturating_add(length).min(whole);
    // Pages that are inside as a whole; a region begins at one.
    let (Some(first), last) = (offset.checked_next_multiple_of(PAGE), end - end % PAGE) else {
        return Ok(0);
    };
    let Some(bytes) = last.checked_sub(first).filter(|bytes| *bytes > 0) else {
        return Ok(0);
    };
    debug_assert!(base.is_multiple_of(PAGE));
    let advice = if region.flags() & libc::MAP_SHARED != 0 {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    // SAFETY: the range lies in the region, which is mapped as long as it is borrowed; its contents are the guest's, which may change
    // at any time, and no reference to them exists.
    let answer = unsafe { libc::madvise(region.as_ptr().wrapping_add(first).cast(), bytes, advice) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes as u64)
}
