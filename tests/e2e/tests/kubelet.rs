//! A real kubelet on the real daemon, with static pods: what it promises to users, judged by its API, by files, and by the host.
//!
//! `make e2e-kubelet`; ignored otherwise, since kubelet is a peer that takes ten minutes to build.

#[path = "../../../cri-server/streaming/tests/client/mod.rs"]
mod client;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    eventually,
    host::Host,
    kubelet::{Kubelet, container_status, is_ready, pod_name},
    node::{Node, node},
    run,
};
use client::{Command, Spdy, WebSocket};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);

/// A node with a kubelet.
struct Scene<'a> {
    kubelet: Kubelet,
    node: Node,
    host: &'a Host,
}

impl<'a> Scene<'a> {
    async fn new(host: &'a Host) -> Result<Self> {
        let node = node(host).await?;
        let kubelet = Kubelet::start(host, &node.daemon, &json!({})).await?;
        Ok(Self { kubelet, node, host })
    }

    /// A container that runs this script.
    fn script(&self, name: &str, script: &str) -> Value {
        json!({ "name": name, "image": self.node.image, "command": ["sh", "-c", script] })
    }

    /// Runs a command in a container through kubelet's server; its output.
    async fn exec(&self, pod: &str, container: &str, words: &[&str]) -> Result<String> {
        let url = self.kubelet.exec_url(pod, container, words, false);
        let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
        command.end("stdin").await;
        let outcome = command.finish().await;
        ensure!(
            outcome.status.contains("Success"),
            "{words:?} in {pod}: {} {}",
            outcome.status,
            String::from_utf8_lossy(&outcome.stderr)
        );
        Ok(String::from_utf8(outcome.stdout)?)
    }

    /// Ids of the sandboxes of a pod, as the CRI has them.
    async fn sandboxes(&self, pod: &str) -> Result<Vec<String>> {
        let mut cri = self.node.cri.clone();
        let full = pod_name(pod);
        let named = |sandbox: &k8s_cri::v1::PodSandbox| {
            sandbox
                .metadata
                .as_ref()
                .is_some_and(|metadata| metadata.name == full)
        };
        Ok(cri
            .pods()
            .await?
            .into_iter()
            .filter(named)
            .map(|sandbox| sandbox.id)
            .collect())
    }

    async fn sandbox(&self, pod: &str) -> Result<String> {
        let mut ids = self.sandboxes(pod).await?;
        ensure!(ids.len() == 1, "pod {pod} has sandboxes {ids:?}");
        ids.pop().context("no sandbox")
    }

    /// A directory of the host that pods can mount.
    fn shared_dir(&self, name: &str) -> Result<std::path::PathBuf> {
        let dir = self.host.dir().join("shared").join(name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }
}

fn host_path(name: &str, dir: &Path) -> Value {
    json!({ "name": name, "hostPath": { "path": dir, "type": "Directory" } })
}

/// What a web server at this address answers to `GET /path`; an error when nobody answers.
fn page(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn restarts(pod: &Value, name: &str) -> u64 {
    container_status(pod, name)["restartCount"]
        .as_u64()
        .unwrap_or_default()
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn probes_of_every_kind_decide_on_readiness_and_restarts() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let scene = Scene::new(&host).await?;
        let mut web = scene.script(
            "web",
            "mkdir -p /srv; touch /tmp/alive; trap 'exit 0' TERM; httpd -f -p 8080 -h /srv & wait",
        );
        // The startup probe holds the others back until the port listens.
        web["startupProbe"] =
            json!({ "tcpSocket": { "port": 8080 }, "periodSeconds": 1, "failureThreshold": 60 });
        web["readinessProbe"] = json!({ "httpGet": { "path": "/ready", "port": 8080 }, "periodSeconds": 1, "timeoutSeconds": 10 });
        web["livenessProbe"] = json!({
            "exec": { "command": ["test", "-e", "/tmp/alive"] },
            "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 10,
        });
        scene.kubelet.apply(
            "probed",
            &json!({ "containers": [web], "terminationGracePeriodSeconds": 5 }),
        )?;

        // Started, but nothing says that it is ready.
        let pod = scene
            .kubelet
            .pod_when("probed", "a started container", |pod| {
                container_status(pod, "web")["started"] == true
            })
            .await?;
        ensure!(!is_ready(&pod), "ready without a page: {pod:#}");
        scene.exec("probed", "web", &["touch", "/srv/ready"]).await?;
        scene.kubelet.ready("probed").await?;
        let before = scene.sandbox("probed").await?;
        scene.exec("probed", "web", &["rm", "/srv/ready"]).await?;
        scene
            .kubelet
            .pod_when("probed", "unreadiness", |pod| !is_ready(pod))
            .await?;

        // A liveness probe that fails ends the container, and it comes back in the same VM.
        scene.exec("probed", "web", &["rm", "/tmp/alive"]).await?;
        let pod = scene
            .kubelet
            .pod_when("probed", "a restart", |pod| {
                restarts(pod, "web") >= 1 && container_status(pod, "web")["started"] == true
            })
            .await?;
        let ended = &container_status(&pod, "web")["lastState"]["terminated"];
        ensure!(
            ended["exitCode"] == 0,
            "the container was not ended by TERM: {ended:#}"
        );
        ensure!(
            scene.sandbox("probed").await? == before,
            "another sandbox after a restart"
        );
        Ok(())
    })
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn init_containers_volumes_and_restarts_share_one_sandbox() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let scene = Scene::new(&host).await?;
        let settings = scene.shared_dir("settings")?;
        fs::write(settings.join("colour"), "blue")?;
        let mount = |name: &str, path: &str| json!({ "name": name, "mountPath": path });
        let data = || json!([mount("data", "/data")]);

        let mut first = scene.script("first", "echo first >>/data/order");
        first["volumeMounts"] = data();
        // An init container that stays: a sidecar.
        let mut sidecar = scene.script(
            "sidecar",
            "echo sidecar >>/data/order; trap 'exit 0' TERM; sleep 100000 & wait",
        );
        sidecar["restartPolicy"] = json!("Always");
        sidecar["volumeMounts"] = data();
        let mut second = scene.script("second", "echo second >>/data/order; cat /data/order");
        second["volumeMounts"] = data();
        // Fails once, says why, and comes back to what it left.
        let mut main = scene.script(
            "main",
            "echo main >>/data/order
             if [ ! -e /data/failed ]; then touch /data/failed; echo \"it broke\" >/dev/termination-log; exit 3; fi
             trap 'exit 0' TERM; sleep 100000 & wait",
        );
        main["volumeMounts"] = json!([
            mount("data", "/data"),
            mount("scratch", "/scratch"),
            mount("identity", "/identity"),
            json!({ "name": "settings", "mountPath": "/settings", "readOnly": true }),
            json!({ "name": "data", "mountPath": "/part", "subPath": "part" }),
        ]);
        main["env"] = json!([
            { "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
            { "name": "LIMIT", "valueFrom": { "resourceFieldRef": { "resource": "limits.memory" } } },
        ]);
        main["resources"] = json!({ "limits": { "memory": "64Mi", "cpu": "500m" }, "requests": { "memory": "32Mi", "cpu": "100m" } });
        let field = |path: &str, field: &str| json!({ "path": path, "fieldRef": { "fieldPath": field } });
        // Of the volumes that kubelet writes itself, the one that wants no API server.
        let identity = json!({ "name": "identity", "downwardAPI": { "items": [
            field("name", "metadata.name"), field("labels", "metadata.labels"),
        ] } });
        let spec = json!({
            "initContainers": [first, sidecar, second], "containers": [main], "terminationGracePeriodSeconds": 5,
            "dnsPolicy": "Default", "hostAliases": [{ "ip": "10.1.2.3", "hostnames": ["elsewhere.test"] }],
            "volumes": [
                { "name": "data", "emptyDir": {} },
                { "name": "scratch", "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } },
                identity, host_path("settings", &settings),
            ],
        });
        scene
            .kubelet
            .apply_with("steps", &spec, &json!({ "colour": "blue" }))?;

        let pod = scene
            .kubelet
            .pod_when("steps", "a restarted main container", |pod| {
                is_ready(pod) && restarts(pod, "main") == 1
            })
            .await?;
        scene.sandbox("steps").await?;
        let ended = &container_status(&pod, "main")["lastState"]["terminated"];
        ensure!(
            ended["exitCode"] == 3 && ended["reason"] == "Error" && ended["message"] == "it broke\n",
            "{ended:#}"
        );
        for name in ["first", "second"] {
            let ended = &container_status(&pod, name)["state"]["terminated"];
            ensure!(
                ended["reason"] == "Completed" && ended["exitCode"] == 0,
                "{name}: {ended:#}"
            );
        }
        ensure!(restarts(&pod, "sidecar") == 0 && container_status(&pod, "sidecar")["ready"] == true);

        let cat = async |path: &str| scene.exec("steps", "main", &["cat", path]).await;
        ensure!(cat("/data/order").await? == "first\nsidecar\nsecond\nmain\nmain\n");
        ensure!(cat("/identity/name").await? == pod_name("steps"));
        ensure!(cat("/identity/labels").await?.contains("colour=\"blue\""));
        ensure!(cat("/settings/colour").await? == "blue");
        fs::write(settings.join("colour"), "green")?;
        eventually("the changed file in the pod", LIMIT, async || {
            (cat("/settings/colour").await.ok()? == "green").then_some(())
        })
        .await?;
        ensure!(cat("/etc/hosts").await?.contains("elsewhere.test"));
        let resolver = cat("/etc/resolv.conf").await?;
        ensure!(
            resolver.contains("10.96.0.10") && resolver.contains("node.test"),
            "{resolver}"
        );
        let mounts = cat("/proc/mounts").await?;
        let of = |path: &str| mounts.lines().find(|line| line.split(' ').nth(1) == Some(path));
        ensure!(
            of("/scratch").is_some_and(|line| line.starts_with("tmpfs") && line.contains("size=16384k")),
            "{mounts}"
        );
        ensure!(
            of("/settings").is_some_and(|line| line.contains("ro,")),
            "{mounts}"
        );
        scene
            .exec(
                "steps",
                "main",
                &["sh", "-c", "echo x >/part/file && test -e /data/part/file"],
            )
            .await?;
        let environment = scene.exec("steps", "main", &["env"]).await?;
        let ip = pod["status"]["podIP"].as_str().context("no IP")?;
        ensure!(
            environment.contains(&format!("POD_IP={ip}\n")) && environment.contains("LIMIT=67108864\n"),
            "{environment}"
        );
        ensure!(
            pod["status"]["podIPs"]
                .as_array()
                .is_some_and(|ips| ips.len() == 2),
            "{pod:#}"
        );
        ensure!(scene.exec("steps", "main", &["hostname"]).await?.trim() == pod_name("steps"));
        Ok(())
    })
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn logs_are_read_followed_and_rotated() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let scene = Scene::new(&host).await?;
        // Writes a numbered line for each byte of input, so that a test decides when.
        let talker = scene.script(
            "talker",
            "echo begin; n=0; mkfifo /tmp/go; while true; do
                 read count </tmp/go || continue
                 i=0; while [ $i -lt $count ]; do echo \"line $n of many, padded to be somewhat longer than a short line would be\"; n=$((n+1)); i=$((i+1)); done
             done",
        );
        scene.kubelet.apply(
            "talks",
            &json!({ "containers": [talker], "terminationGracePeriodSeconds": 0 }),
        )?;
        let pod = scene.kubelet.ready("talks").await?;
        let path = format!("/containerLogs/default/{}/talker", pod_name("talks"));
        eventually("the first line", LIMIT, async || {
            (scene.kubelet.get(&path).ok()? == "begin\n").then_some(())
        })
        .await?;

        let talk = async |lines: u32| {
            scene
                .exec(
                    "talks",
                    "talker",
                    &["sh", "-c", &format!("echo {lines} >/tmp/go")],
                )
                .await
        };
        // One who follows sees every line once, rotations or not.
        let url = scene.kubelet.url(&format!("{path}?follow=true"));
        let follower = std::thread::spawn(move || -> Result<Vec<String>> {
            let mut answer = ureq::get(&url).call()?;
            let reader = std::io::BufReader::new(answer.body_mut().as_reader());
            let mut lines = Vec::new();
            for line in std::io::BufRead::lines(reader) {
                let line = line?;
                let last = line.starts_with("line 1499 ");
                lines.push(line);
                if last {
                    break;
                }
            }
            Ok(lines)
        });
        let directory = scene.kubelet.log_dir(&pod)?.join("talker");
        let files = || -> Result<Vec<String>> {
            let mut names = fs::read_dir(&directory)?
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect::<Vec<_>>();
            names.sort();
            Ok(names)
        };
        for round in 1..=3 {
            talk(500).await?;
            // 500 lines are more than a file may have; kubelet looks every three seconds.
            let rotated = round.min(2);
            let marker = format!("line {} ", round * 500 - 1);
            eventually(&format!("rotation {round}"), LIMIT, async || {
                let names = files().ok()?;
                let moved = names.iter().filter(|name| *name != "0.log").count();
                let written = fs::read_to_string(directory.join("0.log")).ok()?;
                (moved >= rotated && !written.contains(&marker)).then_some(())
            })
            .await
            .with_context(|| format!("{:?}", files()))?;
        }
        let names = files()?;
        ensure!(names.len() <= 3 && names.contains(&"0.log".into()), "{names:?}");
        ensure!(names.iter().any(|name| name.ends_with(".gz")), "{names:?}");
        let lines = follower
            .join()
            .map_err(|_| anyhow::anyhow!("the follower panicked"))??;
        ensure!(
            lines.first().is_some_and(|line| line == "begin"),
            "{:?}",
            lines.first()
        );
        for (n, line) in lines.iter().skip(1).enumerate() {
            ensure!(line.starts_with(&format!("line {n} of ")), "line {n} is {line:?}");
        }
        ensure!(lines.len() == 1501, "{} lines", lines.len());
        // The container goes on into the new file.
        talk(1).await?;
        eventually("the line after the rotations", LIMIT, async || {
            let text = scene.kubelet.get(&format!("{path}?tailLines=1")).ok()?;
            text.starts_with("line 1500 ").then_some(())
        })
        .await
    })
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn exec_attach_and_port_forward_pass_through_kubelets_server() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let scene = Scene::new(&host).await?;
        let mut reader = scene.script("reader", "while read line; do echo got $line; done");
        reader["stdin"] = json!(true);
        let web = scene.script("web", "exec httpd -f -p 8080 -h /www");
        scene.kubelet.apply(
            "streams",
            &json!({ "containers": [reader, web], "terminationGracePeriodSeconds": 0 }),
        )?;
        scene.kubelet.ready("streams").await?;

        // Over SPDY: input and its end, both outputs, exit codes.
        let script = ["sh", "-c", "cat; echo err >&2; exit 42"];
        let url = scene.kubelet.exec_url("streams", "web", &script, false);
        let input: Vec<u8> = (0..1_000_000u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        let mut command = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
        for chunk in input[..100_000].chunks(10_000) {
            command.send("stdin", chunk).await?;
        }
        command.end("stdin").await;
        let outcome = command.finish().await;
        ensure!(
            outcome.stdout == input[..100_000] && outcome.stderr == b"err\n" && outcome.status.contains("42"),
            "{} bytes, {:?}, {}",
            outcome.stdout.len(),
            outcome.stderr,
            outcome.status
        );
        // Over WebSocket, the protocol that kubectl prefers.
        let url = scene.kubelet.exec_url("streams", "web", &script, false);
        let mut socket = WebSocket::connect(&url, "v5.channel.k8s.io").await?;
        for chunk in input[..100_000].chunks(10_000) {
            socket.send(0, chunk).await?;
        }
        socket.send(255, &[0]).await?;
        let outcome = socket.finish().await;
        ensure!(
            outcome.stdout == input[..100_000] && outcome.stderr == b"err\n" && outcome.status.contains("42"),
            "{} bytes, {:?}, {}",
            outcome.stdout.len(),
            outcome.stderr,
            outcome.status
        );
        // A terminal.
        let url = scene.kubelet.exec_url(
            "streams",
            "web",
            &["sh", "-c", "tty; read line; echo got $line"],
            true,
        );
        let mut command = Command::begin(&url, &["stdin", "stdout", "resize"]).await?;
        command.send("stdin", b"hello\n").await?;
        let outcome = command.finish().await;
        let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
        ensure!(
            text.contains("/dev/pts/") && text.contains("got hello"),
            "{text:?}"
        );

        // Attach to a container that reads.
        let url = scene.kubelet.url(&format!(
            "/attach/default/{}/reader?input=1&output=1&error=1",
            pod_name("streams")
        ));
        let mut attached = Command::begin(&url, &["stdin", "stdout", "stderr"]).await?;
        attached.send("stdin", b"one\n").await?;
        attached.read_until("got one\n").await;
        drop(attached);

        let url = scene
            .kubelet
            .url(&format!("/portForward/default/{}", pod_name("streams")));
        let mut spdy = Spdy::connect(&url, "portforward.k8s.io").await?;
        let label = |kind| [("streamtype", kind), ("port", "8080"), ("requestid", "0")];
        let error = spdy.open(&label("error")).await;
        let data = spdy.open(&label("data")).await;
        spdy.data(error, b"", true).await?;
        spdy.data(data, b"GET /index.html HTTP/1.0\r\n\r\n", false)
            .await?;
        let mut answer = Vec::new();
        while let Some((bytes, fin)) = spdy.data_of(data).await {
            answer.extend(bytes);
            if fin {
                break;
            }
        }
        ensure!(
            String::from_utf8_lossy(&answer).contains("hello from a microVM"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
        Ok(())
    })
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn usage_is_summed_up_for_containers_and_for_the_pod() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let scene = Scene::new(&host).await?;
        let mut busy = scene.script(
            "busy",
            "dd if=/dev/zero of=/data/file bs=1M count=8; while :; do :; done",
        );
        busy["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
        let idle = scene.script(
            "idle",
            "dd if=/dev/zero of=/written bs=1M count=4; sync; sleep 100000",
        );
        scene.kubelet.apply(
            "used",
            &json!({
                "containers": [busy, idle], "terminationGracePeriodSeconds": 0,
                "volumes": [{ "name": "data", "emptyDir": {} }],
            }),
        )?;
        scene.kubelet.ready("used").await?;
        let positive = |value: &Value| value.as_u64().is_some_and(|number| number > 0);
        let usage_of_containers = |stats: &Value| {
            let containers = stats["containers"].as_array().cloned().unwrap_or_default();
            containers.len() == 2
                && containers.iter().all(|container| {
                    positive(&container["memory"]["workingSetBytes"])
                        && positive(&container["cpu"]["usageCoreNanoSeconds"])
                        && container["cpu"]["usageNanoCores"].is_u64()
                })
                && containers.iter().any(|container| {
                    container["name"] == "idle" && container["rootfs"]["usedBytes"].as_u64() >= Some(4 << 20)
                })
        };
        let when = async |kubelet: &Kubelet, what: &str, wanted: &dyn Fn(&Value) -> bool| {
            let mut last = None;
            eventually(what, LIMIT, async || {
                let stats = kubelet.summary("used").ok()??;
                last = Some(stats.clone());
                wanted(&stats).then_some(())
            })
            .await
            .with_context(|| format!("{:#}\n{}", last.unwrap_or_default(), kubelet.log_tail()))
        };
        when(&scene.kubelet, "usage of the containers", &usage_of_containers).await?;

        // The same from the CRI alone, the pod's network included; and pods outlive their kubelet.
        let Scene { kubelet, node, host } = scene;
        let more = json!({ "featureGates": { "PodAndContainerStatsFromCRI": true } });
        let kubelet = kubelet.start_again(&node.daemon, &more).await?;
        let scene = Scene { kubelet, node, host };
        let pod = scene.kubelet.ready("used").await?;
        ensure!(
            restarts(&pod, "busy") == 0 && restarts(&pod, "idle") == 0,
            "{pod:#}"
        );
        when(&scene.kubelet, "usage from the CRI", &|stats| {
            usage_of_containers(stats)
                && positive(&stats["cpu"]["usageCoreNanoSeconds"])
                && positive(&stats["memory"]["workingSetBytes"])
                && stats["network"]["name"] == "eth0"
                && stats["network"]["rxBytes"].is_u64()
                && positive(&stats["process_stats"]["process_count"])
        })
        .await?;
        let metrics = scene.kubelet.get("/metrics/cadvisor")?;
        ensure!(
            metrics.lines().any(|line| {
                line.starts_with("container_memory_working_set_bytes{") && line.contains("container=\"idle\"")
            }),
            "no metric of the container: {metrics}"
        );
        let resource = scene.kubelet.get("/metrics/resource")?;
        ensure!(
            resource
                .lines()
                .any(|line| line.starts_with("pod_cpu_usage_seconds_total{") && line.contains("used-node")),
            "{resource}"
        );
        Ok(())
    })
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn a_pod_is_reached_by_its_host_port_and_ends_gracefully() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let scene = Scene::new(&host).await?;
        let out = scene.shared_dir("out")?;
        let mut web = scene.script(
            "web",
            "trap 'echo by TERM >/out/ended; exit 0' TERM; httpd -f -p 8080 -h /www & wait",
        );
        web["ports"] = json!([{ "containerPort": 8080, "hostPort": 18080 }]);
        web["volumeMounts"] = json!([{ "name": "out", "mountPath": "/out" }]);
        web["lifecycle"] = json!({
            "postStart": { "exec": { "command": ["sh", "-c", "echo begun >/out/begun"] } },
            "preStop": { "exec": { "command": ["sh", "-c", "echo stopping >/out/stopping"] } },
        });
        let spec = json!({
            "containers": [web], "terminationGracePeriodSeconds": 30, "volumes": [host_path("out", &out)],
        });
        scene.kubelet.apply("served", &spec)?;
        scene.kubelet.ready("served").await?;
        for address in ["10.87.0.1:18080", "127.0.0.1:18080"] {
            eventually(&format!("a page at {address}"), LIMIT, async || {
                let text = page(address, "/index.html").ok()?;
                text.contains("hello from a microVM").then_some(())
            })
            .await?;
        }
        eventually("what the postStart hook writes", LIMIT, async || {
            (fs::read_to_string(out.join("begun")).ok()? == "begun\n").then_some(())
        })
        .await?;

        // Its API forgets a static pod with its file, before the pod has ended.
        scene.kubelet.delete("served")?;
        eventually("the end of the VM", LIMIT, async || {
            host.leftovers().ok()?.processes.is_empty().then_some(())
        })
        .await
        .with_context(|| scene.kubelet.log_tail())?;
        for (name, content) in [("stopping", "stopping\n"), ("ended", "by TERM\n")] {
            let written = fs::read_to_string(out.join(name)).with_context(|| format!("no {name}"))?;
            ensure!(written == content, "{name}: {written:?}");
        }
        ensure!(
            page("127.0.0.1:18080", "/").is_err(),
            "the host port is still served"
        );
        // kubelet collects what it no longer needs once a minute.
        eventually("the removal of the sandbox", LIMIT, async || {
            scene.sandboxes("served").await.ok()?.is_empty().then_some(())
        })
        .await
        .with_context(|| scene.kubelet.log_tail())
    })
}

#[test]
#[ignore = "needs kubelet: make e2e-kubelet"]
fn a_pod_whose_vm_was_killed_gets_another() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let mut scene = Scene::new(&host).await?;
        let mut main = scene.script(
            "main",
            "echo started >>/data/starts; cat /data/starts; sleep 100000",
        );
        main["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
        let spec = json!({
            "containers": [main], "terminationGracePeriodSeconds": 2,
            "volumes": [{ "name": "data", "emptyDir": {} }],
        });
        scene.kubelet.apply("fragile", &spec)?;
        let pod = scene.kubelet.ready("fragile").await?;
        let first = container_status(&pod, "main")["containerID"].clone();
        let sandbox = scene.sandbox("fragile").await?;
        // What a machine loses with its power, a VM loses too.
        scene.exec("fragile", "main", &["sync"]).await?;
        let (_, info) = scene.node.cri.pod_status(&sandbox).await?;
        let info: Value = serde_json::from_str(info.get("info").context("no info")?)?;
        let vmm = info["processes"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|process| process["role"] == "vmm")
            .and_then(|process| process["pid"].as_i64())
            .context("no process of the VM")?;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(vmm)?),
            nix::sys::signal::Signal::SIGKILL,
        )?;
        let pod = scene
            .kubelet
            .pod_when("fragile", "a new container", |pod| {
                is_ready(pod) && container_status(pod, "main")["containerID"] != first
            })
            .await?;
        ensure!(restarts(&pod, "main") == 1, "{pod:#}");
        let sandboxes = scene.sandboxes("fragile").await?;
        ensure!(sandboxes.iter().any(|id| *id != sandbox), "still {sandboxes:?}");
        // The pod is the same to its user: its volume has what it wrote.
        let starts = scene.exec("fragile", "main", &["cat", "/data/starts"]).await?;
        ensure!(starts == "started\nstarted\n", "{starts:?}");
        Ok(())
    })
}
