//! The agent proper: listens, and hands each verb to the module that does it.
//!
//! A client that goes away drops the handler of its call; so what changes something runs in a task of its own, to its end.

use std::{
    pin::Pin,
    process::ExitCode,
    sync::Arc,
    task::{Context, Poll},
};

use caisson_agent_api::{
    MAX_MESSAGE_BYTES,
    v1::{self, agent_server},
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use tokio::io::{AsyncRead as _, AsyncWrite as _};
use tonic::{Request, Response, Status};

use crate::{
    clock, configure,
    console::complain,
    cpus, create,
    error::{AgentError, At},
    exec,
    guest::Guest,
    hello,
    listen::{Connection, Listener},
    power, release, remove, shared, signal, start, stats, streams, terminal, update, volumes, wait,
};

/// Most threads that wait for the kernel at a time.
const BLOCKING_THREADS: usize = 16;

/// Descriptors that the agent may have open: a session has eight, a forwarded port two.
const DESCRIPTORS: u64 = 1 << 16;

/// Runs the agent; returns when it cannot go on.
pub(crate) fn main(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    // Under HostPID a container would see this process: it must not look into it.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        complain(&format!("hiding the agent: {error}"));
    }
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(512 << 10)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("starting: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        let first = arguments.next();
        let listeners = listeners(first.as_deref(), arguments.next().as_deref())?;
        let kernel_nanos = first.and_then(|nanos| nanos.parse().ok()).unwrap_or(0);
        let guest = Arc::new(Guest::new(kernel_nanos, clock::boot_nanos()));
        serve(guest, listeners).await
    });
    // Work that waits for the kernel is not waited for.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("listening: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// For verbs, stdio, shared volumes, and the power button.
type Listeners = (Listener, Listener, Listener, Listener);

fn vsock_listeners() -> std::io::Result<Listeners> {
    Ok((
        Listener::rpc()?,
        Listener::streams()?,
        Listener::files()?,
        Listener::power()?,
    ))
}

/// A hundred exec sessions need nearly the thousand that the kernel gives PID 1. Containers get limits of their own.
fn raise_descriptor_limit() {
    let now = getrlimit(Resource::Nofile);
    let maximum = now.maximum.map(|maximum| maximum.max(DESCRIPTORS));
    let wanted = |maximum: Option<u64>| Rlimit {
        current: Some(maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS))),
        maximum,
    };
    // Without the right to raise the hard limit, the soft one can still be raised to it.
    if setrlimit(Resource::Nofile, wanted(maximum)).is_err()
        && let Err(error) = setrlimit(Resource::Nofile, wanted(now.maximum))
    {
        complain(&format!("raising the limit of descriptors: {error}"));
    }
}

#[cfg(not(feature = "component-test"))]
fn listeners(_first: Option<&str>, _second: Option<&str>) -> std::io::Result<Listeners> {
    vsock_listeners()
}

#[cfg(feature = "component-test")]
fn listeners(first: Option<&str>, second: Option<&str>) -> std::io::Result<Listeners> {
    match (first, second) {
        (Some("--unix"), Some(path)) => Ok((
            Listener::unix(&format!("{path}.rpc"))?,
            Listener::unix(&format!("{path}.streams"))?,
            Listener::unix(&format!("{path}.files"))?,
            Listener::unix(&format!("{path}.power"))?,
        )),
        _ => vsock_listeners(),
    }
}

/// Returns when the host wants the guest to end, and everything in it has.
async fn serve(guest: Arc<Guest>, (rpc, stream, files, button): Listeners) -> std::io::Result<()> {
    let pressed = Arc::new(tokio::sync::Notify::new());
    let presses = Arc::clone(&pressed);
    let presses = button.run(Arc::new(move |_| presses.notify_one()));
    let service = agent_server::AgentServer::new(Service {
        guest: Arc::clone(&guest),
    })
    .max_decoding_message_size(MAX_MESSAGE_BYTES)
    .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let calls = rpc.run(Arc::new(move |connection| {
        let service = hyper_util::service::TowerToHyperService::new(service.clone());
        let served = hyper::server::conn::http2::Builder::new(Spawner)
            .max_concurrent_streams(256)
            .serve_connection(Io(connection), service);
        // An error is a broken connection: the daemon knows, and comes again.
        tokio::spawn(async move { served.await.is_ok() });
    }));
    let (sharing, ending) = (Arc::clone(&guest), Arc::clone(&guest));
    let copies = stream.run(Arc::new(move |connection| {
        let guest = Arc::clone(&guest);
        tokio::spawn(async move { streams::serve(guest, connection).await.is_ok() });
    }));
    let volumes = files.run(Arc::new(move |connection| {
        let guest = Arc::clone(&sharing);
        tokio::spawn(async move { shared::accept(guest, connection).await.is_ok() });
    }));
    let all = async { tokio::join!(calls, copies, volumes, presses) };
    power::until_pressed(&pressed, &ending, all)
        .await
        .map_err(|()| std::io::Error::other("all listeners ended"))
}

/// Lets hyper start tasks on this runtime.
#[derive(Debug, Clone, Copy)]
struct Spawner;

impl<F> hyper::rt::Executor<F> for Spawner
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        tokio::spawn(future);
    }
}

/// Runs what waits for the kernel on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<T, AgentError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(broken(error)),
    }
}

/// Runs a change to its end, whoever still listens.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, AgentError>> + Send + 'static,
) -> Result<T, AgentError> {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => Err(broken(error)),
    }
}

fn broken(error: tokio::task::JoinError) -> AgentError {
    AgentError::Step {
        step: "running a verb".to_owned(),
        source: std::io::Error::other(error),
    }
}

/// A connection as hyper wants it.
struct Io(Box<dyn Connection>);

impl hyper::rt::Read for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut cursor: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        // Through a buffer of our own, so that no uninitialised memory is touched here.
        let mut bytes = [0; 8192];
        let limit = cursor.remaining().min(bytes.len());
        let mut buffer = tokio::io::ReadBuf::new(&mut bytes[..limit]);
        std::task::ready!(Pin::new(&mut self.0).poll_read(context, &mut buffer))?;
        cursor.put_slice(buffer.filled());
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// The verbs.
struct Service {
    guest: Arc<Guest>,
}

impl Service {
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Guest) -> Result<T, AgentError> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let guest = Arc::clone(&self.guest);
        Ok(Response::new(blocking(move || work(&guest)).await?))
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl agent_server::Agent for Service {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Answer<v1::HelloReply> {
        Ok(Response::new(hello::hello(&self.guest)))
    }

    async fn configure_sandbox(
        &self,
        request: Request<v1::ConfigureSandboxRequest>,
    ) -> Answer<v1::ConfigureSandboxReply> {
        self.change(move |guest| configure::configure(guest, request.into_inner()))
            .await
    }

    async fn put_volume(&self, request: Request<v1::PutVolumeRequest>) -> Answer<v1::PutVolumeReply> {
        self.change(move |guest| volumes::put(guest, request.get_ref()).map(|()| v1::PutVolumeReply {}))
            .await
    }

    async fn remove_volume(
        &self,
        request: Request<v1::RemoveVolumeRequest>,
    ) -> Answer<v1::RemoveVolumeReply> {
        self.change(move |guest| volumes::remove(guest, request.get_ref()).map(|()| v1::RemoveVolumeReply {}))
            .await
    }

    async fn mount_shared(&self, request: Request<v1::MountSharedRequest>) -> Answer<v1::MountSharedReply> {
        let work = shared::mount_session(Arc::clone(&self.guest), request.into_inner());
        to_the_end(work).await?;
        Ok(Response::new(v1::MountSharedReply {}))
    }

    async fn load_apparmor_policy(
        &self,
        request: Request<v1::LoadApparmorPolicyRequest>,
    ) -> Answer<v1::LoadApparmorPolicyReply> {
        self.change(move |guest| {
            guest.apparmor.load(&request.get_ref().policy)?;
            Ok(v1::LoadApparmorPolicyReply {})
        })
        .await
    }

    async fn apparmor_features(
        &self,
        _: Request<v1::ApparmorFeaturesRequest>,
    ) -> Answer<v1::ApparmorFeaturesReply> {
        self.change(|guest| {
            let features = guest.apparmor.features()?;
            Ok(v1::ApparmorFeaturesReply { features })
        })
        .await
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerReply> {
        self.change(move |guest| {
            create::create(guest, request.into_inner()).map(|()| v1::CreateContainerReply {})
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerReply> {
        let guest = Arc::clone(&self.guest);
        let work = async move { start::start(guest, &request.get_ref().container_id).await };
        Ok(Response::new(to_the_end(work).await?))
    }

    async fn wait_container(&self, request: Request<v1::WaitContainerRequest>) -> Answer<v1::ContainerExit> {
        let exit = wait::container(Arc::clone(&self.guest), &request.get_ref().container_id).await?;
        Ok(Response::new(exit))
    }

    async fn signal_container(
        &self,
        request: Request<v1::SignalContainerRequest>,
    ) -> Answer<v1::SignalContainerReply> {
        signal::container(&self.guest, request.get_ref())?;
        Ok(Response::new(v1::SignalContainerReply {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerReply> {
        let guest = Arc::clone(&self.guest);
        to_the_end(async move { remove::remove(guest, &request.get_ref().container_id).await }).await?;
        Ok(Response::new(v1::RemoveContainerReply {}))
    }

    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersReply> {
        Ok(Response::new(wait::list(&self.guest)))
    }

    async fn release_disk(&self, request: Request<v1::ReleaseDiskRequest>) -> Answer<v1::ReleaseDiskReply> {
        self.change(move |guest| release::release(guest, request.get_ref()))
            .await
    }

    async fn online_cpus(&self, request: Request<v1::OnlineCpusRequest>) -> Answer<v1::OnlineCpusReply> {
        self.change(move |_| cpus::online(request.into_inner())).await
    }

    async fn set_clock(&self, request: Request<v1::SetClockRequest>) -> Answer<v1::SetClockReply> {
        self.change(move |_| {
            clock::set_real(request.get_ref().realtime_nanos).at(|| "setting the clock")?;
            Ok(v1::SetClockReply {})
        })
        .await
    }

    async fn update_container(
        &self,
        request: Request<v1::UpdateContainerRequest>,
    ) -> Answer<v1::UpdateContainerReply> {
        self.change(move |guest| update::update(guest, request.into_inner()))
            .await
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Answer<v1::StatsReply> {
        let stats = stats::stats(Arc::clone(&self.guest), request.into_inner()).await?;
        Ok(Response::new(stats))
    }

    async fn start_exec(&self, request: Request<v1::StartExecRequest>) -> Answer<v1::StartExecReply> {
        let work = exec::start(Arc::clone(&self.guest), request.into_inner());
        Ok(Response::new(to_the_end(work).await?))
    }

    async fn wait_exec(&self, request: Request<v1::WaitExecRequest>) -> Answer<v1::ExecExit> {
        Ok(Response::new(
            wait::exec(Arc::clone(&self.guest), request.get_ref()).await?,
        ))
    }

    async fn signal_exec(&self, request: Request<v1::SignalExecRequest>) -> Answer<v1::SignalExecReply> {
        signal::exec(&self.guest, request.get_ref())?;
        Ok(Response::new(v1::SignalExecReply {}))
    }

    async fn remove_exec(&self, request: Request<v1::RemoveExecRequest>) -> Answer<v1::RemoveExecReply> {
        exec::remove(&self.guest, request.get_ref())?;
        Ok(Response::new(v1::RemoveExecReply {}))
    }

    async fn resize_terminal(
        &self,
        request: Request<v1::ResizeTerminalRequest>,
    ) -> Answer<v1::ResizeTerminalReply> {
        terminal::resize(&self.guest, request.get_ref())?;
        Ok(Response::new(v1::ResizeTerminalReply {}))
    }
}
