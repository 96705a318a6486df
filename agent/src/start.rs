//! `StartContainer`: runs the container's process, and answers when execve has succeeded.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use caisson_agent_api::v1;

use crate::{
    cgroup::Cgroup,
    clock,
    console::complain,
    error::{AgentError, At, chain},
    guest::{Container, Guest, Sandbox, Started, Users},
    launch::{self, Launched},
    process::{Pipes, Process},
    service::blocking,
    stage,
    stage_spec::{FdKind, StageSpec},
};

/// Starts a container; one that has been started answers as it did then.
pub(crate) async fn start(guest: Arc<Guest>, id: &str) -> Result<v1::StartContainerReply, AgentError> {
    let container = guest.container(id)?;
    if let Some(started) = container.begin_start()? {
        return Ok(started.reply);
    }
    let started = run(&guest, &container).await;
    match started {
        Ok(started) => {
            let reply = started.reply.clone();
            container.end_start(Some(started));
            Ok(reply)
        }
        Err(error) => {
            container.end_start(None);
            Err(error)
        }
    }
}

async fn run(guest: &Guest, container: &Arc<Container>) -> Result<Started, AgentError> {
    let namespace = pid_namespace(guest, container)?;
    let users = guest.users();
    let pipes = Pipes::new(&container.stdio)?;
    let (launched, pipes) = blocking({
        let container = Arc::clone(container);
        move || {
            let launched = launch(&container, namespace.as_ref(), users, &pipes)?;
            Ok((launched, pipes))
        }
    })
    .await?;
    let identity = launched.identity.clone();
    let reply = v1::StartContainerReply {
        pid: launched.pid,
        started_at_nanos: clock::real_nanos(),
        uid: identity.uid,
        gid: identity.gid,
        supplemental_gids: identity.groups.clone(),
    };
    let id = container.id.clone();
    // In a PID namespace of its own the kernel kills what is left; in a shared one nobody else would.
    let at_exit = move || {
        if let Err(error) = Cgroup::of(&id).kill() {
            complain(&format!("ending what {id} left behind: {}", chain(&error)));
        }
    };
    let process = Process::supervise(launched, Arc::clone(&container.stdio), pipes, at_exit)?;
    Ok(Started {
        process,
        identity,
        reply,
    })
}

fn launch(
    container: &Container,
    namespace: Option<&OwnedFd>,
    users: Option<Users>,
    pipes: &Pipes,
) -> Result<Launched, AgentError> {
    let spec = StageSpec {
        process: container.process(),
        root: Some(container.root.clone()),
        identity: None,
        users: users.as_ref().map(|users| users.mapping.clone()),
    };
    let cgroup = container.cgroup.open()?;
    let mut fds: Vec<_> = pipes.theirs().collect();
    fds.push((FdKind::Cgroup, cgroup.as_fd()));
    if let Some(namespace) = namespace {
        fds.push((FdKind::PidNamespace, namespace.as_fd()));
    }
    if let Some(users) = &users {
        fds.push((FdKind::UserNamespace, users.namespace.as_fd()));
    }
    launch::launch(stage::ARGUMENT, &spec, &fds)
}

/// A pidfd whose PID namespace is to be joined, if it is not to be a new one.
fn pid_namespace(guest: &Guest, container: &Container) -> Result<Option<OwnedFd>, AgentError> {
    let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().at(|| "copying a pidfd").map(Some);
    match container.spec.pid_namespace() {
        // A new one, or the agent's: the root specification says which.
        v1::PidNamespace::PidContainer | v1::PidNamespace::PidNode => Ok(None),
        v1::PidNamespace::PidTarget => {
            let target = guest
                .container(&container.spec.target_container_id)?
                .started()?
                .process;
            copy(&target.pidfd())
        }
        v1::PidNamespace::PidPod => {
            let reaper = match &*guest.sandbox() {
                Sandbox::Configured(configured) => configured.pod_reaper.clone(),
                Sandbox::Blank | Sandbox::Configuring => None,
            };
            let missing = || AgentError::invalid("spec.pid_namespace", "there is no shared PID namespace");
            copy(&*reaper.ok_or_else(missing)?)
        }
    }
}
