//! `UpdateContainer`: other limits for a container that runs.

use std::fs;

use caisson_agent_api::v1;

use crate::{
    create,
    error::{AgentError, At},
    guest::{Container, Guest},
};

/// Changes limits first and scores then: what fails leaves all limits as they were. Blocking.
pub(crate) fn update(
    guest: &Guest,
    request: v1::UpdateContainerRequest,
) -> Result<v1::UpdateContainerReply, AgentError> {
    let container = guest.container(&request.container_id)?;
    let wanted = request
        .resources
        .ok_or_else(|| AgentError::invalid("resources", "is absent"))?;
    if let Some(score) = request.oom_score_adj {
        create::check_oom_score("oom_score_adj", score)?;
    }
    container.change_limits(wanted)?;
    if let Some(score) = request.oom_score_adj {
        container.change_score(score);
        rescore(&container, score)?;
    }
    Ok(v1::UpdateContainerReply {})
}

/// Gives every process of the container this score; what they start inherits it. A process that is gone by then needs none.
fn rescore(container: &Container, score: i32) -> Result<(), AgentError> {
    for pid in container.cgroup.processes()? {
        match fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
            Ok(()) => {}
            Err(error) if gone(&error) => {}
            Err(error) => return Err(error).at(|| format!("setting oom_score_adj of process {pid}")),
        }
    }
    Ok(())
}

fn gone(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
