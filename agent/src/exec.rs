//! `StartExec` and `RemoveExec`: one more process in a running container.

use std::{os::fd::AsFd, sync::Arc};

use caisson_agent_api::v1;

use crate::{
    cgroup,
    create::{check_process, merge},
    error::{AgentError, At},
    guest::{Container, Guest, Users},
    launch::{self, Launched},
    names,
    process::{Pipes, Process, Stdio},
    service::blocking,
    stage,
    stage_spec::{FdKind, Identity, StageSpec},
};

/// Starts a process; answers when execve has succeeded.
pub(crate) async fn start(
    guest: Arc<Guest>,
    request: v1::StartExecRequest,
) -> Result<v1::StartExecReply, AgentError> {
    names::id("exec_id", &request.exec_id)?;
    let wanted = request
        .process
        .ok_or_else(|| AgentError::invalid("process", "is absent"))?;
    check_process(&wanted)?;
    let container = guest.container(&request.container_id)?;
    container.reserve_exec(&request.exec_id)?;
    match run(&guest, &container, wanted, request.stdin).await {
        Ok(process) => {
            let pid = process.pid;
            container.end_exec(&request.exec_id, Some(process));
            Ok(v1::StartExecReply { pid })
        }
        Err(error) => {
            container.end_exec(&request.exec_id, None);
            Err(error)
        }
    }
}

async fn run(
    guest: &Guest,
    container: &Arc<Container>,
    mut wanted: v1::Process,
    stdin: bool,
) -> Result<Arc<Process>, AgentError> {
    wanted.apparmor = guest.apparmor.resolve(wanted.apparmor.take())?;
    let started = container.started()?;
    if started.process.ended().is_some() {
        return Err(AgentError::State {
            what: "container",
            id: container.id.clone(),
            reason: "is not running",
        });
    }
    // Its own user, as it was resolved then, where the session names none.
    let identity = wanted.user.is_none().then(|| started.identity.clone());
    let own = container.process().unwrap_or_default();
    let process = merge(&own, wanted);
    let stdio = Stdio::new(process.terminal, stdin, true);
    let pipes = Pipes::new(&stdio)?;
    let users = guest.users();
    let (launched, pipes) = blocking(move || {
        let launched = launch(&started.process, process, identity, users, &pipes)?;
        Ok((launched, pipes))
    })
    .await?;
    Process::supervise(launched, stdio, pipes, || ())
}

fn launch(
    container: &Process,
    process: v1::Process,
    identity: Option<Identity>,
    users: Option<Users>,
    pipes: &Pipes,
) -> Result<Launched, AgentError> {
    let spec = StageSpec {
        process: Some(process),
        root: None,
        identity,
        users: users.as_ref().map(|users| users.mapping.clone()),
    };
    let cgroup = cgroup::of_process(container.pid)?;
    let target = container.pidfd().try_clone_to_owned().at(|| "copying a pidfd")?;
    let mut fds: Vec<_> = pipes.theirs().collect();
    fds.push((FdKind::Cgroup, cgroup.as_fd()));
    fds.push((FdKind::Container, target.as_fd()));
    if let Some(users) = &users {
        fds.push((FdKind::UserNamespace, users.namespace.as_fd()));
    }
    launch::launch(stage::ARGUMENT, &spec, &fds)
}

/// Kills the process when it still runs, and forgets it with its streams.
pub(crate) fn remove(guest: &Guest, request: &v1::RemoveExecRequest) -> Result<(), AgentError> {
    let container = guest.container(&request.container_id)?;
    let process = container.exec(&request.exec_id)?;
    if process.ended().is_none() {
        process.kill_group()?;
    }
    process.stdio.abandon();
    container.end_exec(&request.exec_id, None);
    Ok(())
}
