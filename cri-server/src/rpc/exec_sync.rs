//! ExecSync: runs a command in a container and answers what it printed; kubelet's exec probes are this.

use std::time::Duration;

use caisson_cri_api::v1;
use caisson_sandbox::spec::ExecSpec;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError, translate::Refusals};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ExecSyncRequest,
) -> Result<v1::ExecSyncResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    let exec = exec(request.cmd, request.timeout)?;
    let output = runtime.sandboxes.exec_sync(container, exec).await?;
    Ok(v1::ExecSyncResponse {
        stdout: output.stdout,
        stderr: output.stderr,
        exit_code: output.exit_code,
    })
}

/// A command has a name, and no argument can hold a NUL byte.
pub(super) fn command(cmd: &[String], refusals: &mut Refusals) {
    refusals.add_if(cmd.first().is_none_or(String::is_empty), "cmd", "is empty");
    refusals.add_if(
        cmd.iter().any(|word| word.contains('\0')),
        "cmd",
        "has a NUL byte in an argument",
    );
}

/// A timeout of zero is none.
fn exec(cmd: Vec<String>, timeout: i64) -> Result<ExecSpec, Refusals> {
    let mut refusals = Refusals::default();
    command(&cmd, &mut refusals);
    let seconds = u64::try_from(timeout).unwrap_or_else(|_| {
        refusals.add("timeout", format!("{timeout} is negative"));
        0
    });
    refusals.settle(ExecSpec {
        args: cmd.into_iter().map(String::into_bytes).collect(),
        timeout: (seconds > 0).then(|| Duration::from_secs(seconds)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_and_its_deadline_are_checked() {
        let spec = exec(vec!["ls".into()], 0).unwrap();
        assert_eq!(spec.timeout, None);
        let spec = exec(vec!["ls".into()], 5).unwrap();
        assert_eq!(spec.timeout, Some(Duration::from_secs(5)));
        assert_eq!(
            exec(vec![], -1).unwrap_err().to_string(),
            "cmd: is empty; timeout: -1 is negative"
        );
    }
}
