//! Serves a disk's queue: each request is done, is on its way in the host's kernel, or waits because the host has no space for it.
//!
//! virtio-blk has no status for "no space", and a guest's file system would take an error for a broken disk. So a write that finds no
//! space waits, and those after it, in order; reads go on. All are tried again every [`RETRY`].

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::timerfd::TimerFd;

use super::{
    Shared,
    disk::Direction,
    job::{Job, Work},
    request::{Geometry, Request, Status},
    ring::Ring,
};
use crate::{
    complaints::Complaints,
    ports::{DeviceEvent, GuestRam},
    virtio::{
        device::{ActiveQueue, Outcome},
        interrupt::Interrupt,
        worker::{Host, Serve, Source},
    },
};

/// How often requests that wait for space are tried again.
pub const RETRY: Duration = Duration::from_millis(500);

const KICK: u64 = 0;
const TIMER: u64 = 1;
const RING: u64 = 2;

/// The thread of a disk.
pub(super) struct Server {
    shared: Arc<Shared>,
    queue: ActiveQueue,
    memory: GuestRam,
    interrupt: Interrupt,
    host: Host,
    /// The driver knows no flushes: every write is one.
    write_through: bool,
    /// Where the host has none, each request is done before the next.
    ring: Option<Ring>,
    /// For space.
    waiting: VecDeque<Job>,
    retry: TimerFd,
    complaints: Complaints,
}

/// What came of work.
enum Done {
    Finished(Status),
    NoSpace,
}

impl Server {
    pub(super) fn new(
        shared: Arc<Shared>,
        queue: ActiveQueue,
        ring: Option<Ring>,
        memory: GuestRam,
        interrupt: Interrupt,
        host: Host,
        write_through: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            ring,
            shared,
            queue,
            memory,
            interrupt,
            host,
            write_through,
            waiting: VecDeque::new(),
            retry: TimerFd::new()?,
            complaints: Complaints::new("block"),
        })
    }

    /// Takes over what waited for space before.
    pub(super) fn go_on_waiting(&mut self, waiting: VecDeque<Job>) {
        self.waiting = waiting;
        if !self.waiting.is_empty() {
            self.retry_later();
        }
    }

    fn retry_later(&mut self) {
        if let Err(e) = self.retry.reset(RETRY, Some(RETRY)) {
            self.complaints.say(format_args!("cannot wait for space: {e}"));
        }
    }

    /// The queue as far as it has been served, and what waits for space.
    pub(super) fn into_parts(self) -> (ActiveQueue, VecDeque<Job>) {
        (self.queue, self.waiting)
    }

    fn serve_queue(&mut self, memory: &Arc<GuestMemoryMmap>) {
        let Self {
            shared,
            queue,
            ring,
            waiting,
            complaints,
            ..
        } = self;
        let writes_through = self.write_through;
        let already = waiting.len();
        queue.serve(memory, &self.interrupt, |head, buffers| {
            let geometry = Geometry {
                capacity: shared.disk.capacity(),
                read_only: shared.read_only,
            };
            let request = Request::parse(buffers, &geometry);
            let Some(job) = request.and_then(|request| Job::new(head, request, memory, &shared.serial))
            else {
                return Outcome::Used(0);
            };
            if !waiting.is_empty() && needs_space(&job.work) {
                waiting.push_back(job);
                return Outcome::Kept;
            }
            let begun = match ring.as_mut() {
                Some(ring) => ring.begin(&shared.disk, job),
                None => Err(job),
            };
            let Err(mut job) = begun else {
                return Outcome::Kept;
            };
            match run(shared, &mut job.work, writes_through, complaints) {
                Done::Finished(status) => Outcome::Used(job.finish(status)),
                Done::NoSpace => {
                    waiting.push_back(job);
                    Outcome::Kept
                }
            }
        });
        if let Some(Err(e)) = ring.as_mut().map(Ring::submit) {
            complaints.say(format_args!("requests are late: {e}"));
        }
        self.begin_to_wait(already);
        // What the host had at hand is done already.
        self.take_completed(memory);
    }

    /// Tells of requests that wait for space, if none did before.
    fn begin_to_wait(&mut self, already: usize) {
        if already > 0 || self.waiting.is_empty() {
            return;
        }
        self.retry_later();
        self.host.events.happened(DeviceEvent::DiskFull {
            disk: self.shared.serial(),
        });
    }

    /// Gives back what the kernel is done with.
    fn take_completed(&mut self, memory: &GuestMemoryMmap) {
        let already = self.waiting.len();
        let mut done = false;
        while let Some((mut job, outcome)) = self.ring.as_mut().and_then(Ring::completed) {
            match self.settle(&mut job, outcome) {
                Done::Finished(status) => {
                    self.queue.give_back(memory, job.head, job.finish(status));
                    done = true;
                }
                Done::NoSpace => self.waiting.push_back(job),
            }
        }
        if done {
            self.queue.notify(memory, &self.interrupt);
        }
        self.begin_to_wait(already);
    }

    /// What became of a job that the kernel has completed; what it left undone is done here.
    fn settle(&mut self, job: &mut Job, outcome: io::Result<usize>) -> Done {
        let undone = match outcome {
            Ok(moved) => job.work.advance(moved),
            Err(e) if is_no_space(&e) && needs_space(&job.work) => return Done::NoSpace,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => true,
            Err(e) => {
                self.complaints
                    .say(format_args!("disk {}: {e}", self.shared.serial()));
                return Done::Finished(Status::Error);
            }
        };
        if undone {
            run(
                &self.shared,
                &mut job.work,
                self.write_through,
                &mut self.complaints,
            )
        } else {
            Done::Finished(Status::Ok)
        }
    }

    /// Tries those that wait for space, in order, until one finds none.
    fn try_again(&mut self, memory: &GuestMemoryMmap) {
        if let Err(e) = self.retry.wait() {
            self.complaints.say(format_args!("cannot read a timer: {e}"));
        }
        let mut done = false;
        while let Some(mut job) = self.waiting.pop_front() {
            match run(
                &self.shared,
                &mut job.work,
                self.write_through,
                &mut self.complaints,
            ) {
                Done::Finished(status) => {
                    self.queue.give_back(memory, job.head, job.finish(status));
                    done = true;
                }
                Done::NoSpace => {
                    self.waiting.push_front(job);
                    break;
                }
            }
        }
        if done {
            self.queue.notify(memory, &self.interrupt);
        }
        if self.waiting.is_empty() {
            if let Err(e) = self.retry.clear() {
                self.complaints.say(format_args!("cannot stop a timer: {e}"));
            }
            self.host.events.happened(DeviceEvent::DiskHasSpace {
                disk: self.shared.serial(),
            });
        }
    }
}

impl Serve for Server {
    fn sources(&self) -> Vec<Source> {
        let mut sources = vec![
            Source::edge(&self.queue.kick, KICK),
            Source::level(&self.retry, TIMER),
        ];
        sources.extend(self.ring.as_ref().map(|ring| Source::level(ring, RING)));
        sources
    }

    fn serve(&mut self, token: u64) -> io::Result<()> {
        let memory = self.memory.memory().into_inner();
        match token {
            TIMER => self.try_again(&memory),
            RING => self.take_completed(&memory),
            _ => self.serve_queue(&memory),
        }
        Ok(())
    }

    fn quiesce(&mut self) {
        // The guest's memory is its own again, and nothing is lost.
        let memory = self.memory.memory().into_inner();
        while self.ring.as_ref().is_some_and(|ring| !ring.is_idle()) {
            if let Some(Err(e)) = self.ring.as_mut().map(Ring::wait) {
                self.complaints.say(format_args!("requests do not end: {e}"));
                break;
            }
            self.take_completed(&memory);
        }
    }
}

fn needs_space(work: &Work) -> bool {
    matches!(work, Work::Write { .. } | Work::Zero(_) | Work::Discard(_))
}

fn run(shared: &Shared, work: &mut Work, write_through: bool, complaints: &mut Complaints) -> Done {
    let disk = &shared.disk;
    let outcome = match work {
        Work::Read { offset, data } => disk.transfer(Direction::FromDisk, *offset, data),
        Work::Write { offset, data } => {
            // What has been written before space ran out is not written again.
            let before = data.len();
            let outcome = disk.transfer(Direction::ToDisk, *offset, data);
            *offset += (before - data.len()) as u64;
            outcome.and_then(|()| if write_through { disk.flush() } else { Ok(()) })
        }
        Work::Flush => disk.flush(),
        Work::Discard(extents) => extents.iter().try_for_each(|extent| disk.discard(extent)),
        Work::Zero(extents) => extents.iter().try_for_each(|extent| disk.zero(extent)),
        Work::Nothing(status) => return Done::Finished(*status),
    };
    match outcome {
        Ok(()) => Done::Finished(Status::Ok),
        Err(e) if is_no_space(&e) && needs_space(work) => Done::NoSpace,
        Err(e) => {
            complaints.say(format_args!("disk {}: {e}", shared.serial()));
            Done::Finished(Status::Error)
        }
    }
}

fn is_no_space(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
