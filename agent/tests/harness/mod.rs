//! A real agent in namespaces of its own, on an image made of this machine's busybox.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a broken harness is a failed test"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use caisson_agent_api::{
    POWER_PORT, RPC_PORT, STREAM_PORT,
    stream::{self, Kind, Open, Outcome, Reply},
    v1::{self, agent_client::AgentClient},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tonic::transport::{Channel, Endpoint};

/// Bound of every single wait.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Agent {
    pub(crate) client: AgentClient<Channel>,
    sockets: Sockets,
    /// What ends the agent when the test does.
    _host: Box<dyn std::any::Any + Send>,
}

/// How the agent's ports are reached.
#[derive(Debug, Clone)]
pub(crate) enum Sockets {
    /// Files of this name with `.rpc`, `.streams` and `.power`.
    Files(PathBuf),
    /// Ports behind the VM's hybrid vsock socket.
    Hybrid(PathBuf),
}

impl Sockets {
    pub(crate) async fn connect(&self, port: u32) -> std::io::Result<UnixStream> {
        match self {
            Self::Files(path) => {
                let name = match port {
                    RPC_PORT => "rpc",
                    POWER_PORT => "power",
                    _ => "streams",
                };
                UnixStream::connect(path.with_extension(name)).await
            }
            Self::Hybrid(path) => {
                let mut stream = UnixStream::connect(path).await?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
                let mut answer = Vec::new();
                while !answer.ends_with(b"\n") {
                    answer.push(stream.read_u8().await?);
                }
                if answer.starts_with(b"OK ") {
                    Ok(stream)
                } else {
                    Err(std::io::ErrorKind::ConnectionRefused.into())
                }
            }
        }
    }
}

/// Namespaces and a cgroup of this machine with an agent in them.
struct Namespaces {
    child: Child,
    cgroup: PathBuf,
    _dir: tempfile::TempDir,
}

/// Makes a root file system of busybox.
pub(crate) fn make_image(root: &Path) {
    for directory in [
        "bin",
        "etc",
        "lib/x86_64-linux-gnu",
        "lib64",
        "root",
        "seed/deep",
        "home",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    for library in ["libc.so.6", "libresolv.so.2", "libm.so.6"] {
        let from = Path::new("/lib/x86_64-linux-gnu").join(library);
        if from.exists() {
            fs::copy(from, root.join("lib/x86_64-linux-gnu").join(library)).unwrap();
        }
    }
    fs::copy(
        "/lib64/ld-linux-x86-64.so.2",
        root.join("lib64/ld-linux-x86-64.so.2"),
    )
    .unwrap();
    let applets = [
        "sh", "cat", "echo", "sleep", "id", "ls", "mount", "touch", "hostname", "env", "true", "false", "ps",
        "kill", "stty", "tty", "wc", "head", "yes", "mknod", "dd", "pwd", "ip", "date", "tr", "sort", "grep",
        "nslookup", "stat", "nc", "mkdir", "readlink", "chroot",
    ];
    for applet in applets {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/home:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:34:\nadm:x:4:web\n").unwrap();
    fs::write(root.join("seed/deep/file"), "seeded").unwrap();
    fs::write(root.join("bin/not-executable"), "x").unwrap();
    // An image that would like its mounts to land on the machine.
    std::os::unix::fs::symlink("/../../../../../../tmp", root.join("escape")).unwrap();
}

impl Agent {
    /// `None`, with the reason printed, where the machine cannot run containers.
    pub(crate) async fn start() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let hierarchy = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.join("cgroup.controllers").exists());
        let Some(hierarchy) = hierarchy else {
            eprintln!("skipped: no cgroup v2 hierarchy");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        make_image(&dir.path().join("images/busybox"));
        let cgroup = hierarchy.join(format!("caisson-agent-test-{}-{}", std::process::id(), unique()));
        fs::create_dir(&cgroup).unwrap();
        let socket = dir.path().join("agent");
        let script = r#"
            set -e
            mount -t proc proc /proc
            mount -t tmpfs tmpfs /run
            mount -t cgroup2 cgroup2 /sys/fs/cgroup
            "$1" agent --unix "$2"
        "#;
        // The cgroup is entered first, so that it is the root of the new cgroup namespace.
        let enter = r#"echo $$ > "$0/cgroup.procs"; exec unshare --mount --pid --net --uts --ipc --cgroup --fork --kill-child sh -c "$@""#;
        let child = Command::new("setpriv")
            // When this test is killed, nothing stays behind.
            .args(["--pdeathsig", "KILL", "sh", "-c", enter])
            .arg(&cgroup)
            .args([script, "sh"])
            .arg(env!("CARGO_BIN_EXE_caisson-agent"))
            .arg(&socket)
            .env("CAISSON_COMPONENT_IMAGES", dir.path().join("images"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let host = Namespaces {
            child,
            cgroup,
            _dir: dir,
        };
        // A socket file is there a moment before it listens.
        let sockets = Sockets::Files(socket);
        wait_for(async || sockets.connect(RPC_PORT).await.is_ok()).await;
        wait_for(async || sockets.connect(STREAM_PORT).await.is_ok()).await;
        Some(Self::reached_by(sockets, Box::new(host)).await)
    }

    /// An agent that listens already.
    pub(crate) async fn reached_by(sockets: Sockets, host: Box<dyn std::any::Any + Send>) -> Self {
        let rpc = sockets.clone();
        let connect = move |_: http::Uri| {
            let rpc = rpc.clone();
            async move { rpc.connect(RPC_PORT).await.map(hyper_util::rt::TokioIo::new) }
        };
        let channel = Endpoint::from_static("http://agent")
            .connect_with_connector(tower::service_fn(connect))
            .await
            .unwrap();
        Self {
            client: AgentClient::new(channel),
            sockets,
            _host: host,
        }
    }

    /// As `start`, and configured.
    pub(crate) async fn ready() -> Option<Self> {
        let mut agent = Self::start().await?;
        agent.client.configure_sandbox(sandbox()).await.unwrap();
        Some(agent)
    }

    /// Presses the guest's power button.
    pub(crate) async fn press_power(&self) {
        self.sockets.connect(POWER_PORT).await.unwrap();
    }

    /// Waits until nobody listens any more.
    pub(crate) async fn gone(&self) {
        wait_for(async || self.sockets.connect(RPC_PORT).await.is_err()).await;
    }

    pub(crate) async fn create(&mut self, id: &str, spec: v1::ContainerSpec) -> Result<(), tonic::Status> {
        let request = v1::CreateContainerRequest {
            container_id: id.to_owned(),
            spec: Some(spec),
        };
        self.client.create_container(request).await.map(|_| ())
    }

    pub(crate) async fn start_container(
        &mut self,
        id: &str,
    ) -> Result<v1::StartContainerReply, tonic::Status> {
        let request = v1::StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.client
            .start_container(request)
            .await
            .map(tonic::Response::into_inner)
    }

    pub(crate) async fn wait(&mut self, id: &str) -> v1::ContainerExit {
        let request = v1::WaitContainerRequest {
            container_id: id.to_owned(),
        };
        let wait = self.client.wait_container(request);
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap()
            .unwrap()
            .into_inner()
    }

    pub(crate) async fn remove(&mut self, id: &str) {
        let request = v1::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.client.remove_container(request).await.unwrap();
    }

    /// Runs a container to its end; its exit, stdout and stderr.
    pub(crate) async fn run(
        &mut self,
        id: &str,
        spec: v1::ContainerSpec,
    ) -> (v1::ContainerExit, String, String) {
        self.create(id, spec).await.unwrap();
        self.start_container(id).await.unwrap();
        let stdout = self.read_all(id, "", Kind::Stdout).await;
        let stderr = self.read_all(id, "", Kind::Stderr).await;
        let exit = self.wait(id).await;
        self.remove(id).await;
        (exit, text(&stdout), text(&stderr))
    }

    /// Runs a command in a running container; its exit and stdout.
    pub(crate) async fn exec(
        &mut self,
        id: &str,
        exec: &str,
        process: v1::Process,
    ) -> Result<(v1::ExecExit, String), tonic::Status> {
        let request = v1::StartExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: Some(process),
            stdin: false,
        };
        self.client.start_exec(request).await?;
        let stdout = self.read_all(id, exec, Kind::Stdout).await;
        let request = v1::WaitExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
        };
        let wait = self.client.wait_exec(request);
        let exit = tokio::time::timeout(PATIENCE, wait).await.unwrap()?.into_inner();
        Ok((exit, text(&stdout)))
    }

    pub(crate) async fn open(&self, id: &str, exec: &str, kind: Kind, offset: u64) -> (UnixStream, Reply) {
        let mut stream = self.sockets.connect(STREAM_PORT).await.unwrap();
        let open = Open {
            kind,
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            offset,
        };
        stream.write_all(&open.encode().unwrap()).await.unwrap();
        let mut reply = [0; stream::REPLY_BYTES];
        stream.read_exact(&mut reply).await.unwrap();
        (stream, Reply::decode(reply).unwrap())
    }

    /// Stores a volume that is a single file.
    pub(crate) async fn put_file(&mut self, id: &str, content: &str) {
        let request = v1::PutVolumeRequest {
            volume_id: id.into(),
            entries: vec![v1::VolumeEntry {
                mode: 0o644,
                kind: Some(v1::volume_entry::Kind::File(content.as_bytes().to_vec())),
                ..v1::VolumeEntry::default()
            }],
        };
        self.client.put_volume(request).await.unwrap();
    }

    /// Everything that an output has, to its end, acknowledged.
    pub(crate) async fn read_all(&self, id: &str, exec: &str, kind: Kind) -> Vec<u8> {
        let (mut stream, reply) = self.open(id, exec, kind, 0).await;
        if reply.outcome == Outcome::NotFound {
            return Vec::new();
        }
        assert_eq!(reply.outcome, Outcome::Accepted);
        let mut all = Vec::new();
        while let Some(bytes) = frame(&mut stream).await {
            all.extend(bytes);
            stream.write_all(&(all.len() as u64).to_le_bytes()).await.unwrap();
        }
        all
    }
}

/// The next frame; `None` at the end.
pub(crate) async fn frame(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut word = [0; 4];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut word))
        .await
        .unwrap()
        .unwrap();
    let length = stream::frame_len(word).unwrap()?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await.unwrap();
    Some(bytes)
}

/// Reads frames until `until` is in what came.
pub(crate) async fn read_until(stream: &mut UnixStream, until: &str) -> String {
    let mut all = Vec::new();
    while !text(&all).contains(until) {
        all.extend(
            frame(stream)
                .await
                .unwrap_or_else(|| panic!("ended before {until:?}: {:?}", text(&all))),
        );
    }
    text(&all)
}

pub(crate) async fn send_frame(stream: &mut UnixStream, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap();
    stream.write_all(&length.to_le_bytes()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // Its death takes PID 1 of the namespaces along (--kill-child), and that takes everything.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let deadline = std::time::Instant::now() + PATIENCE;
        while remove_cgroups(&self.cgroup).is_err() && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove_cgroups(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?
        .flatten()
        .filter(|entry| entry.path().is_dir())
    {
        remove_cgroups(&entry.path())?;
    }
    fs::remove_dir(path)
}

pub(crate) async fn wait_for(condition: impl AsyncFn() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap();
}

fn unique() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn sandbox() -> v1::ConfigureSandboxRequest {
    v1::ConfigureSandboxRequest {
        sandbox_id: "sandbox".into(),
        hostname: "the-pod".into(),
        dns: Some(v1::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            ..v1::DnsConfig::default()
        }),
        share_pid_namespace: true,
        shm_bytes: 1 << 20,
        ..v1::ConfigureSandboxRequest::default()
    }
}

pub(crate) fn process(args: &[&str]) -> v1::Process {
    let names = [
        "CHOWN",
        "DAC_OVERRIDE",
        "KILL",
        "SETGID",
        "SETUID",
        "NET_BIND_SERVICE",
        "MKNOD",
        "SYS_CHROOT",
    ];
    let names: Vec<String> = names.iter().map(|name| format!("CAP_{name}")).collect();
    v1::Process {
        args: args.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
        env: vec![b"PATH=/bin".to_vec()],
        cwd: "/".into(),
        user: Some(v1::User::default()),
        capabilities: Some(v1::Capabilities {
            bounding: names.clone(),
            effective: names.clone(),
            permitted: names,
            ..v1::Capabilities::default()
        }),
        ..v1::Process::default()
    }
}

pub(crate) fn container(args: &[&str]) -> v1::ContainerSpec {
    v1::ContainerSpec {
        image_serial: "busybox".into(),
        process: Some(process(args)),
        ..v1::ContainerSpec::default()
    }
}

pub(crate) fn shell(script: &str) -> v1::ContainerSpec {
    container(&["sh", "-c", script])
}
