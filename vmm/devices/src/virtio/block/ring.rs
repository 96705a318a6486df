//! Reads, writes and flushes by io_uring: many at once, without a thread for each.
//!
//! The ring can do nothing else: before it is enabled it is restricted to three operations on the disk's own files, so that it is no way
//! around the thread's system call filter.
#![expect(
    unsafe_code,
    reason = "the kernel reads and writes the guest's memory until a request completes"
)]

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use io_uring::{IoUring, cqueue, opcode, register::Restriction, squeue, types};

use super::{
    disk::Disk,
    job::{Job, Work},
};

/// Requests that are handed to the kernel at once.
const ENTRIES: u32 = 64;

/// Requests on their way: as many as a queue can hold.
const JOBS: u16 = 128;

/// IOSQE_FIXED_FILE: only files that were registered.
const FIXED_FILE: u8 = 1;

/// A ring for one disk.
pub(super) struct Ring {
    ring: IoUring,
    /// By their number; the kernel may use what they point to until they complete.
    jobs: Vec<Option<Job>>,
    free: Vec<u16>,
}

impl Ring {
    /// A ring for the files of a disk, if the host has such a thing and allows it.
    pub(super) fn new(disk: &Disk) -> io::Result<Self> {
        let plain = || {
            IoUring::builder()
                .setup_r_disabled()
                .setup_cqsize(u32::from(JOBS))
                .build(ENTRIES)
        };
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_coop_taskrun()
            .setup_single_issuer()
            .setup_cqsize(u32::from(JOBS))
            .build(ENTRIES)
            // Older kernels know fewer flags.
            .or_else(|_| plain())?;
        let submitter = ring.submitter();
        submitter.register_files(&disk.descriptors())?;
        let mut restrictions = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(FIXED_FILE),
        ];
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            jobs: (0..JOBS).map(|_| None).collect(),
            free: (0..JOBS).rev().collect(),
        })
    }

    /// Begins a job; gives it back if it is none for a ring, or there is no place for it. It reaches the kernel by [`Ring::submit`].
    pub(super) fn begin(&mut self, disk: &Disk, job: Job) -> Result<(), Job> {
        let Some(entry) = entry(disk, &job) else {
            return Err(job);
        };
        let Some(number) = self.free.pop() else {
            return Err(job);
        };
        let entry = entry.user_data(u64::from(number));
        if self.ring.submission().is_full() && self.submit().is_err() {
            self.free.push(number);
            return Err(job);
        }
        // SAFETY: what the entry points to belongs to the job, which stays in `jobs`, unmoved behind its pointers, until the kernel has
        // completed it; `wait_for_all` is called before a ring goes.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match (pushed, self.jobs.get_mut(usize::from(number))) {
            (Ok(()), Some(slot)) => {
                *slot = Some(job);
                Ok(())
            }
            _ => {
                self.free.push(number);
                Err(job)
            }
        }
    }

    /// Hands everything that was begun to the kernel.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// A job that has been completed, and what the kernel says of it: bytes that were moved.
    pub(super) fn completed(&mut self) -> Option<(Job, io::Result<usize>)> {
        loop {
            let completion: cqueue::Entry = self.ring.completion().next()?;
            let number = u16::try_from(completion.user_data()).unwrap_or(JOBS);
            let Some(job) = self.jobs.get_mut(usize::from(number)).and_then(Option::take) else {
                // The kernel completes what was begun, once.
                continue;
            };
            self.free.push(number);
            let outcome = usize::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(-completion.result()));
            return Some((job, outcome));
        }
    }

    /// Is nothing on its way?
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == usize::from(JOBS)
    }

    /// Waits until at least one more job has been completed.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// What the kernel is asked for; nothing for what it is not asked.
fn entry(disk: &Disk, job: &Job) -> Option<squeue::Entry> {
    match &job.work {
        Work::Read { offset, data } | Work::Write { offset, data } => {
            let mut spans = disk.spans(*offset, data.len() as u64);
            let (span, None) = (spans.next()?, spans.next()) else {
                return None;
            };
            let file = types::Fixed(u32::try_from(span.index).ok()?);
            let vectors = data.rest();
            let count = u32::try_from(vectors.len()).ok()?;
            Some(if matches!(job.work, Work::Read { .. }) {
                opcode::Readv::new(file, vectors.as_ptr(), count)
                    .offset(span.offset)
                    .build()
            } else {
                opcode::Writev::new(file, vectors.as_ptr(), count)
                    .offset(span.offset)
                    .build()
            })
        }
        Work::Flush if disk.descriptors().len() == 1 => {
            let flags = types::FsyncFlags::DATASYNC;
            Some(opcode::Fsync::new(types::Fixed(0)).flags(flags).build())
        }
        _ => None,
    }
}

impl Drop for Ring {
    /// The kernel must be done with the guest's memory before it may go.
    fn drop(&mut self) {
        while !self.is_idle() {
            if self.wait().is_err() {
                // It could still write: better keep the memory mapped for good.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            while self.completed().is_some() {}
        }
    }
}

impl AsRawFd for Ring {
    /// Readable while completions wait to be taken.
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_ring_does_nothing_but_read_write_and_flush_its_own_files() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let stranger = types::Fd(file.as_raw_fd());
        let disk = Disk::new(vec![file]).unwrap();
        let mut ring = match Ring::new(&disk) {
            Ok(ring) => ring,
            Err(e) => {
                eprintln!("SKIPPED: no io_uring here: {e}");
                return;
            }
        };
        let own = types::Fixed(0);
        let tries = [
            (opcode::Fsync::new(own).build(), 0),
            (opcode::Fsync::new(stranger).build(), -libc::EACCES),
            (opcode::Fallocate::new(own, 1).build(), -libc::EACCES),
            (
                opcode::OpenAt::new(stranger, c"/".as_ptr()).build(),
                -libc::EACCES,
            ),
            (
                opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
                -libc::EACCES,
            ),
            (opcode::Nop::new().build(), -libc::EACCES),
        ];
        for (entry, answer) in tries {
            // SAFETY: what the entries point to is constant.
            unsafe { ring.ring.submission().push(&entry).unwrap() };
            ring.ring.submit_and_wait(1).unwrap();
            assert_eq!(
                ring.ring.completion().next().unwrap().result(),
                answer,
                "{entry:?}"
            );
        }
        assert!(ring.ring.submitter().unregister_files().is_err());
    }
}
