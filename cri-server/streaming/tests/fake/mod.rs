//! Processes and ports that are a few lines each, behind the room's port.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use caisson_streaming::{
    Config, Endpoint, Server,
    port::{Attach, Connection, Exec, Process, Sink, Source, StreamError, Streams, Terminal},
};
use tokio::{sync::mpsc, task::JoinSet};

/// A served fake; ends with the test.
pub(crate) struct Served {
    pub(crate) endpoint: Endpoint,
    pub(crate) world: Arc<World>,
    _server: JoinSet<()>,
}

/// What the fakes have seen.
#[derive(Default)]
pub(crate) struct World {
    /// Processes and connections that are held by sessions.
    pub(crate) alive: AtomicUsize,
    /// Pieces that a flood has got rid of.
    pub(crate) flooded: AtomicUsize,
    /// Pieces that a slow reader has got.
    pub(crate) taken: AtomicUsize,
}

/// Counts what is alive.
struct Alive(Arc<World>);

impl Alive {
    fn new(world: &Arc<World>) -> Self {
        world.alive.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(world))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(crate) async fn serve(config: Config) -> Served {
    let (server, endpoint) = Server::bind(&config).await.unwrap();
    let world = Arc::new(World::default());
    let mut tasks = JoinSet::new();
    tasks.spawn(server.run(Arc::new(Fake(Arc::clone(&world)))));
    Served {
        endpoint,
        world,
        _server: tasks,
    }
}

struct Fake(Arc<World>);

struct From(mpsc::Receiver<Bytes>);

#[async_trait]
impl Source for From {
    async fn next(&mut self) -> Result<Option<Bytes>, StreamError> {
        Ok(self.0.recv().await)
    }
}

/// Dropped when closed.
struct To(Option<mpsc::Sender<Bytes>>);

#[async_trait]
impl Sink for To {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        let gone = || StreamError("nobody reads".into());
        let sender = self.0.as_ref().ok_or_else(gone)?;
        sender.send(bytes).await.map_err(|_| gone())
    }

    async fn close(&mut self) -> Result<(), StreamError> {
        self.0 = None;
        Ok(())
    }
}

struct Sizes(mpsc::Sender<Bytes>);

#[async_trait]
impl Terminal for Sizes {
    async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), StreamError> {
        self.0
            .send(format!("{columns}x{rows}\n").into())
            .await
            .map_err(|_| StreamError("gone".into()))
    }
}

/// Byte `n` of an output.
pub(crate) fn pattern(seed: u8, n: usize) -> u8 {
    seed ^ u8::try_from((n / 7) % 251).unwrap()
}

#[async_trait]
impl Streams for Fake {
    async fn exec(&self, wish: &Exec) -> Result<Process, StreamError> {
        let (stdin, mut input) = mpsc::channel::<Bytes>(1);
        let (output, stdout) = mpsc::channel::<Bytes>(1);
        let (errors, stderr) = mpsc::channel::<Bytes>(1);
        let alive = Alive::new(&self.0);
        let world = Arc::clone(&self.0);
        let words: Vec<String> = wish.command.clone();
        let terminal = output.clone();
        let mut running = JoinSet::new();
        match words[0].as_str() {
            "cat" => {
                running.spawn(async move {
                    while let Some(bytes) = input.recv().await {
                        if output.send(bytes).await.is_err() {
                            break;
                        }
                    }
                    0
                });
            }
            "mix" => {
                let total: usize = words[1].parse().unwrap();
                running.spawn(async move {
                    let (mut done, mut size) = (0, 1);
                    while done < total {
                        let piece = size.min(total - done);
                        for (to, seed) in [(&output, 0x11), (&errors, 0x77)] {
                            let bytes = (done..done + piece).map(|n| pattern(seed, n)).collect::<Vec<_>>();
                            to.send(bytes.into()).await.unwrap();
                        }
                        done += piece;
                        size = size * 3 % 70_001 + 1;
                    }
                    3
                });
            }
            "flood" => {
                running.spawn(async move {
                    while output.send(Bytes::from(vec![0; 32 << 10])).await.is_ok() {
                        world.flooded.fetch_add(1, Ordering::SeqCst);
                    }
                    0
                });
            }
            "slow" => {
                let (kept, _) = (input, world);
                running.spawn(async move {
                    let _kept = kept;
                    std::future::pending().await
                });
            }
            "sip" => {
                running.spawn(async move {
                    while input.recv().await.is_some() {
                        world.taken.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                    }
                    drop(output);
                    0
                });
            }
            "deaf" => {
                drop(input);
                running.spawn(async move {
                    output.send("deaf\n".into()).await.unwrap();
                    0
                });
            }
            "sizes" => {
                running.spawn(async move {
                    let _kept = (output, errors);
                    while input.recv().await.is_some() {}
                    0
                });
            }
            _ => return Err(StreamError("no such program".into())),
        }
        let is_terminal = wish.stdio.tty;
        let terminal = is_terminal.then(|| Box::new(Sizes(terminal)) as Box<dyn Terminal>);
        Ok(Process {
            stdin: Some(Box::new(To(Some(stdin)))),
            stdout: Some(Box::new(From(stdout))),
            stderr: (!is_terminal).then(|| Box::new(From(stderr)) as Box<dyn Source>),
            terminal,
            exit: Box::pin(async move {
                let code = running.join_next().await.unwrap().unwrap();
                drop(alive);
                Ok(code)
            }),
        })
    }

    async fn attach(&self, _: &Attach) -> Result<Process, StreamError> {
        Err(StreamError("nothing to attach to".into()))
    }

    async fn dial(&self, sandbox: &str, port: u16) -> Result<Connection, StreamError> {
        assert_eq!(sandbox, "pod");
        if port == 9 {
            return Err(StreamError("connection refused".into()));
        }
        let (sink, mut input) = mpsc::channel::<Bytes>(1);
        let (output, source) = mpsc::channel::<Bytes>(1);
        let alive = Alive::new(&self.0);
        tokio::spawn(async move {
            let _alive = alive;
            while let Some(bytes) = input.recv().await {
                if output.send(bytes).await.is_err() {
                    return;
                }
            }
            drop(output.send("bye".into()).await);
        });
        Ok(Connection {
            source: Box::new(From(source)),
            sink: Box::new(To(Some(sink))),
        })
    }
}
