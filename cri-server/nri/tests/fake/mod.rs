//! A plugin made of frames, and a node that remembers what it was asked.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    reason = "test support"
)]

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use caisson_nri::{
    Node, Nri, Serving, Settings,
    frame::{Demux, Kind, Lane, Message, encode},
    v1alpha1::{
        ConfigureResponse, Container, ContainerEviction, ContainerUpdate, PodSandbox, RegisterPluginRequest,
        SynchronizeRequest, SynchronizeResponse,
    },
};
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(string, tag = "2")]
    pub method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    #[prost(int32, tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// What a plugin does when it is called.
pub enum Answer {
    Reply(Vec<u8>),
    Fail(i32, &'static str),
    Silence,
    Hangup,
    /// These bytes on the trunk.
    Bytes(Vec<u8>),
}

/// An empty reply, which every message can be.
pub fn fine() -> Answer {
    Answer::Reply(Vec::new())
}

pub fn reply(message: &impl prost::Message) -> Answer {
    Answer::Reply(message.encode_to_vec())
}

pub type Script = Box<dyn FnMut(&str, &[u8]) -> Answer + Send>;

/// What a plugin was asked, in order: method and body.
pub type Calls = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A plugin that is connected.
pub struct Fake {
    pub calls: Calls,
    writer: Arc<tokio::sync::Mutex<OwnedWriteHalf>>,
    answers: mpsc::UnboundedReceiver<(u32, Response)>,
    task: JoinHandle<()>,
    next: u32,
}

async fn send(
    writer: &tokio::sync::Mutex<OwnedWriteHalf>,
    lane: Lane,
    stream: u32,
    kind: Kind,
    body: Vec<u8>,
) {
    let message = Message {
        stream,
        kind,
        body: body.into(),
    };
    let bytes = encode(lane, &message).unwrap();
    // The other end may have hung up, which is what some tests are about.
    drop(writer.lock().await.write_all(&bytes).await);
}

impl Fake {
    /// Connects, without a word.
    pub async fn connect(socket: &Path, mut script: Script) -> Self {
        let (mut reader, writer) = UnixStream::connect(socket).await.unwrap().into_split();
        let writer = Arc::new(tokio::sync::Mutex::new(writer));
        let calls = Arc::<Mutex<Vec<_>>>::default();
        let (told, answers) = mpsc::unbounded_channel();
        let (ours, known) = (writer.clone(), calls.clone());
        let task = tokio::spawn(async move {
            let mut demux = Demux::default();
            let mut buffer = vec![0; 64 << 10];
            while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                demux.push(&buffer[..length]);
                while let Some((lane, message)) = demux.next().unwrap() {
                    if lane == Lane::Runtime {
                        drop(told.send((message.stream, Response::decode(message.body).unwrap())));
                        continue;
                    }
                    let request = Request::decode(message.body).unwrap();
                    let answer = script(&request.method, &request.payload);
                    known.lock().unwrap().push((request.method, request.payload));
                    let response = match answer {
                        Answer::Reply(payload) => Response {
                            status: None,
                            payload,
                        },
                        Answer::Fail(code, words) => Response {
                            status: Some(Status {
                                code,
                                message: words.into(),
                            }),
                            payload: Vec::new(),
                        },
                        Answer::Silence => continue,
                        Answer::Hangup => return drop(ours.lock().await.shutdown().await),
                        Answer::Bytes(bytes) => {
                            drop(ours.lock().await.write_all(&bytes).await);
                            continue;
                        }
                    };
                    send(
                        &ours,
                        Lane::Plugin,
                        message.stream,
                        Kind::Response,
                        response.encode_to_vec(),
                    )
                    .await;
                }
            }
        });
        Self {
            calls,
            writer,
            answers,
            task,
            next: 1,
        }
    }

    /// Connects, registers and waits until it has been synchronized.
    pub async fn join(socket: &Path, index: &str, name: &str, mut script: Script) -> Self {
        let (synchronized, done) = oneshot::channel();
        let mut synchronized = Some(synchronized);
        let mut fake = Self::connect(
            socket,
            Box::new(move |method, payload| match method {
                "Synchronize" => {
                    if !SynchronizeRequest::decode(payload).unwrap().more
                        && let Some(synchronized) = synchronized.take()
                    {
                        assert!(synchronized.send(()).is_ok());
                    }
                    match script(method, payload) {
                        Answer::Reply(payload) if payload.is_empty() => reply(&SynchronizeResponse {
                            more: SynchronizeRequest::decode(payload.as_slice()).unwrap().more,
                            ..Default::default()
                        }),
                        other => other,
                    }
                }
                other => script(other, payload),
            }),
        )
        .await;
        let answer = fake.register(index, name).await;
        assert_eq!(answer.status.unwrap_or_default().code, 0);
        done.await.unwrap();
        fake
    }

    pub async fn register(&mut self, index: &str, name: &str) -> Response {
        let request = RegisterPluginRequest {
            plugin_name: name.into(),
            plugin_idx: index.into(),
            nri_version: "v0.12.0".into(),
        };
        self.call("RegisterPlugin", &request).await.unwrap()
    }

    /// Calls the runtime; `None`: it has hung up.
    pub async fn call(&mut self, method: &str, message: &impl prost::Message) -> Option<Response> {
        let request = Request {
            service: "nri.pkg.api.v1alpha1.Runtime".into(),
            method: method.into(),
            payload: message.encode_to_vec(),
            timeout_nano: 0,
        };
        let stream = self.next;
        self.next += 2;
        send(
            &self.writer,
            Lane::Runtime,
            stream,
            Kind::Request,
            request.encode_to_vec(),
        )
        .await;
        let (answered, response) = self.answers.recv().await?;
        assert_eq!(answered, stream);
        Some(response)
    }

    pub async fn write(&self, bytes: &[u8]) {
        drop(self.writer.lock().await.write_all(bytes).await);
    }

    /// Waits until the runtime has hung up.
    pub async fn hung_up(&mut self) {
        assert!(self.answers.recv().await.is_none());
    }

    pub fn methods(&self) -> Vec<String> {
        let calls = self.calls.lock().unwrap();
        calls.iter().map(|(method, _)| method.clone()).collect()
    }

    /// The methods but for those of the hand-shake.
    pub fn events(&self) -> Vec<String> {
        let mut methods = self.methods();
        methods.retain(|method| method != "Configure" && method != "Synchronize");
        methods
    }

    pub async fn leave(self) {
        drop(self.writer.lock().await.shutdown().await);
        self.task.abort();
    }
}

/// A script that subscribes to `events` and is fine with everything.
pub fn content(events: i32) -> Script {
    Box::new(move |method, _| match method {
        "Configure" => reply(&ConfigureResponse { events }),
        _ => fine(),
    })
}

/// A script for everything but Configure, which subscribes to all.
pub fn scripted(mut script: impl FnMut(&str, &[u8]) -> Answer + Send + 'static) -> Script {
    Box::new(move |method, payload| match method {
        "Configure" => reply(&ConfigureResponse { events: 0 }),
        other => script(other, payload),
    })
}

/// What a node was asked, and what it says there is.
#[derive(Default)]
pub struct FakeNode {
    pub pods: Mutex<Vec<PodSandbox>>,
    pub containers: Mutex<Vec<Container>>,
    pub updates: Mutex<Vec<ContainerUpdate>>,
    pub evicted: Mutex<Vec<String>>,
}

#[async_trait]
impl Node for FakeNode {
    async fn inventory(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        (
            self.pods.lock().unwrap().clone(),
            self.containers.lock().unwrap().clone(),
        )
    }

    async fn update(&self, update: &ContainerUpdate) -> Result<(), String> {
        self.updates.lock().unwrap().push(update.clone());
        if update.container_id == "unknown" {
            return Err("no such container".into());
        }
        Ok(())
    }

    fn evict(&self, eviction: &ContainerEviction) {
        self.evicted.lock().unwrap().push(eviction.container_id.clone());
    }
}

/// NRI on a socket of its own.
pub struct Served {
    pub nri: Arc<Nri>,
    pub node: Arc<FakeNode>,
    pub socket: PathBuf,
    _serving: Serving,
    _dir: tempfile::TempDir,
}

impl Served {
    pub async fn start() -> Self {
        Self::with(Duration::from_secs(30)).await
    }

    pub async fn with(timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nri.sock");
        let node = Arc::<FakeNode>::default();
        let settings = Settings {
            plugin_dir: None,
            plugin_config_dir: dir.path().to_owned(),
            registration_timeout: timeout,
            request_timeout: timeout,
            runtime_name: "caisson".into(),
            runtime_version: "0".into(),
        };
        let nri = Nri::new(settings, node.clone());
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let serving = nri.serve(Some(listener)).await.unwrap();
        Self {
            nri,
            node,
            socket,
            _serving: serving,
            _dir: dir,
        }
    }

    /// Waits until so many plugins are served. Synchronize is answered before a plugin is among them.
    pub async fn plugins(&self, wanted: usize) {
        let wait = async {
            while self.nri.plugins().await != wanted {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait)
            .await
            .unwrap_or_else(|_| panic!("never {wanted} plugins"));
    }

    pub async fn join(&self, index: &str, name: &str, script: Script) -> Fake {
        let before = self.nri.plugins().await;
        let fake = Fake::join(&self.socket, index, name, script).await;
        self.plugins(before + 1).await;
        fake
    }
}

pub fn pod(id: &str) -> PodSandbox {
    PodSandbox {
        id: id.into(),
        name: format!("pod-{id}"),
        ..Default::default()
    }
}

pub fn container(id: &str) -> Container {
    Container {
        id: id.into(),
        pod_sandbox_id: "p".into(),
        name: format!("container-{id}"),
        ..Default::default()
    }
}
