//! An agent behind a hybrid vsock socket that keeps the guest protocol: bounded buffers, acknowledgements, the newest reader wins.
//! It breaks connections when told to.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "each test binary uses its part"
)]

use std::{
    collections::{HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use caisson_agent_api::{
    OUTPUT_BUFFER_BYTES, PROTOCOL, RPC_PORT, STREAM_PORT,
    stream::{Kind, MAX_FRAME, OPEN_HEAD_BYTES, OpenHead, Outcome, Reply},
    v1::{self, agent_server},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

pub type Key = (String, String, Kind);

/// Absent while the process runs.
pub type Exit = watch::Receiver<Option<v1::ExecExit>>;

/// What the agent keeps of one output.
#[derive(Debug, Default)]
pub struct Output {
    state: Mutex<OutputState>,
    changed: Notify,
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct OutputState {
    /// Offset of the first byte kept.
    base: u64,
    kept: VecDeque<u8>,
    ended: bool,
}

impl Output {
    /// As the process writes: blocks while the buffer is full.
    pub async fn write(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let room = {
                let mut state = self.state.lock().unwrap();
                let room = (OUTPUT_BUFFER_BYTES - state.kept.len()).min(bytes.len());
                state.kept.extend(&bytes[..room]);
                room
            };
            bytes = &bytes[room..];
            if room > 0 {
                self.changed.notify_waiters();
            } else {
                changed.await;
            }
        }
    }

    pub fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_waiters();
    }

    /// Forgets what the daemon has not got: what a broken agent would do.
    pub fn lose(&self, count: usize) {
        let mut state = self.state.lock().unwrap();
        let count = count.min(state.kept.len());
        state.kept.drain(..count);
        state.base += count as u64;
    }

    pub fn unacknowledged(&self) -> usize {
        self.state.lock().unwrap().kept.len()
    }

    fn acknowledge(&self, offset: u64) {
        let mut state = self.state.lock().unwrap();
        let count = offset.saturating_sub(state.base).min(state.kept.len() as u64) as usize;
        state.kept.drain(..count);
        state.base += count as u64;
        drop(state);
        self.changed.notify_waiters();
    }
}

#[derive(Debug, Default)]
pub struct Shared {
    outputs: Mutex<HashMap<Key, Arc<Output>>>,
    /// Break each stream connection after that many more bytes; 0 never.
    pub break_after: AtomicUsize,
    /// Largest frame to send; 0 means the largest there is.
    pub frame: AtomicUsize,
    pub connections: AtomicUsize,
    pub refuse: AtomicBool,
    pub calls: Mutex<Vec<String>>,
    pub exits: Mutex<HashMap<(String, String), Exit>>,
    pub drop_rpc: Notify,
    pub on_exec: Mutex<Option<mpsc::UnboundedSender<v1::StartExecRequest>>>,
}

impl Shared {
    pub fn output(&self, container: &str, exec: &str, kind: Kind) -> Arc<Output> {
        let key = (container.to_owned(), exec.to_owned(), kind);
        Arc::clone(self.outputs.lock().unwrap().entry(key).or_default())
    }
    pub fn called(&self, name: &str) -> usize {
        self.calls
            .lock()
            .unwrap()
            .iter()
            .filter(|c| c.as_str() == name)
            .count()
    }
    fn note(&self, name: &str) {
        self.calls.lock().unwrap().push(name.to_owned());
    }
}

/// The running agent; dropping it is the VM's death (the socket's file stays, as after a kill).
pub struct FakeAgent {
    pub shared: Arc<Shared>,
    pub socket: PathBuf,
    _tasks: JoinSet<()>,
}

impl FakeAgent {
    pub fn start(dir: &Path) -> Self {
        let socket = dir.join("vsock.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let shared = Arc::new(Shared::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&shared)));
        Self {
            shared,
            socket,
            _tasks: tasks,
        }
    }
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    let (rpc, incoming) = mpsc::channel::<Result<UnixStream, std::io::Error>>(8);
    let mut tasks = JoinSet::new();
    let service = agent_server::AgentServer::new(Verbs(Arc::clone(&shared)))
        .max_decoding_message_size(caisson_agent_api::MAX_MESSAGE_BYTES);
    tasks.spawn(async move {
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(ReceiverStream::new(incoming))
            .await
            .unwrap();
    });
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (shared, rpc) = (Arc::clone(&shared), rpc.clone());
        tasks.spawn(async move {
            let mut line = Vec::new();
            loop {
                match stream.read_u8().await {
                    Ok(b'\n') => break,
                    Ok(byte) => line.push(byte),
                    Err(_) => return,
                }
            }
            let line = String::from_utf8(line).unwrap();
            let port: u32 = line.strip_prefix("CONNECT ").unwrap().parse().unwrap();
            if shared.refuse.load(Ordering::SeqCst) {
                return;
            }
            if stream.write_all(b"OK 1073741824\n").await.is_err() {
                return;
            }
            match port {
                RPC_PORT => relay(stream, rpc, shared).await,
                STREAM_PORT => serve_stream(stream, &shared).await,
                other => panic!("port {other}"),
            }
        });
    }
}

/// Puts a cuttable pipe between the client and the gRPC server.
async fn relay(
    mut outer: UnixStream,
    rpc: mpsc::Sender<Result<UnixStream, std::io::Error>>,
    shared: Arc<Shared>,
) {
    let (mut inner, server) = UnixStream::pair().unwrap();
    rpc.send(Ok(server)).await.unwrap();
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut outer, &mut inner) => {}
        () = shared.drop_rpc.notified() => {}
    }
}

async fn serve_stream(mut stream: UnixStream, shared: &Shared) {
    let mut head = [0; OPEN_HEAD_BYTES];
    if stream.read_exact(&mut head).await.is_err() {
        return;
    }
    let head = OpenHead::decode(head).unwrap();
    let mut ids = vec![0; head.ids_len()];
    if stream.read_exact(&mut ids).await.is_err() {
        return;
    }
    let open = head.with_ids(&ids).unwrap();
    shared.connections.fetch_add(1, Ordering::SeqCst);
    let key = (open.container_id, open.exec_id, open.kind);
    let output = shared.outputs.lock().unwrap().get(&key).cloned();
    let answer = match &output {
        None => (Outcome::NotFound, 0),
        Some(output) => {
            output.acknowledge(open.offset);
            let state = output.state.lock().unwrap();
            let end = state.base + state.kept.len() as u64;
            if (state.base..=end).contains(&open.offset) {
                (Outcome::Accepted, open.offset)
            } else {
                (Outcome::OffsetUnavailable, state.base)
            }
        }
    };
    let reply = Reply {
        outcome: answer.0,
        offset: answer.1,
    };
    if stream.write_all(&reply.encode()).await.is_err() || answer.0 != Outcome::Accepted {
        return;
    }
    let output = output.unwrap();
    let generation = output.generation.fetch_add(1, Ordering::SeqCst) + 1;
    output.changed.notify_waiters();
    let (mut reader, mut writer) = stream.split();
    let acks = async {
        while let Ok(offset) = reader.read_u64_le().await {
            output.acknowledge(offset);
        }
    };
    let data = async {
        if send_output(&mut writer, shared, &output, open.offset, generation).await {
            // All sent; the last acknowledgements are still to come.
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = acks => {}
        () = data => {}
    }
}

/// True when the stream was sent to its end.
async fn send_output(
    writer: &mut (impl AsyncWriteExt + Unpin),
    shared: &Shared,
    output: &Output,
    mut at: u64,
    generation: u64,
) -> bool {
    let mut budget = match shared.break_after.load(Ordering::SeqCst) {
        0 => usize::MAX,
        n => n,
    };
    // Each connection brings at least one frame, else there is no progress.
    let longest = (budget / 2).min(MAX_FRAME);
    loop {
        let changed = output.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if output.generation.load(Ordering::SeqCst) != generation {
            return false;
        }
        let frame = match shared.frame.load(Ordering::SeqCst) {
            0 => longest,
            n => n.min(longest),
        };
        let (bytes, ended) = {
            let state = output.state.lock().unwrap();
            let skip = at.saturating_sub(state.base) as usize;
            let bytes: Vec<u8> = state.kept.iter().skip(skip).take(frame).copied().collect();
            (bytes, state.ended)
        };
        if bytes.is_empty() && !ended {
            changed.await;
            continue;
        }
        let mut message = (bytes.len() as u32).to_le_bytes().to_vec();
        message.extend(&bytes);
        let cut = message.len() > budget;
        message.truncate(budget);
        budget -= message.len();
        if writer.write_all(&message).await.is_err() || cut {
            return false;
        }
        if bytes.is_empty() {
            return true;
        }
        at += bytes.len() as u64;
    }
}

struct Verbs(Arc<Shared>);

fn unimplemented<T>(name: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(name))
}

#[tonic::async_trait]
impl agent_server::Agent for Verbs {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        self.0.note("Hello");
        Ok(Response::new(v1::HelloReply {
            protocol: PROTOCOL,
            agent_version: "fake".into(),
            ..Default::default()
        }))
    }
    async fn configure_sandbox(
        &self,
        _: Request<v1::ConfigureSandboxRequest>,
    ) -> Result<Response<v1::ConfigureSandboxReply>, Status> {
        unimplemented("ConfigureSandbox")
    }
    async fn load_apparmor_policy(
        &self,
        _: Request<v1::LoadApparmorPolicyRequest>,
    ) -> Result<Response<v1::LoadApparmorPolicyReply>, Status> {
        unimplemented("LoadApparmorPolicy")
    }
    async fn apparmor_features(
        &self,
        _: Request<v1::ApparmorFeaturesRequest>,
    ) -> Result<Response<v1::ApparmorFeaturesReply>, Status> {
        unimplemented("ApparmorFeatures")
    }
    async fn put_volume(
        &self,
        request: Request<v1::PutVolumeRequest>,
    ) -> Result<Response<v1::PutVolumeReply>, Status> {
        self.0
            .note(&format!("PutVolume {}", request.into_inner().entries.len()));
        Ok(Response::new(v1::PutVolumeReply {}))
    }
    async fn mount_shared(
        &self,
        _: Request<v1::MountSharedRequest>,
    ) -> Result<Response<v1::MountSharedReply>, Status> {
        unimplemented("MountShared")
    }
    async fn remove_volume(
        &self,
        _: Request<v1::RemoveVolumeRequest>,
    ) -> Result<Response<v1::RemoveVolumeReply>, Status> {
        unimplemented("RemoveVolume")
    }
    async fn create_container(
        &self,
        _: Request<v1::CreateContainerRequest>,
    ) -> Result<Response<v1::CreateContainerReply>, Status> {
        Err(Status::invalid_argument("no such disk"))
    }
    async fn start_container(
        &self,
        _: Request<v1::StartContainerRequest>,
    ) -> Result<Response<v1::StartContainerReply>, Status> {
        std::future::pending().await
    }
    async fn wait_container(
        &self,
        _: Request<v1::WaitContainerRequest>,
    ) -> Result<Response<v1::ContainerExit>, Status> {
        self.0.note("WaitContainer");
        if self.0.called("WaitContainer") < 3 {
            self.0.drop_rpc.notify_one();
            return std::future::pending().await;
        }
        Ok(Response::new(v1::ContainerExit {
            exit_code: 7,
            ..Default::default()
        }))
    }
    async fn signal_container(
        &self,
        _: Request<v1::SignalContainerRequest>,
    ) -> Result<Response<v1::SignalContainerReply>, Status> {
        unimplemented("SignalContainer")
    }
    async fn remove_container(
        &self,
        _: Request<v1::RemoveContainerRequest>,
    ) -> Result<Response<v1::RemoveContainerReply>, Status> {
        unimplemented("RemoveContainer")
    }
    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersReply>, Status> {
        unimplemented("ListContainers")
    }
    async fn start_exec(
        &self,
        request: Request<v1::StartExecRequest>,
    ) -> Result<Response<v1::StartExecReply>, Status> {
        self.0.note("StartExec");
        let request = request.into_inner();
        let on_exec = self.0.on_exec.lock().unwrap().clone();
        if let Some(told) = on_exec {
            told.send(request).unwrap();
        }
        Ok(Response::new(v1::StartExecReply { pid: 1 }))
    }
    async fn wait_exec(
        &self,
        request: Request<v1::WaitExecRequest>,
    ) -> Result<Response<v1::ExecExit>, Status> {
        let request = request.into_inner();
        let key = (request.container_id, request.exec_id);
        let exit = self.0.exits.lock().unwrap().get(&key).cloned();
        let mut exit = exit.ok_or_else(|| Status::not_found("no such exec"))?;
        let exit = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(Response::new(exit))
    }
    async fn signal_exec(
        &self,
        request: Request<v1::SignalExecRequest>,
    ) -> Result<Response<v1::SignalExecReply>, Status> {
        self.0
            .note(&format!("SignalExec {}", request.into_inner().signal));
        Ok(Response::new(v1::SignalExecReply {}))
    }
    async fn remove_exec(
        &self,
        _: Request<v1::RemoveExecRequest>,
    ) -> Result<Response<v1::RemoveExecReply>, Status> {
        self.0.note("RemoveExec");
        Ok(Response::new(v1::RemoveExecReply {}))
    }
    async fn release_disk(
        &self,
        _: Request<v1::ReleaseDiskRequest>,
    ) -> Result<Response<v1::ReleaseDiskReply>, Status> {
        unimplemented("ReleaseDisk")
    }
    async fn set_clock(
        &self,
        _: Request<v1::SetClockRequest>,
    ) -> Result<Response<v1::SetClockReply>, Status> {
        unimplemented("SetClock")
    }
    async fn online_cpus(
        &self,
        _: Request<v1::OnlineCpusRequest>,
    ) -> Result<Response<v1::OnlineCpusReply>, Status> {
        unimplemented("OnlineCpus")
    }
    async fn update_container(
        &self,
        _: Request<v1::UpdateContainerRequest>,
    ) -> Result<Response<v1::UpdateContainerReply>, Status> {
        unimplemented("UpdateContainer")
    }
    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsReply>, Status> {
        unimplemented("Stats")
    }
    async fn resize_terminal(
        &self,
        _: Request<v1::ResizeTerminalRequest>,
    ) -> Result<Response<v1::ResizeTerminalReply>, Status> {
        unimplemented("ResizeTerminal")
    }
}
