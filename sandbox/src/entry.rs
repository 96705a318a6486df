//! One container as its pod's actor keeps it, and what is reported about it.

use std::{collections::VecDeque, sync::Arc};

use caisson_guest::logs::ContainerLog;
use caisson_lifecycle::{
    container::{Effect, Event, State, step},
    exit::Exit,
    sizing::VmSize,
};
use tokio::sync::watch;

use crate::{
    ContainerId, SandboxError,
    container::Started,
    guest,
    hooks::Ticket,
    journal::{ContainerPhase, ContainerRecord},
    limits::LimitChange,
    reach::Reached,
    registry::Reply,
    spec::{ContainerSpec, PodLimits},
    view::ContainerState,
};

/// What tasks for containers report.
pub(crate) enum Work {
    Made {
        id: ContainerId,
        made: Made,
    },
    Started {
        id: ContainerId,
        result: Result<Box<Started>, SandboxError>,
    },
    /// Hooks have heard that it runs.
    Announced {
        id: ContainerId,
        reply: Option<Reply<()>>,
    },
    Ended {
        id: ContainerId,
        exit: Exit,
    },
    StopDone {
        id: ContainerId,
        result: Result<(), SandboxError>,
        reply: Reply<()>,
    },
    Removed {
        id: ContainerId,
        /// The ticket is held until nobody sees it any more.
        result: Result<Ticket, SandboxError>,
    },
    Updated {
        id: ContainerId,
        /// The limits that it has now, and the VM's size.
        result: Result<Box<(guest::Resources, VmSize)>, SandboxError>,
    },
    /// The VM has been made large enough for new limits of the pod.
    Resized {
        after: PodLimits,
        cpuset: crate::cpuset::Cpuset,
        result: Result<VmSize, SandboxError>,
        reply: Reply<()>,
    },
    /// The agent of a VM that was silent has answered.
    Reached(Box<Reached>),
    /// A container of such a VM is followed again, unless its log cannot be.
    TakenUp {
        id: ContainerId,
        log: Option<Arc<ContainerLog>>,
    },
    /// It has answered its caller itself.
    Answered,
}

/// How the making of a container ended.
pub(crate) struct Made {
    /// As hooks want it; absent when they do not.
    pub(crate) spec: Option<Box<ContainerSpec>>,
    /// The ticket is held until it is listed.
    pub(crate) result: Result<Ticket, SandboxError>,
}

/// How containers end with their pod.
pub(crate) enum Fate {
    /// The pod was stopped.
    Killed,
    /// The VM ended by itself, for this reason.
    Lost(String),
}

/// A container.
pub(crate) struct Entry {
    pub(crate) record: ContainerRecord,
    pub(crate) state: State,
    pub(crate) log: Option<Arc<ContainerLog>>,
    pub(crate) ended: watch::Sender<bool>,
    pub(crate) stops: usize,
    pub(crate) creating: Vec<Reply<ContainerId>>,
    pub(crate) starting: Option<Reply<()>>,
    pub(crate) removing: Vec<Reply<()>>,
    /// Changes of its limits; the guest works at the first.
    pub(crate) changes: VecDeque<Change>,
}

/// A change of limits and who waits for it.
pub(crate) struct Change {
    pub(crate) change: LimitChange,
    pub(crate) reply: Reply<()>,
}

impl Entry {
    pub(crate) fn new(record: ContainerRecord, state: State) -> Self {
        let ended = matches!(state, State::Exited(_));
        Self {
            record,
            state,
            log: None,
            ended: watch::Sender::new(ended),
            stops: 0,
            creating: Vec::new(),
            starting: None,
            removing: Vec::new(),
            changes: VecDeque::new(),
        }
    }

    pub(crate) fn step(&mut self, event: Event) -> Vec<Effect> {
        let (next, effects) = step(std::mem::replace(&mut self.state, State::Removed), event);
        self.state = next;
        if matches!(self.state.shown(), State::Exited(_)) {
            self.ended.send_replace(true);
        }
        effects
    }

    pub(crate) fn wrong_state(&self, verb: &str) -> SandboxError {
        SandboxError::WrongState {
            what: format!("{verb} container {}", self.record.id.0),
            state: self.state.as_str().into(),
        }
    }
}

/// As it is journaled.
pub(crate) fn phase(state: &State) -> ContainerPhase {
    match state.shown() {
        State::Running { started_at } => ContainerPhase::Running {
            started_at: *started_at,
        },
        State::Exited(exit) => ContainerPhase::Exited(exit.clone()),
        _ => ContainerPhase::Created,
    }
}

/// `None`: nobody knows it yet, or any more.
pub(crate) fn shown(state: &State) -> Option<ContainerState> {
    match state {
        State::Creating | State::Removed | State::Removing { .. } => None,
        State::Created | State::Starting => Some(ContainerState::Created),
        State::Running { started_at } => Some(ContainerState::Running {
            started_at: *started_at,
        }),
        State::Exited(exit) => Some(ContainerState::Exited {
            started_at: exit.started_at,
            finished_at: exit.finished_at,
            exit_code: exit.code,
            reason: exit.reason.as_str().into(),
            message: exit.message.clone(),
        }),
    }
}
