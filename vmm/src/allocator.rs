//! What the C library's allocator may keep: there is one of these processes for each pod, and most of the time it does nothing.

#![expect(unsafe_code, reason = "settings of the C library's allocator")]

/// Bytes from which on an allocation is a mapping of its own, which goes back to the host when it is freed; and that the heap may keep.
const KEPT: libc::c_int = 64 << 10;

/// To be called before there is a second thread. Best effort: another allocator, or one that does not know a setting, keeps more.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [
        // By default each thread gets a heap of its own, of which it touches several pages for a handful of allocations.
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, KEPT),
        (libc::M_TRIM_THRESHOLD, KEPT),
    ] {
        // SAFETY: takes numbers by value, and changes nothing about what has been allocated.
        unsafe { libc::mallopt(setting, value) };
    }
}

/// To be called when what a start needed has been freed.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: gives free pages back to the host, and moves nothing.
    unsafe {
        libc::malloc_trim(0);
    }
}
