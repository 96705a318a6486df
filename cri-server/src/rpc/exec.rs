//! Exec: a URL where a client talks to a command in a container.

use caisson_cri_api::v1;
use caisson_streaming::{
    Wish,
    port::{Exec, Stdio},
};

use super::{exec_sync::command, service::id};
use crate::{outcome::note, runtime::Runtime, status::RpcError, translate::Refusals};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ExecRequest,
) -> Result<v1::ExecResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    let mut refusals = Refusals::default();
    command(&request.cmd, &mut refusals);
    let stdio = stdio(
        Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        },
        &mut refusals,
    );
    refusals.settle(())?;
    let container = runtime.running_container(container, "run a command in").await?;
    let url = runtime.streaming.url(Wish::Exec(Exec {
        container,
        command: request.cmd,
        stdio,
    }))?;
    Ok(v1::ExecResponse { url })
}

/// What the CRI wants of every session: some stream, and no stderr on a terminal, which has one output.
pub(super) fn stdio(stdio: Stdio, refusals: &mut Refusals) -> Stdio {
    refusals.add_if(
        !(stdio.stdin || stdio.stdout || stdio.stderr),
        "stdin, stdout, stderr",
        "none of them is asked for",
    );
    refusals.add_if(stdio.tty && stdio.stderr, "stderr", "a terminal has none");
    stdio
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_has_a_stream_and_a_terminal_has_no_stderr() {
        let told = |stdin, stderr, tty| {
            let mut refusals = Refusals::default();
            stdio(
                Stdio {
                    stdin,
                    stdout: false,
                    stderr,
                    tty,
                },
                &mut refusals,
            );
            refusals.list().len()
        };
        assert_eq!(told(true, false, true), 0);
        assert_eq!(told(false, false, false), 1);
        assert_eq!(told(false, true, true), 1);
    }
}
