//! The real kubelet, standalone, with static pods: what a node's own kubelet will ask of the daemon, without a control plane.
//!
//! Owns its configuration, and what a build machine cannot do is configured away here, visibly. Judges nothing itself: tests look at
//! kubelet's API, at files, and at the host.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::{
    cache, daemon::Daemon, eventually, figures::remove_cgroups, host::Host, host::command,
    tls_front::TlsFront,
};

/// What kubelet appends to the names of static pods.
const NODE_NAME: &str = "node";
/// An address of the host that is not of loopback; kubelet takes no other.
const NODE_ADDRESS: &str = "10.87.0.1";
const PORT: u16 = 10250;
const READ_ONLY_PORT: u16 = 10255;
/// Emulated VMs boot slowly, several at once slower still.
const LIMIT: Duration = Duration::from_secs(180);
/// v1 controllers that kubelet wants below its root; others are used where they are.
const CONTROLLERS: [&str; 10] = [
    "cpu", "cpuacct", "cpuset", "memory", "systemd", "pids", "blkio", "devices", "freezer", "unified",
];
/// Settings of the machine's kernel that kubelet wants changed. No namespace has them, so it gets files instead.
const TUNABLES: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// A running kubelet. Dropping it ends it and removes its cgroups; pods go on until their daemon is dropped.
#[derive(Debug)]
pub struct Kubelet {
    process: Child,
    dir: PathBuf,
    cgroup: String,
    front: TlsFront,
}

impl Kubelet {
    /// Starts kubelet on `daemon`, in the host's namespaces; `more` is merged into its configuration.
    pub async fn start(host: &Host, daemon: &Daemon, more: &Value) -> Result<Self> {
        let dir = host.dir().join("kubelet");
        let cgroup = format!("caisson-e2e-{}", std::process::id());
        prepare(&dir, &cgroup)?;
        configure(&dir, &cgroup, daemon, more)?;
        let kubelet = Self {
            process: spawn(&dir)?,
            dir,
            cgroup,
            front: TlsFront::start(PORT)?,
        };
        kubelet.answers().await
    }

    /// Ends this process as systemd would, and starts another with `more` merged into its configuration; pods go on.
    pub async fn start_again(mut self, daemon: &Daemon, more: &Value) -> Result<Self> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.process.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let process = &mut self.process;
        eventually("the end of kubelet", LIMIT, async || {
            process.try_wait().ok().flatten()
        })
        .await?;
        configure(&self.dir, &self.cgroup, daemon, more)?;
        self.process = spawn(&self.dir)?;
        self.answers().await
    }

    async fn answers(mut self) -> Result<Self> {
        let process = &mut self.process;
        let answered = eventually("kubelet's answer", LIMIT, async || {
            if let Ok(Some(status)) = process.try_wait() {
                return Some(Err(status));
            }
            get(&read_only("/healthz")).ok().map(|_| Ok(()))
        })
        .await;
        match answered {
            Ok(Ok(())) => Ok(self),
            Ok(Err(status)) => bail!("kubelet ended with {status}:\n{}", self.log_tail()),
            Err(error) => Err(error.context(self.log_tail())),
        }
    }

    /// Makes or replaces a static pod; kubelet sees the file.
    pub fn apply(&self, name: &str, spec: &Value) -> Result<()> {
        self.apply_with(name, spec, &json!({}))
    }

    /// The same, with these labels.
    pub fn apply_with(&self, name: &str, spec: &Value, labels: &Value) -> Result<()> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "default", "labels": labels },
            "spec": spec,
        });
        // Renamed into place: kubelet must not read half a file.
        let draft = self.dir.join(format!("{name}.draft"));
        fs::write(&draft, pod.to_string())?;
        fs::rename(draft, self.manifest(name))?;
        Ok(())
    }

    /// Takes a static pod away; kubelet ends it.
    pub fn delete(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.manifest(name))?)
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.dir.join("manifests").join(format!("{name}.json"))
    }

    /// The pod as kubelet's API shows it.
    pub fn pod(&self, name: &str) -> Result<Option<Value>> {
        let full = pod_name(name);
        let pods: Value = serde_json::from_str(&get(&read_only("/pods"))?)?;
        let mut items = pods["items"].as_array().into_iter().flatten();
        Ok(items
            .rfind(|pod| pod["metadata"]["name"] == full.as_str())
            .cloned())
    }

    /// Waits until the pod's API object is as wanted; the error shows the last one.
    pub async fn pod_when(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = None;
        let found = eventually(&format!("{what} of pod {name}"), LIMIT, async || {
            let pod = self.pod(name).ok()??;
            last = Some(pod["status"].clone());
            wanted(&pod).then_some(pod)
        })
        .await;
        found.with_context(|| format!("last status: {:#}\n{}", last.unwrap_or_default(), self.log_tail()))
    }

    /// Waits until kubelet calls the pod ready.
    pub async fn ready(&self, name: &str) -> Result<Value> {
        self.pod_when(name, "readiness", is_ready).await
    }

    /// What kubelet's server answers to a GET of `path`; TLS is taken off by the front.
    pub fn get(&self, path: &str) -> Result<String> {
        get(&self.url(path))
    }

    /// A URL of kubelet's server as the front serves it: without TLS, for clients that know none.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.front.port())
    }

    /// The URL that executes a command in a container of a static pod, as the API server asks for it.
    #[must_use]
    pub fn exec_url(&self, pod: &str, container: &str, words: &[&str], tty: bool) -> String {
        let words: String = words
            .iter()
            .map(|word| format!("&command={}", escaped(word)))
            .collect();
        let streams = if tty {
            "input=1&output=1&tty=1"
        } else {
            "input=1&output=1&error=1"
        };
        self.url(&format!(
            "/exec/default/{}/{container}?{streams}{words}",
            pod_name(pod)
        ))
    }

    /// Resource usage as kubelet sums it up; that of one pod.
    pub fn summary(&self, pod: &str) -> Result<Option<Value>> {
        let full = pod_name(pod);
        let summary: Value = serde_json::from_str(&get(&read_only("/stats/summary"))?)?;
        let mut pods = summary["pods"].as_array().into_iter().flatten();
        Ok(pods
            .rfind(|stats| stats["podRef"]["name"] == full.as_str())
            .cloned())
    }

    /// Directory of kubelet's logs of a pod.
    pub fn log_dir(&self, pod: &Value) -> Result<PathBuf> {
        let text = |field: &str| pod["metadata"][field].as_str().context("a pod without a name");
        // Static pods are known by the hash of their file.
        let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"]
            .as_str()
            .context("not a static pod")?;
        Ok(self
            .dir
            .join("logs")
            .join(format!("{}_{}_{uid}", text("namespace")?, text("name")?)))
    }

    /// The end of what kubelet logged.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.dir.join("kubelet.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(60);
        format!(
            "kubelet's log ends:\n{}",
            lines.get(from..).unwrap_or_default().join("\n")
        )
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _already_reaped = self.process.wait();
        remove_cgroups(&self.cgroup);
    }
}

/// The name that kubelet gives a static pod.
#[must_use]
pub fn pod_name(name: &str) -> String {
    format!("{name}-{NODE_NAME}")
}

/// Whether kubelet calls this pod ready.
#[must_use]
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions
        .filter(|condition| condition["type"] == "Ready")
        .any(|condition| condition["status"] == "True")
}

/// The status of a container of a pod, of those of init containers too.
#[must_use]
pub fn container_status<'a>(pod: &'a Value, name: &str) -> &'a Value {
    ["containerStatuses", "initContainerStatuses"]
        .iter()
        .filter_map(|kind| pod["status"][kind].as_array())
        .flatten()
        .find(|status| status["name"] == name)
        .unwrap_or(&Value::Null)
}

fn read_only(path: &str) -> String {
    format!("http://127.0.0.1:{READ_ONLY_PORT}{path}")
}

fn get(url: &str) -> Result<String> {
    let mut answer = ureq::get(url).call().with_context(|| format!("GET {url}"))?;
    Ok(answer.body_mut().read_to_string()?)
}

/// A word for the query of a URL.
fn escaped(word: &str) -> String {
    word.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

/// Everything that kubelet expects of a node, below `dir` or inside the host's namespaces.
fn prepare(dir: &Path, cgroup: &str) -> Result<()> {
    for part in ["manifests", "lib", "logs", "var-log", "sysctl"] {
        fs::create_dir_all(dir.join(part))?;
    }
    // These paths are compiled into kubelet.
    for (part, point) in [("lib", "/var/lib/kubelet"), ("var-log", "/var/log")] {
        fs::create_dir_all(point)?;
        bind(&dir.join(part), Path::new(point))?;
    }
    for tunable in TUNABLES {
        let real = Path::new("/proc/sys").join(tunable);
        let file = dir.join("sysctl").join(tunable.replace('/', "."));
        if real.exists() {
            fs::write(&file, fs::read(&real)?)?;
            bind(&file, &real)?;
        }
    }
    fs::write(
        dir.join("resolv.conf"),
        "nameserver 10.96.0.10\nsearch node.test\n",
    )?;
    // A root of its own in each hierarchy: the machine's is not a test's to arrange.
    let hierarchies = Path::new("/sys/fs/cgroup");
    if hierarchies.join("cgroup.controllers").exists() {
        fs::create_dir_all(hierarchies.join(cgroup))?;
    } else {
        for controller in CONTROLLERS {
            let hierarchy = hierarchies.join(controller);
            if hierarchy.exists() {
                fs::create_dir_all(hierarchy.join(cgroup))?;
            }
        }
    }
    command(Command::new("ip").args(["link", "add", "node0", "type", "bridge"]))?;
    command(Command::new("ip").args(["addr", "add", &format!("{NODE_ADDRESS}/24"), "dev", "node0"]))?;
    command(Command::new("ip").args(["link", "set", "node0", "up"]))
}

fn configure(dir: &Path, cgroup: &str, daemon: &Daemon, more: &Value) -> Result<()> {
    let socket = format!("unix://{}", daemon.socket().display());
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": socket, "imageServiceEndpoint": socket,
        "staticPodPath": dir.join("manifests"), "podLogsDir": dir.join("logs"), "resolvConf": dir.join("resolv.conf"),
        "address": "127.0.0.1", "port": PORT, "readOnlyPort": READ_ONLY_PORT, "healthzPort": 0,
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        // Tests wait for what kubelet does now and then.
        "fileCheckFrequency": "1s", "syncFrequency": "5s", "containerLogMonitorInterval": "3s",
        "containerLogMaxSize": "32Ki", "containerLogMaxFiles": 3,
        // A build machine may have a v1 hierarchy, swap, a full disk, and no right to lower an OOM score.
        "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{cgroup}"), "failCgroupV1": false, "failSwapOn": false,
        "evictionHard": {}, "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99, "oomScoreAdj": 0,
        "enforceNodeAllocatable": [],
        // No control plane.
        "enableControllerAttachDetach": false,
    });
    let fields = config.as_object_mut().context("not an object")?;
    fields.extend(more.as_object().context("configuration is an object")?.clone());
    fs::write(dir.join("config.json"), config.to_string())?;
    Ok(())
}

fn spawn(dir: &Path) -> Result<Child> {
    let binary = cache().join("bin/kubelet");
    ensure!(
        binary.exists(),
        "{} is missing: run `make kubelet` first",
        binary.display()
    );
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("kubelet.log"))?;
    Command::new(&binary)
        .arg("--config")
        .arg(dir.join("config.json"))
        .args([
            "--hostname-override",
            NODE_NAME,
            "--node-ip",
            NODE_ADDRESS,
            "--v=2",
        ])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", binary.display()))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot mount {} at {}", from.display(), to.display()))
}
