//! Every subcommand of crictl, as a person types it: what it prints, a terminal that is one, and streams over TLS.

use std::{
    fs,
    io::{BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    crictl::Crictl,
    daemon::{Daemon, Product},
    eventually,
    host::{Host, text},
    image,
    registry::Registry,
    run,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// A daemon, a registry with an image, and a person's files.
struct Desk<'a> {
    host: &'a Host,
    crictl: Crictl,
    image: String,
    _daemon: Daemon,
    _registry: Registry,
}

impl<'a> Desk<'a> {
    async fn new(host: &'a Host, more: &[&str]) -> Result<Self> {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("demo/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(host, &Product::find()?, more).await?;
        Ok(Self {
            host,
            crictl: Crictl::new(&daemon)?,
            image,
            _daemon: daemon,
            _registry: registry,
        })
    }

    fn says(&self, words: &[&str]) -> Result<String> {
        self.crictl.run(words)
    }

    /// What it says on an error.
    fn fails(&self, words: &[&str]) -> Result<String> {
        let output = self.crictl.command(words).output()?;
        ensure!(!output.status.success(), "{words:?} succeeded");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let text = self.says(words)?;
        serde_json::from_str(&text).with_context(|| format!("{words:?} printed {text}"))
    }

    fn file(&self, name: &str, content: &Value) -> Result<String> {
        let path = self.host.dir().join(name);
        fs::write(&path, content.to_string())?;
        Ok(path.display().to_string())
    }

    fn pod_file(&self, name: &str) -> Result<String> {
        let pod = json!({
            "metadata": { "name": name, "namespace": "by-hand", "uid": name, "attempt": 1 },
            "hostname": name, "log_directory": self.host.log_dir(name)?, "labels": { "app": name }, "linux": {},
        });
        self.file(&format!("{name}.pod.json"), &pod)
    }

    fn container_file(&self, name: &str, script: &str) -> Result<String> {
        let container = json!({
            "metadata": { "name": name }, "image": { "image": self.image }, "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"), "labels": { "part": name }, "linux": {}, "stdin": true,
        });
        self.file(&format!("{name}.container.json"), &container)
    }

    /// Starts crictl with pipes, for what does not end by itself.
    fn begin(&self, words: &[&str]) -> Result<Running> {
        Running::start(&mut self.crictl.command(words))
    }
}

/// A program whose output is read line by line while it runs. Killed when dropped.
struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    output: BufReader<std::process::ChildStdout>,
    seen: String,
}

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let stdin = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self {
            child,
            stdin,
            output,
            seen: String::new(),
        })
    }

    fn type_in(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input has ended")?;
        stdin.write_all(text.as_bytes())?;
        Ok(stdin.flush()?)
    }

    /// Reads until this has been printed; everything since the last call.
    fn until(&mut self, wanted: &str) -> Result<String> {
        let mut byte = [0];
        let mut printed = Vec::new();
        while !String::from_utf8_lossy(&printed).contains(wanted) {
            ensure!(
                self.output.read(&mut byte)? == 1,
                "it ended without {wanted:?}, after {:?}{:?}",
                self.seen,
                String::from_utf8_lossy(&printed)
            );
            printed.extend(byte);
        }
        let text = String::from_utf8_lossy(&printed).into_owned();
        self.seen.push_str(&text);
        Ok(text)
    }

    /// The rest of what it prints, and how it ends.
    fn end(mut self) -> Result<(String, std::process::ExitStatus)> {
        drop(self.stdin.take());
        let mut rest = String::new();
        self.output.read_to_string(&mut rest)?;
        Ok((rest, self.child.wait()?))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _already_reaped = self.child.wait();
    }
}

#[test]
fn every_subcommand_of_crictl_says_what_is_true() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let desk = Desk::new(&host, &[]).await?;
        the_runtime_and_its_images(&desk)?;

        let mut events = desk.begin(&["events"])?;
        let pod_file = desk.pod_file("desk")?;
        let pod = desk.says(&["runp", &pod_file])?;
        let main = desk.container_file(
            "main",
            "echo begun; echo oops >&2; while read line; do echo got $line; done; exec httpd -f -p 8080 -h /www",
        )?;
        let id = desk.says(&["create", &pod, &main, &pod_file])?;
        ensure!(desk.says(&["ps", "-a"])?.contains("Created"));
        ensure!(desk.says(&["start", &id])? == id);
        for event in ["CREATED", "STARTED"] {
            // The pod's own events carry its id.
            let text = events.until(&format!("CONTAINER_{event}_EVENT"))?;
            ensure!(
                text.contains(&format!("\"containerId\":  \"{pod}\"")) || text.contains(&id),
                "{text}"
            );
        }
        what_lists_and_inspections_say(&desk, &pod, &id)?;
        logs_and_attach(&desk, &id)?;
        port_forward(&desk, &pod).await?;
        usage_and_limits(&desk, &pod, &id)?;

        // What is refused says why, in one line for people.
        let error = desk.fails(&["checkpoint", "--export", "/tmp/nowhere.tar", &id])?;
        ensure!(
            error.contains("Unimplemented") && error.to_lowercase().contains("checkpoint"),
            "{error}"
        );
        ensure!(desk.fails(&["inspect", "nosuch"])?.contains("no container"));
        ensure!(desk.fails(&["rm", &id])?.contains("running"));
        ensure!(desk.fails(&["rmp", &pod])?.contains("running"));
        ensure!(desk.fails(&["rmi", "no/such:1"])?.contains("no such image"));
        ensure!(
            desk.fails(&["pull", &desk.image.replace("busybox", "nosuch")])?
                .contains("404 Not Found")
        );

        // Down again, step by step.
        ensure!(desk.says(&["stop", "-t", "0", &id])? == id);
        events.until("CONTAINER_STOPPED_EVENT")?;
        ensure!(desk.says(&["ps", "-a", "--state", "exited", "-q"])? == id);
        ensure!(desk.says(&["rm", &id])? == id);
        events.until("CONTAINER_DELETED_EVENT")?;
        ensure!(desk.says(&["ps", "-aq"])?.is_empty());
        ensure!(desk.says(&["stopp", &pod])?.contains(&pod));
        ensure!(desk.says(&["pods", "--state", "notready", "-q"])? == pod);
        ensure!(desk.says(&["rmp", &pod])?.contains(&pod));
        ensure!(desk.says(&["pods", "-q"])?.is_empty());
        drop(events);

        // Pod and container in one go, and all of it away by force.
        let quick = desk.container_file("quick", "echo quick; sleep 100000")?;
        let id = desk.says(&["run", &quick, &desk.pod_file("other")?])?;
        ensure!(desk.says(&["ps", "-q"])? == id);
        desk.says(&["rmp", "-fa"])?;
        ensure!(desk.says(&["ps", "-aq"])?.is_empty() && desk.says(&["pods", "-q"])?.is_empty());
        ensure!(desk.says(&["rmi", &desk.image])?.contains("Deleted"));
        ensure!(desk.says(&["images", "-q"])?.is_empty());
        host.leftovers()?.nothing_new_since(&before)
    })
}

fn the_runtime_and_its_images(desk: &Desk<'_>) -> Result<()> {
    let version = desk.says(&["version"])?;
    ensure!(
        version.contains("RuntimeName:  caisson") && version.contains("RuntimeApiVersion:  v1"),
        "{version}"
    );
    let info = desk.json(&["info"])?;
    let conditions = info["status"]["conditions"].as_array().context("no conditions")?;
    for kind in ["RuntimeReady", "NetworkReady"] {
        ensure!(
            conditions
                .iter()
                .any(|condition| condition["type"] == kind && condition["status"] == true),
            "{info:#}"
        );
    }
    // What is not there is left out, and not the word "null".
    ensure!(!info.to_string().contains("\"null\""), "{info:#}");
    ensure!(desk.says(&["runtime-config"])?.contains("CGROUPFS"));
    desk.says(&["update-runtime-config", "--pod-cidr", "10.88.0.0/16"])?;
    ensure!(desk.json(&["info"])?["podCIDR"] == "10.88.0.0/16");
    let config = desk.host.dir().join("crictl.yaml").display().to_string();
    fs::write(&config, "")?;
    let crictl = |words: &[&str]| {
        text(
            Command::new(desk.crictl.binary())
                .args(["--config", &config])
                .args(words),
        )
    };
    crictl(&["config", "--set", "timeout=60"])?;
    ensure!(
        crictl(&["config", "--get", "timeout"])?.trim() == "60s"
            || crictl(&["config", "--get", "timeout"])?.trim() == "60"
    );

    ensure!(desk.says(&["pull", &desk.image])?.contains("sha256:"));
    let images = desk.says(&["images"])?;
    ensure!(
        images.contains("demo/busybox") && images.contains("MB"),
        "{images}"
    );
    let status = &desk.json(&["inspecti", &desk.image])?["status"];
    ensure!(
        status["repoTags"] == json!([desk.image]) && status["size"] != "0",
        "{status:#}"
    );
    let usage = desk.json(&["imagefsinfo"])?;
    ensure!(
        usage["status"]["imageFilesystems"][0]["usedBytes"]["value"] != "0",
        "{usage:#}"
    );
    ensure!(
        desk.says(&["metricdescs"])?
            .contains("container_memory_working_set_bytes")
    );
    Ok(())
}

fn what_lists_and_inspections_say(desk: &Desk<'_>, pod: &str, id: &str) -> Result<()> {
    let short = |id: &str| id.chars().take(13).collect::<String>();
    let pods = desk.says(&["pods", "--label", "app=desk"])?;
    for word in [&short(pod), "Ready", "desk", "by-hand"] {
        ensure!(pods.contains(word), "no {word:?}: {pods}");
    }
    ensure!(desk.says(&["pods", "--name", "other", "-q"])?.is_empty());
    let containers = desk.says(&["ps", "--label", "part=main", "--pod", &short(pod)])?;
    for word in [&short(id), "Running", "main", "demo/busybox"] {
        ensure!(containers.contains(word), "no {word:?}: {containers}");
    }
    let status = &desk.json(&["inspectp", &short(pod)])?;
    ensure!(
        status["status"]["state"] == "SANDBOX_READY"
            && status["status"]["network"]["ip"]
                .as_str()
                .is_some_and(|ip| ip.starts_with("10.88."))
            && status["info"]["vm"]["vcpus"] == 1,
        "{status:#}"
    );
    let status = &desk.json(&["inspect", &short(id)])?;
    ensure!(
        status["status"]["state"] == "CONTAINER_RUNNING"
            && status["status"]["logPath"]
                .as_str()
                .is_some_and(|path| path.ends_with("/main.log"))
            && status["status"]["imageId"]
                .as_str()
                .is_some_and(|id| id.starts_with("sha256:")),
        "{status:#}"
    );
    for words in [["inspect", "-o", "table", id], ["inspectp", "-o", "table", pod]] {
        ensure!(desk.says(&words)?.contains("State") || desk.says(&words)?.contains("Status"));
    }
    Ok(())
}

fn logs_and_attach(desk: &Desk<'_>, id: &str) -> Result<()> {
    let mut follower = desk.begin(&["logs", "-f", "-s", "stdout", id])?;
    follower.until("begun\n")?;
    ensure!(
        desk.says(&["logs", "-s", "stderr", id])?.is_empty()
            || desk.says(&["logs", "-s", "stdout", id])? == "begun"
    );
    let mut attached = desk.begin(&["attach", "-i", id])?;
    attached.type_in("one\n")?;
    attached.until("got one\n")?;
    follower.until("got one\n")?;
    let stamped = desk.says(&["logs", "-t", "--tail", "1", id])?;
    ensure!(
        stamped.contains("stdout F got one") || stamped.ends_with("got one"),
        "{stamped}"
    );
    desk.says(&["logs", "--reopen", id])?;
    attached.type_in("two\n")?;
    follower.until("got two\n")?;
    Ok(())
}

async fn port_forward(desk: &Desk<'_>, pod: &str) -> Result<()> {
    let web = desk.container_file("web", "exec httpd -f -p 8081 -h /www")?;
    let id = desk.says(&["create", pod, &web, &desk.pod_file("desk")?])?;
    desk.says(&["start", &id])?;
    eventually("the server's listening", LIMIT, async || {
        desk.says(&[
            "exec",
            "-s",
            &id,
            "grep",
            "-qi",
            ":1F91 .* 0A ",
            "/proc/net/tcp",
            "/proc/net/tcp6",
        ])
        .ok()
    })
    .await?;
    let mut forward = desk.begin(&["port-forward", pod, "0:8081"])?;
    let line = forward.until("\n")?;
    let address = line
        .split_whitespace()
        .find(|word| word.starts_with("127.0.0.1:"))
        .with_context(|| format!("crictl printed {line:?}"))?;
    let mut page = ureq::get(format!("http://{address}/index.html")).call()?;
    ensure!(page.body_mut().read_to_string()?.contains("hello from a microVM"));
    drop(forward);
    desk.says(&["rm", "-f", &id])?;
    Ok(())
}

fn usage_and_limits(desk: &Desk<'_>, pod: &str, id: &str) -> Result<()> {
    let stats = desk.says(&["stats", id])?;
    ensure!(
        stats.contains(&id[..13]) && stats.contains("main") && stats.contains("kB"),
        "{stats}"
    );
    let stats = &desk.json(&["stats", "-o", "json", id])?["stats"][0];
    ensure!(stats["memory"]["workingSetBytes"]["value"] != "0", "{stats:#}");
    ensure!(desk.says(&["statsp", "--id", pod])?.contains("desk"));
    let metrics = desk.says(&["metricsp"])?;
    ensure!(
        metrics.contains("container_network_receive_bytes_total") && metrics.contains(pod),
        "{metrics}"
    );
    desk.says(&[
        "update",
        "--memory",
        "67108864",
        "--cpu-quota",
        "50000",
        "--cpu-period",
        "100000",
        id,
    ])?;
    let resources = &desk.json(&["inspect", id])?["status"]["resources"]["linux"];
    ensure!(
        resources["memoryLimitInBytes"] == "67108864" && resources["cpuQuota"] == "50000",
        "{resources:#}"
    );
    let limit = desk.says(&["exec", "-s", id, "cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(limit == "67108864", "{limit}");
    Ok(())
}

/// A terminal of its own for crictl, made by script(1), with an initial size.
fn on_a_terminal(desk: &Desk<'_>, words: &[&str]) -> Result<Running> {
    let program = desk.crictl.command(words);
    let quoted: Vec<String> = std::iter::once(program.get_program())
        .chain(program.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let shell = format!("stty cols 97 rows 41; tty; exec {}", quoted.join(" "));
    Running::start(Command::new("script").args(["-q", "-e", "-c", &shell, "/dev/null"]))
}

#[test]
fn a_terminal_is_one_from_the_keyboard_to_the_process() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let desk = Desk::new(&host, &[]).await?;
        desk.says(&["pull", &desk.image])?;
        let sleeper = desk.container_file("sleeper", "sleep 1000000")?;
        let id = desk.says(&["run", &sleeper, &desk.pod_file("terminal")?])?;
        for transport in ["spdy", "websocket"] {
            let mut shell = on_a_terminal(&desk, &["exec", "-r", transport, "-it", &id, "sh"])?;
            let terminal = shell.until("\n")?.trim().to_owned();
            ensure!(terminal.starts_with("/dev/pts/"), "{terminal:?}");
            shell.until("# ")?;
            shell.type_in("tty; stty size; echo TERM=$TERM\n")?;
            // What is typed is echoed, by the terminal in the pod.
            let text = shell.until("TERM=xterm\r\n")?;
            ensure!(
                text.contains("echo TERM=$TERM\r\n")
                    && text.contains("/dev/pts/")
                    && text.contains("41 97\r\n"),
                "{transport}: {text:?}"
            );
            // The window is made larger while it runs.
            caisson_e2e::host::command(
                Command::new("stty").args(["-F", &terminal, "cols", "120", "rows", "50"]),
            )?;
            eventually("the new size in the pod", LIMIT, async || {
                shell.type_in("stty size; echo asked\n").ok()?;
                shell.until("echo asked\r\n").ok()?;
                shell.until("asked\r\n").ok()?.contains("50 120").then_some(())
            })
            .await?;
            // Ctrl-C is for the command, not for crictl.
            shell.type_in("sleep 54321; echo ended by $?\n")?;
            shell.until("ended by $?\r\n")?;
            eventually("the sleep", LIMIT, async || {
                let processes = desk.says(&["exec", "-s", &id, "ps"]).ok()?;
                processes.contains("sleep 54321").then_some(())
            })
            .await?;
            shell.type_in("\u{3}")?;
            // ash goes back to its prompt; a shell that carries on says 130.
            shell.until("# ")?;
            shell.type_in("exit 7\n")?;
            let (_, status) = shell.end()?;
            ensure!(
                !status.success(),
                "{transport}: a shell that ended with 7 was a success"
            );
        }

        // Attach to a container's own terminal.
        let own = json!({
            "metadata": { "name": "own" }, "image": { "image": desk.image }, "command": ["sh"], "log_path": "own.log",
            "stdin": true, "tty": true, "linux": {},
        });
        let pod = desk.says(&["pods", "-q"])?;
        let own = desk.says(&[
            "create",
            &pod,
            &desk.file("own.json", &own)?,
            &desk.pod_file("terminal")?,
        ])?;
        desk.says(&["start", &own])?;
        let mut shell = on_a_terminal(&desk, &["attach", "-it", &own])?;
        shell.until("\n")?;
        shell.type_in("stty size; echo is $((40 + 2))\n")?;
        let text = shell.until("is 42\r\n")?;
        ensure!(text.contains("41 97"), "{text:?}");
        shell.type_in("exit\n")?;
        shell.end()?;
        desk.says(&["rmp", "-fa"])?;
        Ok(())
    })
}

/// A certificate for localhost that signs itself, and its key.
fn certificate(dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let (certificate, key) = (dir.join("streaming.crt"), dir.join("streaming.key"));
    fs::write(&certificate, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    Ok((certificate, key))
}

#[test]
fn streams_go_over_tls_where_it_is_configured() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let (certificate, key) = certificate(host.dir())?;
        let config = host.dir().join("config.toml");
        fs::write(
            &config,
            format!(
                "[streaming]\ntls_cert_file = {:?}\ntls_key_file = {:?}\n",
                certificate.display().to_string(),
                key.display().to_string()
            ),
        )?;
        let desk = Desk::new(&host, &["--config", &config.display().to_string()]).await?;
        desk.says(&["pull", &desk.image])?;
        let echo = desk.container_file("echo", "while read line; do echo got $line; done")?;
        let id = desk.says(&["run", &echo, &desk.pod_file("private")?])?;
        // crictl wants a certificate of its own as well; nobody looks at it.
        let (authority, key) = (certificate.display().to_string(), key.display().to_string());
        let tls = [
            "--tls-ca",
            &authority,
            "--tls-cert",
            &authority,
            "--tls-key",
            &key,
        ];
        for transport in ["spdy", "websocket"] {
            let words = [&["exec", "-r", transport], &tls[..], &["-i", &id, "cat"]].concat();
            let mut cat = desk.begin(&words)?;
            cat.type_in("over TLS\n")?;
            cat.until("over TLS\n")?;
            let (_, status) = cat.end()?;
            ensure!(status.success(), "{transport}: {status}");
        }
        let mut attached = desk.begin(&[&["attach"], &tls[..], &["-i", &id]].concat())?;
        attached.type_in("hello\n")?;
        attached.until("got hello\n")?;
        drop(attached);
        // Without an authority crictl trusts anybody; with another one it does not.
        ensure!(desk.says(&["exec", &id, "echo", "hi"])? == "hi");
        let other = host.dir().join("other");
        fs::create_dir(&other)?;
        let stranger = self::certificate(&other)?.0.display().to_string();
        let tls = ["--tls-ca", &stranger, "--tls-cert", &authority, "--tls-key", &key];
        let error = desk.fails(&[&["exec"], &tls[..], &[&id, "true"]].concat())?;
        ensure!(error.contains("certificate"), "{error}");
        desk.says(&["rmp", "-fa"])?;
        Ok(())
    })
}
