//! The agent's verbs, each with a deadline.

use std::{
    future::Future,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, SystemTime},
};

use caisson_agent_api::{FILES_PORT, PROTOCOL, RPC_PORT, files, stream, v1, v1::agent_client::AgentClient};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};
use tonic::{Response, Status, transport::Channel};

use crate::{
    ExecResult, ExecSession, GuestError, InputStream, OutputStream, PortReader, PortWriter, Reached,
    StartedExec, exec, forward, opening,
    transport::{Backoff, HANDSHAKE, Route},
};

/// How long one Hello may go unanswered while the guest boots.
const HELLO_ATTEMPT: Duration = Duration::from_secs(5);

/// Longest termination message, as the protocol says; a hostile agent's is cut.
const MAX_TERMINATION_MESSAGE: usize = 64 << 10;

/// A connection to the agent of one VM. Cheap to clone; connects again by itself when the transport broke.
#[derive(Debug, Clone)]
pub struct GuestClient {
    route: Route,
    agent: AgentClient<Channel>,
}

impl GuestClient {
    /// Waits until the agent behind this hybrid vsock socket answers Hello, `deadline` at most. The error says how far it got.
    pub async fn connect(vsock: &Path, deadline: Duration) -> Result<(Self, v1::HelloReply), GuestError> {
        let route = Route::new(vsock);
        let client = Self {
            agent: AgentClient::new(route.channel()),
            route: route.clone(),
        };
        let start = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));
        loop {
            let left = || deadline.saturating_sub(start.elapsed());
            let reached = match route.dial(RPC_PORT, left().min(HANDSHAKE)).await {
                Ok(stream) => {
                    route.keep_spare(stream);
                    match client.hello(left().min(HELLO_ATTEMPT)).await {
                        Ok(hello) if hello.protocol == PROTOCOL => return Ok((client, hello)),
                        Ok(_) => return Err(GuestError::Protocol("Hello: another protocol version")),
                        Err(e @ GuestError::Agent { .. }) => return Err(e),
                        Err(_) => Reached::HelloUnanswered,
                    }
                }
                Err(reached) => reached,
            };
            if left().is_zero() {
                return Err(route.unreachable(reached, start));
            }
            // A pause that is cut by the deadline still gets its last attempt's error.
            if timeout(left(), backoff.pause()).await.is_err() {
                return Err(route.unreachable(reached, start));
            }
        }
    }

    /// Each verb below takes the deadline of the whole call.
    pub async fn hello(&self, deadline: Duration) -> Result<v1::HelloReply, GuestError> {
        let mut agent = self.agent.clone();
        bounded("Hello", deadline, agent.hello(v1::HelloRequest {})).await
    }

    /// Gives the VM its identity; repeating the same request is a no-op.
    pub async fn configure_sandbox(
        &self,
        request: v1::ConfigureSandboxRequest,
        deadline: Duration,
    ) -> Result<v1::ConfigureSandboxReply, GuestError> {
        let mut agent = self.agent.clone();
        bounded("ConfigureSandbox", deadline, agent.configure_sandbox(request)).await
    }

    /// Stores a small tree of files in guest memory.
    pub async fn put_volume(
        &self,
        request: v1::PutVolumeRequest,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        bounded("PutVolume", deadline, agent.put_volume(request)).await?;
        Ok(())
    }

    /// Forgets a volume.
    pub async fn remove_volume(&self, volume_id: &str, deadline: Duration) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::RemoveVolumeRequest {
            volume_id: volume_id.to_owned(),
        };
        bounded("RemoveVolume", deadline, agent.remove_volume(request)).await?;
        Ok(())
    }

    /// Makes a connection for FUSE messages of this session. Blocking reads and writes, for another process to inherit.
    pub async fn connect_files(&self, session: u64, deadline: Duration) -> Result<OwnedFd, GuestError> {
        const CONNECT: &str = "connection of shared volumes";
        let start = Instant::now();
        let mut stream = self
            .route
            .dial(FILES_PORT, deadline)
            .await
            .map_err(|reached| self.route.unreachable(reached, start))?;
        let mut answer = [0];
        let greeted = timeout(deadline.saturating_sub(start.elapsed()), async {
            stream.write_all(&session.to_le_bytes()).await?;
            stream.read_exact(&mut answer).await
        });
        match greeted.await {
            Ok(Ok(_)) if answer == [files::TAKEN] => {}
            Ok(_) => return Err(GuestError::Protocol(CONNECT)),
            Err(_) => {
                return Err(GuestError::Deadline {
                    verb: CONNECT,
                    limit: deadline,
                });
            }
        }
        let stream = stream
            .into_std()
            .and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
        stream.map(Into::into).map_err(|_| GuestError::Protocol(CONNECT))
    }

    /// Mounts what is served over the session's connections; the last `forwards` of them are for Unix sockets.
    pub async fn mount_shared(
        &self,
        session: u64,
        connections: u32,
        forwards: u32,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::MountSharedRequest {
            session,
            connections,
            forwards,
        };
        bounded("MountShared", deadline, agent.mount_shared(request)).await?;
        Ok(())
    }

    /// Adds AppArmor profiles to the guest's kernel.
    pub async fn load_apparmor_policy(&self, policy: Vec<u8>, deadline: Duration) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = agent.load_apparmor_policy(v1::LoadApparmorPolicyRequest { policy });
        bounded("LoadApparmorPolicy", deadline, request).await?;
        Ok(())
    }

    /// What AppArmor of the guest's kernel can do, as apparmor_parser reads it.
    pub async fn apparmor_features(&self, deadline: Duration) -> Result<String, GuestError> {
        let mut agent = self.agent.clone();
        let request = agent.apparmor_features(v1::ApparmorFeaturesRequest {});
        Ok(bounded("ApparmorFeatures", deadline, request).await?.features)
    }

    /// Prepares a container; nothing runs yet.
    pub async fn create_container(
        &self,
        id: &str,
        spec: v1::ContainerSpec,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::CreateContainerRequest {
            container_id: id.to_owned(),
            spec: Some(spec),
        };
        bounded("CreateContainer", deadline, agent.create_container(request)).await?;
        Ok(())
    }

    /// Runs the container's process; answers after its execve succeeded.
    pub async fn start_container(
        &self,
        id: &str,
        deadline: Duration,
    ) -> Result<v1::StartContainerReply, GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::StartContainerRequest {
            container_id: id.to_owned(),
        };
        bounded("StartContainer", deadline, agent.start_container(request)).await
    }

    /// Sends a signal to the container's first process, or to `all` of its cgroup.
    pub async fn signal_container(
        &self,
        id: &str,
        signal: u32,
        all: bool,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::SignalContainerRequest {
            container_id: id.to_owned(),
            signal,
            all,
        };
        bounded("SignalContainer", deadline, agent.signal_container(request)).await?;
        Ok(())
    }

    /// Kills what still runs and deletes the container's writable layer.
    pub async fn remove_container(&self, id: &str, deadline: Duration) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        bounded("RemoveContainer", deadline, agent.remove_container(request)).await?;
        Ok(())
    }

    /// Every container the agent knows.
    pub async fn list_containers(&self, deadline: Duration) -> Result<Vec<v1::ContainerInfo>, GuestError> {
        let mut agent = self.agent.clone();
        let request = agent.list_containers(v1::ListContainersRequest {});
        Ok(bounded("ListContainers", deadline, request).await?.containers)
    }

    /// Lets go of a disk, so that the hypervisor can take it away.
    pub async fn release_disk(&self, serial: &str, deadline: Duration) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::ReleaseDiskRequest {
            serial: serial.to_owned(),
        };
        bounded("ReleaseDisk", deadline, agent.release_disk(request)).await?;
        Ok(())
    }

    /// Brings the first `count` CPUs online; answers how many are.
    pub async fn online_cpus(&self, count: u32, deadline: Duration) -> Result<u32, GuestError> {
        let mut agent = self.agent.clone();
        let request = agent.online_cpus(v1::OnlineCpusRequest { count });
        Ok(bounded("OnlineCpus", deadline, request).await?.online)
    }

    /// Sets the guest's time of day.
    pub async fn set_clock(&self, now: SystemTime, deadline: Duration) -> Result<(), GuestError> {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut agent = self.agent.clone();
        let request = v1::SetClockRequest {
            realtime_nanos: u64::try_from(since.as_nanos()).unwrap_or(0),
        };
        bounded("SetClock", deadline, agent.set_clock(request)).await?;
        Ok(())
    }

    /// Changes a container's limits, and its score for the OOM killer when there is one.
    pub async fn update_container(
        &self,
        id: &str,
        resources: v1::Resources,
        oom_score_adj: Option<i32>,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::UpdateContainerRequest {
            container_id: id.to_owned(),
            resources: Some(resources),
            oom_score_adj,
        };
        bounded("UpdateContainer", deadline, agent.update_container(request)).await?;
        Ok(())
    }

    /// What the pod's containers use now; only of these, unless `ids` is empty.
    pub async fn stats(&self, ids: Vec<String>, deadline: Duration) -> Result<v1::StatsReply, GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::StatsRequest { container_ids: ids };
        bounded("Stats", deadline, agent.stats(request)).await
    }

    /// Waits as long as the container runs. An error means that the VM or its agent is gone, or the container is unknown; a broken
    /// transport to a live VM is mended inside.
    pub async fn wait_container(&self, id: &str) -> Result<v1::ContainerExit, GuestError> {
        let mut exit = self
            .repeated("WaitContainer", || {
                let mut agent = self.agent.clone();
                let request = v1::WaitContainerRequest {
                    container_id: id.to_owned(),
                };
                async move { agent.wait_container(request).await }
            })
            .await?;
        if let Some(message) = exit.termination_message.as_mut() {
            message.drain(..message.len().saturating_sub(MAX_TERMINATION_MESSAGE));
        }
        Ok(exit)
    }

    /// Starts one more process in a running container; answers after its execve succeeded.
    pub async fn start_exec(
        &self,
        request: v1::StartExecRequest,
        deadline: Duration,
    ) -> Result<v1::StartExecReply, GuestError> {
        let mut agent = self.agent.clone();
        bounded("StartExec", deadline, agent.start_exec(request)).await
    }

    /// As [`GuestClient::wait_container`].
    pub async fn wait_exec(&self, container: &str, exec: &str) -> Result<v1::ExecExit, GuestError> {
        self.repeated("WaitExec", || {
            let mut agent = self.agent.clone();
            let request = v1::WaitExecRequest {
                container_id: container.to_owned(),
                exec_id: exec.to_owned(),
            };
            async move { agent.wait_exec(request).await }
        })
        .await
    }

    /// Sends a signal to an exec session's process.
    pub async fn signal_exec(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::SignalExecRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal,
        };
        bounded("SignalExec", deadline, agent.signal_exec(request)).await?;
        Ok(())
    }

    /// Kills an exec session's process when it still runs, and forgets the session.
    pub async fn remove_exec(
        &self,
        container: &str,
        exec: &str,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::RemoveExecRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
        };
        bounded("RemoveExec", deadline, agent.remove_exec(request)).await?;
        Ok(())
    }

    /// Opens an output stream at `offset`; everything below is acknowledged. `exec` is empty for the container's own process.
    pub async fn output(
        &self,
        container: &str,
        exec: &str,
        kind: stream::Kind,
        offset: u64,
    ) -> Result<OutputStream, GuestError> {
        let open = stream::Open {
            kind,
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            offset,
        };
        OutputStream::open(&self.route, &open).await
    }

    /// Sets the size of a terminal, in characters; `exec` is empty for the container's own process.
    pub async fn resize_terminal(
        &self,
        container: &str,
        exec: &str,
        (columns, rows): (u16, u16),
        deadline: Duration,
    ) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = v1::ResizeTerminalRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            columns: columns.into(),
            rows: rows.into(),
        };
        bounded("ResizeTerminal", deadline, agent.resize_terminal(request)).await?;
        Ok(())
    }

    /// Opens a process's stdin; `exec` is empty for the container's own.
    pub async fn input(&self, container: &str, exec: &str) -> Result<InputStream, GuestError> {
        let open = stream::Open {
            kind: stream::Kind::Stdin,
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            offset: 0,
        };
        let (stream, _) = opening::open(&self.route, &open).await?;
        Ok(InputStream::new(stream))
    }

    /// Connects to a TCP port on the pod's loopback address.
    pub async fn forward(&self, port: u16) -> Result<(PortReader, PortWriter), GuestError> {
        let open = stream::Open {
            kind: stream::Kind::Forward,
            container_id: String::new(),
            exec_id: String::new(),
            offset: port.into(),
        };
        let (stream, _) = opening::open(&self.route, &open).await?;
        Ok(forward::split(stream))
    }

    /// Runs one more process whose streams the caller holds; answers after its execve succeeded.
    pub async fn exec_session(&self, request: v1::StartExecRequest) -> Result<StartedExec, GuestError> {
        ExecSession::start(self, request).await
    }

    /// Runs one more process and collects what it prints, `limit` bytes of each output at most (the rest is read and dropped).
    /// When `timeout` passes, the process is killed and [`GuestError::ExecTimeout`] answered. The exec session is always removed.
    pub async fn exec_sync(
        &self,
        request: v1::StartExecRequest,
        timeout: Option<Duration>,
        limit: usize,
    ) -> Result<ExecResult, GuestError> {
        Box::pin(exec::run(self, request, timeout, limit)).await
    }

    /// Calls until there is an answer: a broken transport is mended as long as the VM lives.
    async fn repeated<T, F>(&self, verb: &'static str, call: impl Fn() -> F) -> Result<T, GuestError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        // An agent that drops every call at once must not be asked in a hot loop.
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(2));
        loop {
            match call()
                .await
                .map_err(|status| GuestError::from_status(verb, status))
            {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(GuestError::Transport { source, .. }) => {
                    tracing::debug!(verb, error = %source, "connection to the agent broke; mending");
                }
                Err(e) => return Err(e),
            }
            backoff.pause().await;
            let stream = self.route.mend(RPC_PORT).await?;
            self.route.keep_spare(stream);
        }
    }
}

/// One call with its deadline.
async fn bounded<T>(
    verb: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, GuestError> {
    match timeout(limit, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(GuestError::from_status(verb, status)),
        Err(_) => Err(GuestError::Deadline { verb, limit }),
    }
}
