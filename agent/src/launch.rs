//! The agent's side of starting a stage: hands it its specification and descriptors, and follows its reports until execve.
//!
//! A stage is a fresh, single-threaded execution of this binary, so that whatever it does between fork and execve is ordinary code.
//! Must not know what the stage does. Blocking: belongs on a thread of its own.

use std::{
    io::Write,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    time::Duration,
};

use prost::Message;
use rustix::{
    fs::MemfdFlags,
    net::sockopt::{Timeout, set_socket_timeout},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use crate::{
    error::{AgentError, At},
    handoff,
    stage_spec::{FdKind, Identity, Manifest, Report, ReportKind, StageSpec},
};

/// Longest silence of a stage.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that execve has made what it was meant to be.
#[derive(Debug)]
pub(crate) struct Launched {
    /// In the agent's PID namespace.
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
    /// The controlling side of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    pub(crate) identity: Identity,
}

/// Starts this binary in the role `argument`, and waits until what it became runs.
pub(crate) fn launch(
    argument: &str,
    spec: &StageSpec,
    fds: &[(FdKind, BorrowedFd<'_>)],
) -> Result<Launched, AgentError> {
    let (control, theirs) = handoff::pair().at(|| "making a socket pair")?;
    set_socket_timeout(&control, Timeout::Recv, Some(PATIENCE))
        .at(|| "bounding the wait for the init stage")?;
    let child = Command::new("/proc/self/exe")
        .arg0("caisson-agent")
        .arg(argument)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .at(|| "starting the init stage")?;
    let mut stage = Stage {
        control,
        child: Some(child),
        spawned: None,
        terminal: None,
        identity: None,
    };
    match stage.instruct(spec, fds).and_then(|()| stage.follow()) {
        Ok(()) => stage.finish(),
        Err(error) => {
            stage.abandon();
            Err(error)
        }
    }
}

struct Stage {
    control: OwnedFd,
    child: Option<Child>,
    spawned: Option<(u32, OwnedFd)>,
    terminal: Option<OwnedFd>,
    identity: Option<Identity>,
}

impl Stage {
    fn instruct(&self, spec: &StageSpec, fds: &[(FdKind, BorrowedFd<'_>)]) -> Result<(), AgentError> {
        let memory = rustix::fs::memfd_create("spec", MemfdFlags::CLOEXEC).at(|| "making a memfd")?;
        let mut file = std::fs::File::from(memory);
        file.write_all(&spec.encode_to_vec())
            .at(|| "writing the specification")?;
        let mut kinds = vec![FdKind::Spec.into()];
        let mut attached = vec![file.as_fd()];
        for (kind, fd) in fds {
            kinds.push((*kind).into());
            attached.push(*fd);
        }
        let manifest = Manifest { fds: kinds }.encode_to_vec();
        handoff::send(&self.control, &manifest, &attached).at(|| "instructing the init stage")
    }

    /// Takes reports until the socket closes.
    fn follow(&mut self) -> Result<(), AgentError> {
        loop {
            let Some((bytes, fds)) = handoff::receive(&self.control).at(|| "hearing from the init stage")?
            else {
                return self.closed();
            };
            let report = Report::decode(bytes.as_slice())
                .map_err(std::io::Error::other)
                .at(|| "decoding the init stage's report")?;
            let mut fds = fds.into_iter();
            match (report.kind, fds.next()) {
                (Some(ReportKind::Spawned(pid)), Some(pidfd)) => {
                    self.spawned = Some((pid, pidfd));
                    // The first half has done its work and ends by itself.
                    self.reap_first_half();
                }
                (Some(ReportKind::Terminal(_)), Some(terminal)) => self.terminal = Some(terminal),
                (Some(ReportKind::Identity(identity)), None) => self.identity = Some(identity),
                (Some(ReportKind::Failure(failure)), None) => {
                    return Err(AgentError::Launch {
                        message: failure.message,
                        requested: failure.requested,
                    });
                }
                _ => return Err(silent("the init stage sent a report that makes no sense")),
            }
        }
    }

    /// The socket has closed: by execve, or because the stage died.
    fn closed(&mut self) -> Result<(), AgentError> {
        match (&self.spawned, &self.identity) {
            (Some(_), Some(_)) => Ok(()),
            _ => Err(silent(
                "the init stage ended without a word; see the VM's console",
            )),
        }
    }

    fn finish(self) -> Result<Launched, AgentError> {
        match (self.spawned, self.identity) {
            (Some((pid, pidfd)), Some(identity)) => Ok(Launched {
                pid,
                pidfd,
                terminal: self.terminal,
                identity,
            }),
            _ => Err(silent(
                "the init stage ended without a word; see the VM's console",
            )),
        }
    }

    fn reap_first_half(&mut self) {
        if let Some(mut child) = self.child.take()
            && let Err(error) = child.wait()
        {
            crate::console::complain(&format!("waiting for an init stage: {error}"));
        }
    }

    /// Leaves nothing behind of a stage that failed. Neither half can refuse SIGKILL.
    fn abandon(&mut self) {
        if let Some((_, pidfd)) = self.spawned.take() {
            if pidfd_send_signal(&pidfd, Signal::KILL).is_err() {
                // It has ended by itself already.
            }
            if let Err(error) = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
                crate::console::complain(&format!("waiting for a failed stage: {error}"));
            }
        }
        if let Some(child) = &mut self.child
            && child.kill().is_err()
        {
            // Likewise.
        }
        self.reap_first_half();
    }
}

fn silent(message: &str) -> AgentError {
    AgentError::Launch {
        message: message.to_owned(),
        requested: false,
    }
}
