//! Descriptors that the runtime watches.
#![expect(unsafe_code, reason = "the runtime cannot check that a descriptor stays open")]

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// Watches `fd`, which has to be non-blocking, until the answer is dropped.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor; nothing here replaces it or closes it before the AsyncFd is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}
