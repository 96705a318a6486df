//! An agent behind a hybrid vsock socket that keeps the guest protocol as far as a daemon can tell.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use caisson_agent_api::{
    PROTOCOL, RPC_PORT,
    stream::{Kind, OPEN_HEAD_BYTES, OpenHead, Outcome, Reply},
    v1::{self, agent_server},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Faults;

/// A container as the guest has it.
pub struct FakeContainer {
    pub spec: v1::ContainerSpec,
    pub phase: v1::ContainerPhase,
    pub started: Option<v1::StartContainerReply>,
    pub exec_ids: Vec<String>,
    pub exit: watch::Sender<Option<v1::ContainerExit>>,
    pub output: watch::Sender<Vec<u8>>,
}

/// What the guest knows.
#[derive(Default)]
pub struct Guest {
    pub configured: Mutex<Option<v1::ConfigureSandboxRequest>>,
    pub volumes: Mutex<BTreeMap<String, Vec<v1::VolumeEntry>>>,
    pub containers: Mutex<BTreeMap<String, FakeContainer>>,
    pub signals: Mutex<Vec<u32>>,
    /// AppArmor policies, as they were loaded.
    pub policies: Mutex<Vec<Vec<u8>>>,
    /// Asked to be online; 0: never asked.
    pub cpus: Mutex<u32>,
}

impl Guest {
    /// A container's process ends.
    pub fn exit(&self, id: &str, code: i32, message: Option<&str>) {
        let mut containers = self.containers.lock().unwrap();
        let Some(container) = containers.get_mut(id) else {
            return;
        };
        container.phase = v1::ContainerPhase::ContainerExited;
        container.exit.send_replace(Some(v1::ContainerExit {
            exit_code: code,
            finished_at_nanos: u64::MAX / 4,
            termination_message: message.map(|text| text.as_bytes().to_vec()),
            ..Default::default()
        }));
    }

    /// A container's process prints.
    pub fn print(&self, id: &str, text: &str) {
        let containers = self.containers.lock().unwrap();
        containers[id]
            .output
            .send_modify(|output| output.extend(text.as_bytes()));
    }
}

/// Serves until dropped.
pub fn serve(socket: &Path, guest: Arc<Guest>, faults: Arc<Faults>) -> JoinSet<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let mut tasks = JoinSet::new();
    let (rpc, incoming) = mpsc::channel::<Result<UnixStream, std::io::Error>>(8);
    let verbs = Verbs {
        guest: guest.clone(),
        faults,
    };
    tasks.spawn(async move {
        let service = agent_server::AgentServer::new(verbs)
            .max_decoding_message_size(caisson_agent_api::MAX_MESSAGE_BYTES);
        let server = tonic::transport::Server::builder().add_service(service);
        server
            .serve_with_incoming(ReceiverStream::new(incoming))
            .await
            .unwrap();
    });
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(connection(stream, rpc.clone(), guest.clone()));
        }
    });
    tasks
}

async fn connection(
    mut stream: UnixStream,
    rpc: mpsc::Sender<Result<UnixStream, std::io::Error>>,
    guest: Arc<Guest>,
) {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        line.push(byte);
    }
    let line = String::from_utf8(line).unwrap();
    let port: u32 = line.trim().strip_prefix("CONNECT ").unwrap().parse().unwrap();
    if stream.write_all(b"OK 1\n").await.is_err() {
        return;
    }
    if port != RPC_PORT {
        return output(stream, &guest).await;
    }
    // Through a pair, so that the VM's end ends the connection.
    let (mut inner, server) = UnixStream::pair().unwrap();
    if rpc.send(Ok(server)).await.is_ok() {
        let _ended = tokio::io::copy_bidirectional(&mut stream, &mut inner).await;
    }
}

async fn output(mut stream: UnixStream, guest: &Guest) {
    let mut head = [0; OPEN_HEAD_BYTES];
    stream.read_exact(&mut head).await.unwrap();
    let head = OpenHead::decode(head).unwrap();
    let mut ids = vec![0; head.ids_len()];
    stream.read_exact(&mut ids).await.unwrap();
    let open = head.with_ids(&ids).unwrap();
    let known = guest
        .containers
        .lock()
        .unwrap()
        .get(&open.container_id)
        .map(|container| (container.output.subscribe(), container.exit.subscribe()));
    let outcome = if known.is_some() {
        Outcome::Accepted
    } else {
        Outcome::NotFound
    };
    if stream
        .write_all(
            &Reply {
                outcome,
                offset: open.offset,
            }
            .encode(),
        )
        .await
        .is_err()
    {
        return;
    }
    let Some((mut bytes, mut exit)) = known else {
        return;
    };
    let (mut acks, mut out) = stream.into_split();
    let send = async {
        let mut at = usize::try_from(open.offset).unwrap();
        loop {
            let ended = exit.borrow_and_update().is_some();
            let new = bytes.borrow_and_update().get(at..).unwrap_or_default().to_vec();
            if open.kind == Kind::Stdout && !new.is_empty() {
                at += new.len();
                let mut frame = u32::try_from(new.len()).unwrap().to_le_bytes().to_vec();
                frame.extend(new);
                if out.write_all(&frame).await.is_err() {
                    return;
                }
            } else if ended {
                let _sent = out.write_all(&[0; 4]).await;
                return std::future::pending().await;
            } else {
                tokio::select! {
                    changed = bytes.changed() => if changed.is_err() { return },
                    changed = exit.changed() => if changed.is_err() { return },
                }
            }
        }
    };
    let drain = async { while acks.read_u64_le().await.is_ok() {} };
    tokio::select! {
        () = send => {}
        () = drain => {}
    }
}

struct Verbs {
    guest: Arc<Guest>,
    faults: Arc<Faults>,
}

impl Verbs {
    /// Fails or hangs when told to.
    async fn enter(&self, verb: &'static str) -> Result<(), Status> {
        self.faults.note(verb);
        if self.faults.is(&format!("{verb} hangs")) || self.faults.is("agent hangs") {
            return std::future::pending().await;
        }
        if self.faults.is(verb) {
            return Err(Status::internal(format!("{verb} was told to fail")));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl agent_server::Agent for Verbs {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        self.enter("Hello").await?;
        Ok(Response::new(v1::HelloReply {
            protocol: PROTOCOL,
            agent_version: "fake".into(),
            kernel_nanos: 7,
            ..Default::default()
        }))
    }
    async fn configure_sandbox(
        &self,
        request: Request<v1::ConfigureSandboxRequest>,
    ) -> Result<Response<v1::ConfigureSandboxReply>, Status> {
        self.enter("ConfigureSandbox").await?;
        *self.guest.configured.lock().unwrap() = Some(request.into_inner());
        Ok(Response::new(v1::ConfigureSandboxReply { network_nanos: 9 }))
    }
    async fn put_volume(
        &self,
        request: Request<v1::PutVolumeRequest>,
    ) -> Result<Response<v1::PutVolumeReply>, Status> {
        self.enter("PutVolume").await?;
        let request = request.into_inner();
        self.guest
            .volumes
            .lock()
            .unwrap()
            .insert(request.volume_id, request.entries);
        Ok(Response::new(v1::PutVolumeReply {}))
    }
    async fn load_apparmor_policy(
        &self,
        request: Request<v1::LoadApparmorPolicyRequest>,
    ) -> Result<Response<v1::LoadApparmorPolicyReply>, Status> {
        self.enter("LoadApparmorPolicy").await?;
        self.guest
            .policies
            .lock()
            .unwrap()
            .push(request.into_inner().policy);
        Ok(Response::new(v1::LoadApparmorPolicyReply {}))
    }
    async fn apparmor_features(
        &self,
        _: Request<v1::ApparmorFeaturesRequest>,
    ) -> Result<Response<v1::ApparmorFeaturesReply>, Status> {
        self.enter("ApparmorFeatures").await?;
        let features = include_str!("../../../guest/apparmor/features").into();
        Ok(Response::new(v1::ApparmorFeaturesReply { features }))
    }
    async fn mount_shared(
        &self,
        _: Request<v1::MountSharedRequest>,
    ) -> Result<Response<v1::MountSharedReply>, Status> {
        self.enter("MountShared").await?;
        Ok(Response::new(v1::MountSharedReply {}))
    }
    async fn remove_volume(
        &self,
        request: Request<v1::RemoveVolumeRequest>,
    ) -> Result<Response<v1::RemoveVolumeReply>, Status> {
        self.enter("RemoveVolume").await?;
        self.guest
            .volumes
            .lock()
            .unwrap()
            .remove(&request.into_inner().volume_id);
        Ok(Response::new(v1::RemoveVolumeReply {}))
    }
    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Result<Response<v1::CreateContainerReply>, Status> {
        self.enter("CreateContainer").await?;
        let request = request.into_inner();
        let container = FakeContainer {
            spec: request.spec.unwrap(),
            phase: v1::ContainerPhase::ContainerCreated,
            started: None,
            exec_ids: Vec::new(),
            exit: watch::Sender::new(None),
            output: watch::Sender::new(Vec::new()),
        };
        self.guest
            .containers
            .lock()
            .unwrap()
            .insert(request.container_id, container);
        Ok(Response::new(v1::CreateContainerReply {}))
    }
    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Result<Response<v1::StartContainerReply>, Status> {
        self.enter("StartContainer").await?;
        let mut containers = self.guest.containers.lock().unwrap();
        let container = containers
            .get_mut(&request.into_inner().container_id)
            .ok_or_else(|| Status::not_found("no such container"))?;
        container.phase = v1::ContainerPhase::ContainerRunning;
        let started = v1::StartContainerReply {
            pid: 2,
            started_at_nanos: 1_000_000_000,
            uid: 65534,
            gid: 65534,
            supplemental_gids: vec![1],
        };
        container.started = Some(started.clone());
        Ok(Response::new(started))
    }
    async fn wait_container(
        &self,
        request: Request<v1::WaitContainerRequest>,
    ) -> Result<Response<v1::ContainerExit>, Status> {
        self.enter("WaitContainer").await?;
        let exit = self
            .guest
            .containers
            .lock()
            .unwrap()
            .get(&request.into_inner().container_id)
            .map(|container| container.exit.subscribe());
        let mut exit = exit.ok_or_else(|| Status::not_found("no such container"))?;
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Status::not_found("removed"))?
            .clone();
        Ok(Response::new(exit.unwrap()))
    }
    async fn signal_container(
        &self,
        request: Request<v1::SignalContainerRequest>,
    ) -> Result<Response<v1::SignalContainerReply>, Status> {
        self.enter("SignalContainer").await?;
        let request = request.into_inner();
        self.guest.signals.lock().unwrap().push(request.signal);
        if request.signal == 9 || !self.faults.is("term is ignored") {
            self.guest.exit(
                &request.container_id,
                128 + i32::try_from(request.signal).unwrap(),
                None,
            );
        }
        Ok(Response::new(v1::SignalContainerReply {}))
    }
    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Result<Response<v1::RemoveContainerReply>, Status> {
        self.enter("RemoveContainer").await?;
        match self
            .guest
            .containers
            .lock()
            .unwrap()
            .remove(&request.into_inner().container_id)
        {
            Some(_) => Ok(Response::new(v1::RemoveContainerReply {})),
            None => Err(Status::not_found("no such container")),
        }
    }
    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersReply>, Status> {
        self.enter("ListContainers").await?;
        let containers = self.guest.containers.lock().unwrap();
        let containers = containers
            .iter()
            .map(|(id, container)| v1::ContainerInfo {
                container_id: id.clone(),
                phase: container.phase.into(),
                pid: 2,
                started: container.started.clone(),
                exec_ids: container.exec_ids.clone(),
            })
            .collect();
        Ok(Response::new(v1::ListContainersReply { containers }))
    }
    async fn start_exec(
        &self,
        _: Request<v1::StartExecRequest>,
    ) -> Result<Response<v1::StartExecReply>, Status> {
        self.enter("StartExec").await?;
        Err(Status::internal("exec: \"x\": no such file or directory"))
    }
    async fn wait_exec(&self, _: Request<v1::WaitExecRequest>) -> Result<Response<v1::ExecExit>, Status> {
        Err(Status::unimplemented("WaitExec"))
    }
    async fn signal_exec(
        &self,
        _: Request<v1::SignalExecRequest>,
    ) -> Result<Response<v1::SignalExecReply>, Status> {
        Err(Status::unimplemented("SignalExec"))
    }
    async fn remove_exec(
        &self,
        request: Request<v1::RemoveExecRequest>,
    ) -> Result<Response<v1::RemoveExecReply>, Status> {
        let request = request.into_inner();
        let mut containers = self.guest.containers.lock().unwrap();
        if let Some(container) = containers.get_mut(&request.container_id) {
            container.exec_ids.retain(|id| *id != request.exec_id);
        }
        Ok(Response::new(v1::RemoveExecReply {}))
    }
    async fn release_disk(
        &self,
        _: Request<v1::ReleaseDiskRequest>,
    ) -> Result<Response<v1::ReleaseDiskReply>, Status> {
        self.enter("ReleaseDisk").await?;
        Ok(Response::new(v1::ReleaseDiskReply {}))
    }
    async fn set_clock(
        &self,
        _: Request<v1::SetClockRequest>,
    ) -> Result<Response<v1::SetClockReply>, Status> {
        self.enter("SetClock").await?;
        Ok(Response::new(v1::SetClockReply {}))
    }
    async fn online_cpus(
        &self,
        request: Request<v1::OnlineCpusRequest>,
    ) -> Result<Response<v1::OnlineCpusReply>, Status> {
        self.enter("OnlineCpus").await?;
        let online = request.into_inner().count;
        *self.guest.cpus.lock().unwrap() = online;
        Ok(Response::new(v1::OnlineCpusReply { online }))
    }
    async fn update_container(
        &self,
        request: Request<v1::UpdateContainerRequest>,
    ) -> Result<Response<v1::UpdateContainerReply>, Status> {
        self.enter("UpdateContainer").await?;
        let request = request.into_inner();
        let mut containers = self.guest.containers.lock().unwrap();
        let container = containers
            .get_mut(&request.container_id)
            .ok_or_else(|| Status::not_found("no such container"))?;
        container.spec.resources = request.resources;
        Ok(Response::new(v1::UpdateContainerReply {}))
    }
    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsReply>, Status> {
        self.enter("Stats").await?;
        let wanted = request.into_inner().container_ids;
        let cgroup = v1::CgroupStats {
            // A guest whose clock is wrong.
            timestamp_nanos: 1,
            usage_usec: 5,
            ..Default::default()
        };
        let containers = self.guest.containers.lock().unwrap();
        let containers = containers
            .keys()
            .filter(|id| wanted.is_empty() || wanted.contains(id))
            .map(|id| v1::ContainerStats {
                container_id: id.clone(),
                cgroup: Some(cgroup),
                ..Default::default()
            })
            .collect();
        Ok(Response::new(v1::StatsReply {
            pod: Some(cgroup),
            containers,
            interfaces: Vec::new(),
        }))
    }
    async fn resize_terminal(
        &self,
        _: Request<v1::ResizeTerminalRequest>,
    ) -> Result<Response<v1::ResizeTerminalReply>, Status> {
        Err(Status::unimplemented("ResizeTerminal"))
    }
}
