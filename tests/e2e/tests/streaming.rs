//! Exec, attach and port-forward as people use them: crictl over both transports, and a client of our own for what crictl does not do.

#[path = "../../../cri-server/streaming/tests/client/mod.rs"]
mod client;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command as Program, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cache,
    cri::{Cri, container, pod},
    eventually,
    host::Host,
    node::{Node, node},
    run,
};
use client::{Command, Spdy, WebSocket};
use k8s_cri::v1 as cri;

const LIMIT: Duration = Duration::from_secs(60);

/// A node with a pod and a container that sleeps.
struct Scene {
    node: Node,
    cri: Cri,
    crictl: PathBuf,
    pod: cri::PodSandboxConfig,
    pod_id: String,
    id: String,
}

impl Scene {
    async fn new(host: &Host) -> Result<Self> {
        let crictl = cache().join("bin/crictl");
        ensure!(
            crictl.exists(),
            "{} is missing: run `make crictl` first",
            crictl.display()
        );
        let node = node(host).await?;
        let mut cri = node.daemon.cri().await?;
        let pod = pod(host, "streams");
        let pod_id = cri.run_pod(&pod).await?;
        let config = container("sleeper", &node.image, &["sleep", "1000000"]);
        let id = cri.run(&pod_id, &config, &pod).await?;
        Ok(Self {
            node,
            cri,
            crictl,
            pod,
            pod_id,
            id,
        })
    }

    fn crictl(&self, arguments: &[&str]) -> Program {
        let endpoint = format!("unix://{}", self.node.daemon.socket().display());
        let mut program = Program::new(&self.crictl);
        program
            .args([
                "-t",
                "60s",
                "-r",
                &endpoint,
                "-i",
                &endpoint,
                "--config",
                "/dev/null",
            ])
            .args(arguments);
        program
    }

    /// Runs crictl with this input, which ends; its output.
    fn with_input(&self, arguments: &[&str], input: &[u8]) -> Result<Output> {
        let mut child = self
            .crictl(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        let input = input.to_vec();
        // A command that does not read its input closes it.
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output()?;
        drop(writer.join());
        Ok(output)
    }

    async fn exec_url(&mut self, command: &[&str], tty: bool) -> Result<String> {
        let request = cri::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Ok(self.cri.runtime.exec(request).await?.into_inner().url)
    }

    /// Command names of the guest's processes that are not the kernel's, as the container's view of its PID namespace has them.
    async fn processes(&mut self) -> Result<Vec<String>> {
        let (_, out, _) = self.cri.exec(&self.id, &["ps", "-o", "comm"]).await?;
        Ok(out
            .lines()
            .skip(1)
            .map(str::to_owned)
            .filter(|name| name != "ps")
            .collect())
    }

    async fn only_the_sleeper_is_left(&mut self) -> Result<()> {
        let start = std::time::Instant::now();
        loop {
            let names = self.processes().await?;
            // "exe" is the agent's reaper, PID 1 of the pod's shared namespace.
            if names == ["exe", "sleep"] {
                return Ok(());
            }
            ensure!(start.elapsed() < LIMIT, "left in the container: {names:?}");
        }
    }
}

/// Text of a finished program; an error with what it said when it failed.
fn stdout(output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Kills its process when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn descriptors(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd"))?.count())
}

#[test]
fn crictl_talks_to_commands_containers_and_ports_over_both_transports() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let mut scene = Scene::new(&host).await?;
        let id = scene.id.clone();
        for transport in ["spdy", "websocket"] {
            let exec = |more: &[&str]| -> Vec<String> {
                ["exec", "-r", transport]
                    .iter()
                    .chain(more)
                    .map(ToString::to_string)
                    .collect()
            };
            let go = |arguments: Vec<String>, input: &[u8]| {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                scene.with_input(&arguments, input)
            };

            // Output, error output and exit code.
            let out = go(exec(&[&id, "sh", "-c", "echo out; echo err >&2; exit 42"]), b"")?;
            ensure!(out.stdout == b"out\n", "{transport}: {out:?}");
            let err = String::from_utf8_lossy(&out.stderr).into_owned();
            ensure!(
                err.contains("err\n") && err.contains("42"),
                "{transport}: {err:?}"
            );
            // Input to its end, binary and larger than any buffer on the way.
            let input: Vec<u8> = (0..3_000_000u32)
                .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
                .take(3_000_000)
                .collect();
            let out = go(exec(&["-i", &id, "cat"]), &input)?;
            ensure!(
                out.status.success() && out.stdout == input,
                "{transport}: {} bytes came back",
                out.stdout.len()
            );
            // A program that is not there.
            let out = go(exec(&[&id, "no-such-program"]), b"")?;
            let err = String::from_utf8_lossy(&out.stderr).into_owned();
            ensure!(
                !out.status.success() && err.contains("no-such-program"),
                "{transport}: {err}"
            );
            // A terminal, by our own client: crictl wants one of its own for it.
            let script = ["sh", "-c", "tty; echo $TERM; read line; echo got $line"];
            let url = scene.exec_url(&script, true).await?;
            let text = if transport == "spdy" {
                let mut command = Command::begin(&url, &["stdin", "stdout", "resize"]).await?;
                command.send("stdin", b"hello\n").await?;
                command.finish().await.stdout
            } else {
                let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await?;
                socket.send(0, b"hello\n").await?;
                socket.finish().await.stdout
            };
            let text = String::from_utf8_lossy(&text).into_owned();
            ensure!(
                text.contains("/dev/pts/") && text.contains("xterm") && text.contains("got hello"),
                "{transport}: {text:?}"
            );
            // A client that vanishes takes its command along.
            let mut sleeping = Running(
                scene
                    .crictl(&[
                        "exec",
                        "-r",
                        transport,
                        "-i",
                        &id,
                        "sh",
                        "-c",
                        "echo up; exec sleep 54321",
                    ])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()?,
            );
            let mut line = [0; 3];
            std::io::Read::read_exact(sleeping.0.stdout.as_mut().context("no stdout")?, &mut line)?;
            drop(sleeping);
            scene.only_the_sleeper_is_left().await?;

            // Attach: what is printed from now on, input, and several at a time.
            let config = cri::ContainerConfig {
                stdin: true,
                stdin_once: true,
                ..container(
                    &format!("reader-{transport}"),
                    &scene.node.image,
                    &[
                        "sh",
                        "-c",
                        "echo early; while read line; do echo got $line; echo err $line >&2; done; echo end",
                    ],
                )
            };
            let reader = scene.cri.run(&scene.pod_id, &config, &scene.pod).await?;
            let watching = scene
                .crictl(&["attach", "-r", transport, &reader])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            let out = scene.with_input(&["attach", "-r", transport, "-i", &reader], b"one\ntwo\n")?;
            let text = stdout(&out)?;
            ensure!(text.ends_with("got one\ngot two\nend\n"), "{transport}: {text:?}");
            let err = String::from_utf8_lossy(&out.stderr).into_owned();
            ensure!(err.contains("err one\nerr two\n"), "{transport}: {err:?}");
            let watched = watching.wait_with_output()?;
            ensure!(watched.status.success(), "{watched:?}");
            ensure!(scene.cri.exited(&reader).await?.exit_code == 0);
            scene.cri.remove(&reader).await?;

            // Port-forward, to servers on either address family.
            for (number, family) in [(8081, "127.0.0.1"), (8082, "[::1]")] {
                let config = container(
                    &format!("httpd-{transport}-{number}"),
                    &scene.node.image,
                    &["httpd", "-f", "-p", &format!("{family}:{number}"), "-h", "/www"],
                );
                let server = scene.cri.run(&scene.pod_id, &config, &scene.pod).await?;
                // A client gives up its whole connection when a port refuses once.
                let listens = format!("grep -qi ':{number:04x} .* 0A ' /proc/net/tcp /proc/net/tcp6");
                eventually("the server's listening", LIMIT, async || {
                    let asked = scene.cri.exec(&server, &["sh", "-c", &listens]).await;
                    asked.ok().filter(|(code, _, _)| *code == 0)
                })
                .await?;
                let mut forward = Running(
                    scene
                        .crictl(&[
                            "port-forward",
                            "-r",
                            transport,
                            &scene.pod_id,
                            &format!("0:{number}"),
                        ])
                        .stdout(Stdio::piped())
                        .spawn()?,
                );
                let mut printed = std::io::BufReader::new(forward.0.stdout.take().context("no stdout")?);
                let mut line = String::new();
                std::io::BufRead::read_line(&mut printed, &mut line)?;
                let port = line
                    .split("127.0.0.1:")
                    .nth(1)
                    .and_then(|rest| rest.split(' ').next())
                    .with_context(|| format!("crictl printed {line:?}"))?
                    .to_owned();
                let page = eventually("a page through the port", LIMIT, async || {
                    let port = port.clone();
                    tokio::task::spawn_blocking(move || {
                        ureq::get(format!("http://127.0.0.1:{port}/index.html"))
                            .call()
                            .ok()?
                            .body_mut()
                            .read_to_string()
                            .ok()
                    })
                    .await
                    .ok()
                    .flatten()
                })
                .await?;
                ensure!(
                    page.contains("hello from a microVM"),
                    "{transport} {family}: {page}"
                );
                drop(forward);
                scene.cri.remove(&server).await?;
            }
        }
        scene.cri.remove_pod(&scene.pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn sessions_leave_nothing_behind_however_they_end() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let mut scene = Scene::new(&host).await?;
        let daemon = scene.node.daemon.pid();
        let rounds: u32 = std::env::var("CAISSON_SESSIONS").map_or(Ok(200), |text| text.parse())?;
        // One of each first, so that what stays for good is there.
        for round in 0..rounds {
            if round == 3 {
                scene.only_the_sleeper_is_left().await?;
            }
            let url = scene.exec_url(&["cat"], false).await?;
            match round % 3 {
                0 => {
                    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
                    command.send("stdin", b"hello").await?;
                    command.end("stdin").await;
                    let outcome = command.finish().await;
                    ensure!(
                        outcome.stdout == b"hello" && outcome.status.contains("Success"),
                        "{outcome:?}"
                    );
                }
                1 => {
                    let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await?;
                    socket.send(0, b"hello").await?;
                    socket.send(255, &[0]).await?;
                    let outcome = socket.finish().await;
                    ensure!(
                        outcome.stdout == b"hello" && outcome.status.contains("Success"),
                        "{outcome:?}"
                    );
                }
                _ => {
                    let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
                    command.send("stdin", b"hello").await?;
                    command.read_until("hello").await;
                }
            }
        }
        scene.only_the_sleeper_is_left().await?;
        let few = descriptors(daemon)?;

        // A hundred at once, of all kinds.
        let mut urls = Vec::new();
        for _ in 0..100 {
            urls.push(scene.exec_url(&["cat"], false).await?);
        }
        let clients = urls.into_iter().enumerate().map(|(n, url)| async move {
            let text = format!("session {n} ").repeat(3000);
            if n % 2 == 0 {
                let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
                command.send("stdin", text.as_bytes()).await?;
                command.end("stdin").await;
                let outcome = command.finish().await;
                ensure!(
                    outcome.stdout == text.as_bytes(),
                    "session {n} differs: {}",
                    outcome.status
                );
            } else {
                let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await?;
                socket.send(0, text.as_bytes()).await?;
                socket.send(255, &[0]).await?;
                let outcome = socket.finish().await;
                ensure!(
                    outcome.stdout == text.as_bytes(),
                    "session {n} differs: {}",
                    outcome.status
                );
            }
            Ok(())
        });
        for result in futures::future::join_all(clients).await {
            result?;
        }
        scene.only_the_sleeper_is_left().await?;
        eventually("the sessions' descriptors are closed", LIMIT, async || {
            (descriptors(daemon).ok()? <= few + 8).then_some(())
        })
        .await?;
        scene.cri.remove_pod(&scene.pod_id).await?;
        Ok(())
    })
}

#[test]
fn a_session_ends_with_its_container_or_its_pod_and_says_so() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let mut scene = Scene::new(&host).await?;
        // The container is killed under it.
        let url = scene
            .exec_url(&["sh", "-c", "echo up; sleep 54321"], false)
            .await?;
        let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
        command.read_until("up").await;
        scene.cri.stop(&scene.id, 0).await?;
        let outcome = command.finish().await;
        ensure!(outcome.status.contains("137"), "{}", outcome.status);
        let request = cri::ExecRequest {
            container_id: scene.id.clone(),
            cmd: vec!["true".into()],
            stdout: true,
            ..Default::default()
        };
        let error = scene
            .cri
            .runtime
            .exec(request)
            .await
            .err()
            .context("exec in an exited container")?;
        ensure!(error.code() == tonic::Code::FailedPrecondition, "{error}");

        // The pod is stopped under one, and under a forwarded connection.
        let config = container(
            "second",
            &scene.node.image,
            &["httpd", "-f", "-p", "8080", "-h", "/www"],
        );
        scene.id = scene.cri.run(&scene.pod_id, &config, &scene.pod).await?;
        let url = scene
            .exec_url(&["sh", "-c", "echo up; sleep 54321"], true)
            .await?;
        let mut command = Command::begin(&url, &["stdin", "stdout", "resize"]).await?;
        command.read_until("up").await;
        let request = cri::PortForwardRequest {
            pod_sandbox_id: scene.pod_id.clone(),
            port: vec![],
        };
        let url = scene.cri.runtime.port_forward(request).await?.into_inner().url;
        let mut spdy = Spdy::connect(&url, "portforward.k8s.io").await?;
        let label = |kind, port| [("streamtype", kind), ("port", port), ("requestid", port)];
        // A port where nobody listens says so, and the others go on.
        let error = spdy.open(&label("error", "9")).await;
        spdy.open(&label("data", "9")).await;
        let (reason, _) = spdy.data_of(error).await.context("no reason")?;
        let reason = String::from_utf8_lossy(&reason).into_owned();
        ensure!(
            reason.contains("refused") && reason.contains("port 9"),
            "{reason}"
        );
        let error = spdy.open(&label("error", "8080")).await;
        let data = spdy.open(&label("data", "8080")).await;
        spdy.data(data, b"GET /", false).await?;
        scene.cri.stop_pod(&scene.pod_id).await?;
        let outcome = command.finish().await;
        ensure!(outcome.status.contains("Failure"), "{}", outcome.status);
        while let Some((_, false)) = spdy.data_of(error).await {}
        scene.cri.remove_pod(&scene.pod_id).await?;
        Ok(())
    })
}
