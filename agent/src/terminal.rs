//! `ResizeTerminal`.

use caisson_agent_api::v1;

use crate::{
    error::{AgentError, At},
    guest::Guest,
};

/// Sets the size of a process's terminal.
pub(crate) fn resize(guest: &Guest, request: &v1::ResizeTerminalRequest) -> Result<(), AgentError> {
    let side = |field: &'static str, value: u32| {
        u16::try_from(value).map_err(|_| AgentError::invalid(field, format!("{value} is over 65535")))
    };
    let (columns, rows) = (side("columns", request.columns)?, side("rows", request.rows)?);
    let container = guest.container(&request.container_id)?;
    let process = if request.exec_id.is_empty() {
        container.started()?.process
    } else {
        container.exec(&request.exec_id)?
    };
    if process
        .resize(columns, rows)
        .at(|| "setting the size of a terminal")?
        || process.ended().is_some()
    {
        return Ok(());
    }
    Err(AgentError::State {
        what: "process of container",
        id: request.container_id.clone(),
        reason: "has no terminal",
    })
}
