//! What a new daemon does with the pods of an earlier one.
//!
//! ```text
//! record        host and guest say             then
//! booting       (not asked)                    rolled back: processes by their mark, network, files
//! ready         VM runs, agent answers         ready again; containers as the guest has them, logs from their checkpoints
//! ready         VM runs, agent does not        NOTREADY, containers unknown; asked again until it answers (reach.rs); stop kills the VM
//! ready         VM gone (also: host rebooted)  NOTREADY, containers exited
//! stopped                                      listed as before
//! unreadable                                   NOTREADY under its id, kept until somebody removes it
//! ```

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use caisson_hypervisor::Vm;
use caisson_lifecycle::{container as life, exit, sandbox::State};
use tokio::task::JoinSet;

use crate::{
    ContainerId, SandboxError, SandboxId,
    actor::{Actor, Remains},
    boot::while_vm_lives,
    container::{self, Live, Output, discard},
    entry::Entry,
    guest,
    journal::{ContainerPhase, ContainerRecord, KeptImages, PodPhase, PodRecord, blocking},
    reach,
    registry::{Node, Registry},
    spec,
    undo::UndoStack,
};

/// How long the agent of an adopted VM may take to answer.
pub(crate) const RECONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A pod that is to be served again.
struct Recovered {
    record: PodRecord,
    /// False for a record that could not be read: it has no name to reserve.
    named: bool,
    remains: Remains,
}

/// Reads the journal and answers the actors of all pods that are left, entered into the registry and ready to be run.
pub(crate) async fn recover(
    node: &Arc<Node>,
    registry: &Arc<Registry>,
) -> Result<Vec<(Actor, crate::actor::Inbox)>, SandboxError> {
    let journal = node.journal.clone();
    let ids = blocking(move || journal.pods()).await?;
    let mut pods = JoinSet::new();
    for id in ids {
        let node = node.clone();
        pods.spawn(async move { Box::pin(pod(&node, id)).await });
    }
    let mut actors = Vec::new();
    while let Some(recovered) = pods.join_next().await {
        let recovered = recovered
            .map_err(|error| SandboxError::io("recover a pod sandbox")(std::io::Error::other(error)))?;
        let Some(Recovered {
            record,
            named,
            remains,
        }) = recovered
        else {
            continue;
        };
        tracing::info!(sandbox.id = %record.id.0, state = remains.state.as_str(), why = remains.why, "pod sandbox found");
        let (id, identity) = (record.id.clone(), record.spec.identity.clone());
        let weak: Weak<Registry> = Arc::downgrade(registry);
        let (actor, inbox, handle) = Actor::adopt(node.clone(), weak, record, remains);
        registry.adopt(&id, named.then_some(&identity), handle);
        actors.push((actor, inbox));
    }
    Ok(actors)
}

/// `None` when nothing is left of it.
async fn pod(node: &Arc<Node>, id: SandboxId) -> Option<Recovered> {
    let journal = node.journal.clone();
    let read_id = id.clone();
    let read = blocking(move || {
        let record = journal.read_pod(&read_id);
        let kept = journal.kept_images(&read_id, record.is_err());
        Ok((record, journal.read_containers(&read_id), kept))
    });
    let (record, (containers, unreadable), kept) = match read.await {
        Ok((Ok(record), containers, kept)) => (record, containers, kept),
        Ok((Err(error), _, kept)) => {
            tracing::error!(sandbox.id = %id.0, error = %error.chain(), "record kept as it is");
            return Some(unreadable_pod(id, &error, kept));
        }
        Err(error) => {
            tracing::error!(sandbox.id = %id.0, error = %error.chain(), "record not read");
            let nothing_known = KeptImages {
                ids: Vec::new(),
                complete: false,
            };
            return Some(unreadable_pod(id, &error, nothing_known));
        }
    };
    for error in unreadable {
        tracing::error!(sandbox.id = %id.0, error = %error.chain(), "container record kept as it is");
    }
    let mut undo = UndoStack::full(&record);
    let mut remains = match record.phase {
        PodPhase::Booting => {
            let failures = undo.unwind(node, &record, None, true, None).await;
            if failures.is_empty() {
                tracing::info!(sandbox.id = %id.0, "unfinished boot rolled back");
                return None;
            }
            let failures: Vec<_> = failures.iter().map(SandboxError::chain).collect();
            broken(
                node,
                &record,
                containers,
                format!("its boot could not be rolled back: {}", failures.join("; ")),
            )
            .await
        }
        PodPhase::Stopped => Remains {
            state: State::Stopped,
            why: None,
            undo: UndoStack::record(),
            vm: None,
            live: None,
            containers: lost(node, &record, containers, "its pod sandbox was stopped").await,
            kept_images: KeptImages::default(),
        },
        PodPhase::Ready => ready(node, &record, containers).await,
    };
    remains.kept_images = kept;
    Some(Recovered {
        record,
        named: true,
        remains,
    })
}

async fn ready(node: &Arc<Node>, record: &PodRecord, containers: Vec<ContainerRecord>) -> Remains {
    let adopted = match record.vm.clone() {
        Some(vm) => node.hypervisor.adopt(vm).await,
        None => Ok(None),
    };
    let vm: Arc<dyn Vm> = match adopted {
        Ok(Some(vm)) => Arc::from(vm),
        Ok(None) => return broken(node, record, containers, "its VM is gone".into()).await,
        Err(error) => {
            let error = SandboxError::hypervisor("take over its VM")(error);
            return broken(node, record, containers, error.chain()).await;
        }
    };
    let limit = RECONNECT_DEADLINE.min(node.config.boot_deadline);
    let asked = while_vm_lives(&vm, &record.id.0, reach::attempt(&vm, limit));
    let (guest, known) = match Box::pin(asked).await {
        Ok(reached) => reached.into_parts(),
        Err(error @ SandboxError::VmDied { .. }) => {
            return broken(node, record, containers, error.chain()).await;
        }
        // It may still run: nothing can be said of its containers, and stop has something to kill.
        Err(error) => {
            let containers = containers.into_iter().map(as_recorded).collect();
            return Remains {
                state: State::Broken,
                why: Some(error.chain()),
                undo: UndoStack::full(record),
                vm: Some(vm),
                live: None,
                containers,
                kept_images: KeptImages::default(),
            };
        }
    };
    let live = Live::new(node, record, vm.clone(), guest);
    containers
        .iter()
        .for_each(|container| live.disks.resume(&container.id, &container.spec));
    let containers = reconcile(node, record, &live, containers, &known).await;
    let volumes = volumes_of(containers.values());
    live.volumes.resume(&live.guest, &volumes).await;
    Remains {
        state: State::Ready,
        why: None,
        undo: UndoStack::full(record),
        vm: Some(vm),
        live: Some(live),
        containers,
        kept_images: KeptImages::default(),
    }
}

/// What the containers that have not ended have mounted.
pub(crate) fn volumes_of<'a>(containers: impl Iterator<Item = &'a Entry>) -> Vec<spec::HostVolume> {
    containers
        .filter(|entry| !matches!(entry.state, life::State::Exited(_)))
        .flat_map(|entry| entry.record.spec.volumes.iter().cloned())
        .collect()
}

/// Joins what is recorded with what the guest has.
async fn reconcile(
    node: &Arc<Node>,
    pod: &PodRecord,
    live: &Live,
    records: Vec<ContainerRecord>,
    known: &[guest::ContainerInfo],
) -> BTreeMap<ContainerId, Entry> {
    for info in known {
        let id = ContainerId(info.container_id.clone());
        // A record that cannot be read still says that the container is somebody's.
        let ours = records.iter().any(|record| record.id == id) || node.journal.knows_container(&pod.id, &id);
        if !ours {
            tracing::info!(container.id = %id.0, "container of an unfinished creation removed");
            discard(live, &id, &[]).await;
        }
    }
    reach::end_commands(live, known).await;
    let mut entries = BTreeMap::new();
    for mut record in records {
        if join(&mut record, known) {
            remember(node, pod, &record).await;
        }
        let (id, entry) = as_recorded(record);
        entries.insert(id.clone(), resume_log(node, pod, live, &id, entry).await);
    }
    entries
}

/// Brings a record to where the guest has its container; true when that changed it.
pub(crate) fn join(record: &mut ContainerRecord, known: &[guest::ContainerInfo]) -> bool {
    let info = known.iter().find(|info| info.container_id == record.id.0);
    let was = record.phase.clone();
    record.phase = match (was.clone(), info) {
        (ContainerPhase::Exited(exit), _) => ContainerPhase::Exited(exit),
        (_, None) => ContainerPhase::Exited(exit::vm_gone(
            started_at(&was),
            SystemTime::now(),
            "the guest does not know it",
        )),
        (ContainerPhase::Created, Some(info)) => match &info.started {
            None => ContainerPhase::Created,
            // It was started just before the daemon ended.
            Some(started) => {
                record.user = Some(container::user(started));
                ContainerPhase::Running {
                    started_at: container::start_time(started),
                }
            }
        },
        (running, Some(_)) => running,
    };
    record.phase != was
}

async fn resume_log(
    node: &Arc<Node>,
    pod: &PodRecord,
    live: &Live,
    id: &ContainerId,
    mut entry: Entry,
) -> Entry {
    if !matches!(entry.state, life::State::Running { .. }) {
        return entry;
    }
    let spec = &entry.record.spec;
    let output = Output {
        log: spec.log_file(&pod.spec.log_directory),
        checkpoint: node.journal.log_checkpoint(&pod.id, id),
        terminal: spec
            .guest
            .process
            .as_ref()
            .is_some_and(|process| process.terminal),
    };
    match output.copy(live, id).await {
        Ok(log) => entry.log = Some(log),
        Err(error) => tracing::error!(container.id = %id.0, error = %error.chain(), "log does not go on"),
    }
    entry
}

async fn broken(
    node: &Arc<Node>,
    record: &PodRecord,
    containers: Vec<ContainerRecord>,
    why: String,
) -> Remains {
    let containers = lost(node, record, containers, &why).await;
    Remains {
        state: State::Broken,
        why: Some(why),
        undo: UndoStack::full(record),
        vm: None,
        live: None,
        containers,
        kept_images: KeptImages::default(),
    }
}

/// Containers whose VM is gone have ended, with nobody to see it.
async fn lost(
    node: &Arc<Node>,
    pod: &PodRecord,
    records: Vec<ContainerRecord>,
    why: &str,
) -> BTreeMap<ContainerId, Entry> {
    let mut entries = BTreeMap::new();
    for mut record in records {
        if !matches!(record.phase, ContainerPhase::Exited(_)) {
            record.phase =
                ContainerPhase::Exited(exit::vm_gone(started_at(&record.phase), SystemTime::now(), why));
            remember(node, pod, &record).await;
        }
        let (id, entry) = as_recorded(record);
        entries.insert(id, entry);
    }
    entries
}

async fn remember(node: &Arc<Node>, pod: &PodRecord, record: &ContainerRecord) {
    if let Err(error) = node.journal.write_container(&pod.id, record).await {
        tracing::error!(container.id = %record.id.0, error = %error.chain(), "state of the container is not on disk");
    }
}

fn started_at(phase: &ContainerPhase) -> Option<SystemTime> {
    match phase {
        ContainerPhase::Created => None,
        ContainerPhase::Running { started_at } => Some(*started_at),
        ContainerPhase::Exited(exit) => exit.started_at,
    }
}

pub(crate) fn as_recorded(record: ContainerRecord) -> (ContainerId, Entry) {
    let state = match &record.phase {
        ContainerPhase::Created => life::State::Created,
        ContainerPhase::Running { started_at } => life::State::Running {
            started_at: *started_at,
        },
        ContainerPhase::Exited(exit) => life::State::Exited(exit.clone()),
    };
    (record.id.clone(), Entry::new(record, state))
}

fn unreadable_pod(id: SandboxId, error: &SandboxError, kept_images: KeptImages) -> Recovered {
    let identity = spec::PodIdentity {
        name: "unreadable-record".into(),
        namespace: String::new(),
        uid: id.0.clone(),
        attempt: 0,
    };
    let record = PodRecord {
        id,
        spec: spec::PodSpec::unknown(identity),
        created_at: SystemTime::UNIX_EPOCH,
        phase: PodPhase::Booting,
        vm: None,
        ips: Vec::new(),
        cgroup: None,
        size: None,
        ceiling: None,
        file_server: None,
        socket_server: None,
        info: serde_json::Value::Null,
    };
    let remains = Remains {
        state: State::Broken,
        why: Some(error.chain()),
        undo: UndoStack::full(&record),
        vm: None,
        live: None,
        containers: BTreeMap::new(),
        kept_images,
    };
    Recovered {
        record,
        named: false,
        remains,
    }
}
