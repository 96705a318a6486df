//! What the agent knows: the sandbox, its containers and their exec sessions.
//!
//! Locks are held for moments, never over a wait. A slot is reserved before the slow work begins, so that two calls for one id cannot
//! both do it.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_agent_api::v1;

use crate::{
    apparmor::AppArmor,
    cgroup::Cgroup,
    error::AgentError,
    images::Images,
    pod_volumes::PodVolumes,
    process::{Process, Stdio},
    shared::Shared,
    socket_forwards::SocketForwards,
    stage_spec::{Identity, RootSpec},
    stats::Layer,
    volumes::Volumes,
};

/// Most containers at a time.
const MAX_CONTAINERS: usize = 256;

/// Most exec sessions in one container at a time.
const MAX_EXECS: usize = 1024;

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    pub(crate) kernel_nanos: u64,
    pub(crate) listening_nanos: u64,
    pub(crate) sandbox: Mutex<Sandbox>,
    pub(crate) images: Images,
    pub(crate) volumes: Volumes,
    pub(crate) shared: Shared,
    /// Sockets that stand for the host's.
    pub(crate) socket_forwards: SocketForwards,
    pub(crate) pod_volumes: PodVolumes,
    pub(crate) apparmor: AppArmor,
    containers: Mutex<HashMap<String, Slot<Container>>>,
}

/// Whether the VM has its identity.
#[derive(Debug, Default)]
pub(crate) enum Sandbox {
    /// Not yet.
    #[default]
    Blank,
    /// Being given.
    Configuring,
    /// By this request.
    Configured(Box<Configured>),
}

/// A configured sandbox.
#[derive(Debug)]
pub(crate) struct Configured {
    /// Without what differs in every repetition (clock, entropy).
    pub(crate) request: v1::ConfigureSandboxRequest,
    pub(crate) reply: v1::ConfigureSandboxReply,
    /// pidfd of PID 1 of the pod's shared PID namespace.
    pub(crate) pod_reaper: Option<Arc<OwnedFd>>,
    /// The user namespace of the pod's containers.
    pub(crate) user_namespace: Option<Arc<OwnedFd>>,
}

/// The user namespace of a pod's containers, and what is mapped in it.
#[derive(Debug, Clone)]
pub(crate) struct Users {
    pub(crate) namespace: Arc<OwnedFd>,
    pub(crate) mapping: v1::UserNamespace,
}

/// A place in a table.
#[derive(Debug)]
enum Slot<T> {
    Reserved,
    Taken(Arc<T>),
}

/// One container, from CreateContainer to RemoveContainer.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) spec: v1::ContainerSpec,
    pub(crate) root: RootSpec,
    pub(crate) cgroup: Cgroup,
    pub(crate) stdio: Arc<Stdio>,
    /// Where its process writes its last words.
    pub(crate) termination: Option<PathBuf>,
    /// What its writable layer takes.
    pub(crate) layer: Layer,
    /// Its limits as they are now; locked while they change.
    limits: Mutex<v1::Resources>,
    /// What `UpdateContainer` has made of the process's score for the OOM killer.
    score: Mutex<Option<i32>>,
    phase: Mutex<Phase>,
    execs: Mutex<HashMap<String, Slot<Process>>>,
}

#[derive(Debug)]
enum Phase {
    Created,
    Starting,
    Started(Started),
    Removing,
    /// Its removal failed half-way; only another attempt makes sense.
    Damaged,
}

/// What is known of a container once it has been started.
#[derive(Debug, Clone)]
pub(crate) struct Started {
    pub(crate) process: Arc<Process>,
    pub(crate) identity: Identity,
    pub(crate) reply: v1::StartContainerReply,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whatever panicked, the tables are consistent: each change is one insertion or removal.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    /// With the instants of CLOCK_BOOTTIME when PID 1 started and when the agent listened, in nanoseconds.
    pub(crate) fn new(kernel_nanos: u64, listening_nanos: u64) -> Self {
        Self {
            kernel_nanos,
            listening_nanos,
            ..Self::default()
        }
    }

    /// The user namespace of the pod's containers, if they have one.
    pub(crate) fn users(&self) -> Option<Users> {
        match &*self.sandbox() {
            Sandbox::Configured(configured) => Some(Users {
                namespace: Arc::clone(configured.user_namespace.as_ref()?),
                mapping: configured.request.user_namespace.clone()?,
            }),
            Sandbox::Blank | Sandbox::Configuring => None,
        }
    }

    /// The container of this id.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, AgentError> {
        match lock(&self.containers).get(id) {
            Some(Slot::Taken(container)) => Ok(Arc::clone(container)),
            _ => Err(unknown(id)),
        }
    }

    /// Reserves an id; it has to be filled or given back.
    pub(crate) fn reserve(&self, id: &str) -> Result<(), AgentError> {
        reserve(
            &mut lock(&self.containers),
            id,
            "container",
            "containers",
            MAX_CONTAINERS,
        )
    }

    pub(crate) fn fill(&self, container: Container) {
        let id = container.id.clone();
        lock(&self.containers).insert(id, Slot::Taken(Arc::new(container)));
    }

    pub(crate) fn give_back(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        let containers = lock(&self.containers);
        let taken = containers.values().filter_map(|slot| match slot {
            Slot::Taken(container) => Some(Arc::clone(container)),
            Slot::Reserved => None,
        });
        taken.collect()
    }

    pub(crate) fn sandbox(&self) -> MutexGuard<'_, Sandbox> {
        lock(&self.sandbox)
    }

    /// The streams of a container's own process, or of an exec session.
    pub(crate) fn stdio(&self, container: &str, exec: &str) -> Option<Arc<Stdio>> {
        let container = self.container(container).ok()?;
        if exec.is_empty() {
            return Some(Arc::clone(&container.stdio));
        }
        Some(Arc::clone(&container.exec(exec).ok()?.stdio))
    }
}

impl Container {
    pub(crate) fn new(
        id: String,
        spec: v1::ContainerSpec,
        root: RootSpec,
        cgroup: Cgroup,
        termination: Option<PathBuf>,
    ) -> Self {
        let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
        let stdio = Stdio::new(terminal, spec.stdin, spec.stdin_once);
        let limits = Mutex::new(spec.resources.clone().unwrap_or_default());
        Self {
            id,
            spec,
            root,
            cgroup,
            stdio,
            termination,
            layer: Layer::default(),
            limits,
            score: Mutex::default(),
            phase: Mutex::new(Phase::Created),
            execs: Mutex::default(),
        }
    }

    fn wrong(&self, reason: &'static str) -> AgentError {
        AgentError::State {
            what: "container",
            id: self.id.clone(),
            reason,
        }
    }

    /// What was started; an error when nothing was.
    pub(crate) fn started(&self) -> Result<Started, AgentError> {
        match &*lock(&self.phase) {
            Phase::Started(started) => Ok(started.clone()),
            Phase::Created => Err(self.wrong("has not been started")),
            Phase::Starting => Err(self.wrong("is being started")),
            Phase::Removing => Err(self.wrong("is being removed")),
            Phase::Damaged => Err(self.wrong("has been removed in part")),
        }
    }

    /// Begins a start; `Some` when it has been started before.
    pub(crate) fn begin_start(&self) -> Result<Option<Started>, AgentError> {
        let mut phase = lock(&self.phase);
        match &*phase {
            Phase::Created => {
                *phase = Phase::Starting;
                Ok(None)
            }
            Phase::Started(started) => Ok(Some(started.clone())),
            Phase::Starting => Err(self.wrong("is being started")),
            Phase::Removing => Err(self.wrong("is being removed")),
            Phase::Damaged => Err(self.wrong("has been removed in part")),
        }
    }

    /// Ends a start, with what came of it.
    pub(crate) fn end_start(&self, started: Option<Started>) {
        *lock(&self.phase) = started.map_or(Phase::Created, Phase::Started);
    }

    /// Begins the removal; the process is answered if there is one.
    pub(crate) fn begin_remove(&self) -> Result<Option<Arc<Process>>, AgentError> {
        let mut phase = lock(&self.phase);
        let process = match &*phase {
            Phase::Created | Phase::Damaged => None,
            Phase::Started(started) => Some(Arc::clone(&started.process)),
            Phase::Starting => return Err(self.wrong("is being started")),
            Phase::Removing => return Err(self.wrong("is being removed")),
        };
        *phase = Phase::Removing;
        Ok(process)
    }

    /// A removal that failed can be tried again.
    pub(crate) fn undo_remove(&self) {
        *lock(&self.phase) = Phase::Damaged;
    }

    /// Changes its limits. Blocking.
    pub(crate) fn change_limits(&self, wanted: v1::Resources) -> Result<(), AgentError> {
        let mut limits = lock(&self.limits);
        self.cgroup.change(&limits, &wanted)?;
        *limits = wanted;
        Ok(())
    }

    /// Changes the score that processes begin with from now on.
    pub(crate) fn change_score(&self, score: i32) {
        *lock(&self.score) = Some(score);
    }

    /// Its process as it is to be run now.
    pub(crate) fn process(&self) -> Option<v1::Process> {
        let mut process = self.spec.process.clone()?;
        if let Some(score) = *lock(&self.score) {
            process.oom_score_adj = score;
        }
        Some(process)
    }

    pub(crate) fn info(&self) -> v1::ContainerInfo {
        let (phase, pid) = match &*lock(&self.phase) {
            Phase::Started(started) if started.process.ended().is_some() => {
                (v1::ContainerPhase::ContainerExited, started.process.pid)
            }
            Phase::Started(started) => (v1::ContainerPhase::ContainerRunning, started.process.pid),
            Phase::Created | Phase::Starting => (v1::ContainerPhase::ContainerCreated, 0),
            Phase::Removing | Phase::Damaged => (v1::ContainerPhase::ContainerExited, 0),
        };
        v1::ContainerInfo {
            container_id: self.id.clone(),
            phase: phase.into(),
            pid,
            started: match &*lock(&self.phase) {
                Phase::Started(started) => Some(started.reply.clone()),
                _ => None,
            },
            exec_ids: lock(&self.execs).keys().cloned().collect(),
        }
    }

    /// The exec session of this id.
    pub(crate) fn exec(&self, id: &str) -> Result<Arc<Process>, AgentError> {
        match lock(&self.execs).get(id) {
            Some(Slot::Taken(process)) => Ok(Arc::clone(process)),
            _ => Err(AgentError::Unknown {
                what: "exec session",
                id: id.to_owned(),
            }),
        }
    }

    pub(crate) fn reserve_exec(&self, id: &str) -> Result<(), AgentError> {
        reserve(
            &mut lock(&self.execs),
            id,
            "exec session",
            "exec sessions",
            MAX_EXECS,
        )
    }

    pub(crate) fn end_exec(&self, id: &str, process: Option<Arc<Process>>) {
        let mut execs = lock(&self.execs);
        match process {
            Some(process) => execs.insert(id.to_owned(), Slot::Taken(process)),
            None => execs.remove(id),
        };
    }
}

fn reserve<T>(
    table: &mut HashMap<String, Slot<T>>,
    id: &str,
    what: &'static str,
    plural: &'static str,
    limit: usize,
) -> Result<(), AgentError> {
    if table.contains_key(id) {
        return Err(AgentError::Exists {
            what,
            id: id.to_owned(),
        });
    }
    if table.len() >= limit {
        return Err(AgentError::Full { what: plural, limit });
    }
    table.insert(id.to_owned(), Slot::Reserved);
    Ok(())
}

fn unknown(id: &str) -> AgentError {
    AgentError::Unknown {
        what: "container",
        id: id.to_owned(),
    }
}
