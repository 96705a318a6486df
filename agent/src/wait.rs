//! `WaitContainer`, `WaitExec`, `ListContainers`: how processes ended, and which there are.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    sync::Arc,
};

use caisson_agent_api::v1;

use crate::{
    console::complain,
    error::AgentError,
    flush,
    guest::Guest,
    process::{End, Process},
};

/// Most bytes of a termination message.
const MAX_TERMINATION: u64 = 64 << 10;

async fn end(process: &Process, what: &'static str, id: &str) -> Result<End, AgentError> {
    process.end().await.ok_or_else(|| AgentError::State {
        what,
        id: id.to_owned(),
        reason: "is no longer watched",
    })
}

/// Waits for a container's process and its output.
pub(crate) async fn container(guest: Arc<Guest>, id: &str) -> Result<v1::ContainerExit, AgentError> {
    let container = guest.container(id)?;
    let process = container.started()?.process;
    let end = end(&process, "container", id).await?;
    flush::container(&container).await;
    let oom_killed = end.code != 0 && container.cgroup.oom_kills() > 0;
    Ok(v1::ContainerExit {
        exit_code: end.code,
        signal: end.signal,
        oom_killed,
        finished_at_nanos: end.finished_at_nanos,
        termination_message: container.termination.as_deref().map(last_words),
        stdout_bytes: process.stdio.stdout.written(),
        stderr_bytes: process.stdio.stderr_written(),
        output_cut: end.output_cut,
    })
}

/// The end of the termination file. The file is the agent's, so no link of the container's is followed.
fn last_words(path: &Path) -> Vec<u8> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_TERMINATION)))?;
        let mut bytes = Vec::new();
        file.take(MAX_TERMINATION).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().unwrap_or_else(|error| {
        complain(&format!("reading {}: {error}", path.display()));
        Vec::new()
    })
}

/// Waits for an exec session's process and its output.
pub(crate) async fn exec(
    guest: Arc<Guest>,
    request: &v1::WaitExecRequest,
) -> Result<v1::ExecExit, AgentError> {
    let process = guest.container(&request.container_id)?.exec(&request.exec_id)?;
    let end = end(&process, "exec session", &request.exec_id).await?;
    Ok(v1::ExecExit {
        exit_code: end.code,
        signal: end.signal,
        stdout_bytes: process.stdio.stdout.written(),
        stderr_bytes: process.stdio.stderr_written(),
        output_cut: end.output_cut,
    })
}

/// All containers, by id.
pub(crate) fn list(guest: &Guest) -> v1::ListContainersReply {
    let mut containers: Vec<_> = guest
        .containers()
        .iter()
        .map(|container| container.info())
        .collect();
    containers.sort_by(|one, other| one.container_id.cmp(&other.container_id));
    v1::ListContainersReply { containers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_long_message_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("termination");
        let long = [vec![b'a'; 100_000], b"the end".to_vec()].concat();
        std::fs::write(&path, &long).unwrap();
        let words = last_words(&path);
        assert_eq!(words.len(), 64 << 10);
        assert!(words.ends_with(b"the end"));
    }
}
