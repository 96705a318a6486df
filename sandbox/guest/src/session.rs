//! A command in a container whose streams somebody holds, as long as he holds them.

use bytes::Bytes;
use caisson_agent_api::{stream::Kind, v1};

use crate::{
    GuestClient, GuestError, GuestErrorKind, InputStream,
    exec::{START_LIMIT, Session},
    follow::Follower,
};

/// A running command. When the last of what [`ExecSession::start`] answered is dropped before [`ExecSession::wait`] has answered, the
/// command is killed with its process group; in any case the agent forgets it.
pub struct ExecSession {
    guard: Session,
}

/// What a command prints on one output.
pub struct ExecOutput {
    follower: Follower,
}

/// Everything of a command that has just been started.
pub struct StartedExec {
    /// Its end.
    pub session: ExecSession,
    /// Absent when it was started without.
    pub stdin: Option<InputStream>,
    /// Everything a terminal shows, or standard output.
    pub stdout: ExecOutput,
    /// A terminal has none.
    pub stderr: Option<ExecOutput>,
}

impl ExecSession {
    /// Starts the command; answers after its execve succeeded.
    pub(crate) async fn start(
        client: &GuestClient,
        request: v1::StartExecRequest,
    ) -> Result<StartedExec, GuestError> {
        let guard = Session::new(client, &request.container_id, &request.exec_id);
        let terminal = request.process.as_ref().is_some_and(|process| process.terminal);
        let (container, exec) = (request.container_id.clone(), request.exec_id.clone());
        let wants_stdin = request.stdin;
        if let Err(error) = client.start_exec(request, START_LIMIT).await {
            // What answered has nothing to be cleaned up; what did not may still start.
            if !matches!(
                error.kind(),
                GuestErrorKind::Timeout | GuestErrorKind::Unreachable
            ) {
                guard.disarm();
            }
            return Err(error);
        }
        let stdin = if wants_stdin {
            Some(client.input(&container, &exec).await?)
        } else {
            None
        };
        let output = |kind| ExecOutput {
            follower: Follower::new(client.clone(), &container, &exec, kind, 0),
        };
        Ok(StartedExec {
            session: Self { guard },
            stdin,
            stdout: output(Kind::Stdout),
            stderr: (!terminal).then(|| output(Kind::Stderr)),
        })
    }

    /// Waits for the end; to be called when the outputs have ended, so that none of them is lost.
    pub async fn wait(self) -> Result<v1::ExecExit, GuestError> {
        let exit = self
            .guard
            .client
            .wait_exec(&self.guard.container, &self.guard.exec)
            .await?;
        self.guard.remove(false).await;
        Ok(exit)
    }
}

impl ExecOutput {
    /// The next bytes; `None` at the end. Asking for more says that the bytes before have been taken. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GuestError> {
        let taken = self.follower.offset();
        self.follower.acknowledge(taken).await;
        let piece = self.follower.next().await?;
        if piece.is_none() {
            // The agent may forget the last bytes too.
            self.follower.acknowledge(taken).await;
        }
        Ok(piece.map(|piece| Bytes::from(piece.bytes)))
    }
}
