//! A node of its own for each test: a process in new network and mount namespaces, with real CNI plugins.
//!
//! The test process starts itself again under unshare(1), so that nothing a test does can reach the host, and tests run side by side.
#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use caisson_net::{Network, NetworkConfig, PodNetworkSpec};
use serde_json::{Value, json};

const INSIDE: &str = "CAISSON_NET_TEST_INSIDE";
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
/// For whatever a test waits for; only reached when the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What a test runs on.
pub(crate) struct Node {
    pub(crate) root: PathBuf,
    pub(crate) config: NetworkConfig,
    pub(crate) network: Network,
}

/// Runs the calling test on a node of its own; `propagation` is how mounts reach other namespaces (private or shared).
pub(crate) fn on_a_node_with(propagation: &str, test: impl AsyncFnOnce(Node)) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(async { test(Node::new()).await });
    }
    if let Some(reason) = reason_to_skip() {
        eprintln!("SKIPPED: {reason}");
        return;
    }
    let name = std::thread::current().name().unwrap().to_owned();
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", propagation])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "on the node: {text}");
    assert!(
        text.contains("1 passed"),
        "the test was not found on the node: {text}"
    );
}

pub(crate) fn on_a_node(test: impl AsyncFnOnce(Node)) {
    on_a_node_with("private", test);
}

fn reason_to_skip() -> Option<String> {
    for (program, args) in [
        ("unshare", ["--net", "--mount", "true"].as_slice()),
        ("iptables", &["--version"]),
    ] {
        match Command::new(program).args(args).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                return Some(format!(
                    "{program}: {}",
                    String::from_utf8_lossy(&output.stderr).trim()
                ));
            }
            Err(error) => return Some(format!("{program}: {error}")),
        }
    }
    match PLUGINS
        .iter()
        .any(|directory| Path::new(directory).join("bridge").exists())
    {
        true => None,
        false => Some(format!("no CNI plugins in {PLUGINS:?}")),
    }
}

impl Node {
    fn new() -> Self {
        // The lock of iptables and all that a plugin keeps must be this node's own.
        run("mount", &["-t", "tmpfs", "none", "/run"]);
        run("ip", &["link", "set", "lo", "up"]);
        // Processes of plugins are known by its paths, and /proc is everybody's.
        let root = PathBuf::from(format!("/run/node-{}", std::process::id()));
        let own = root.join("plugins");
        fs::create_dir_all(&own).unwrap();
        fs::create_dir_all(root.join("conf")).unwrap();
        let example = std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .with_file_name("examples")
            .join("fake-cni");
        assert!(
            example.exists(),
            "{} is missing: `cargo build -p caisson-net --examples`",
            example.display()
        );
        std::os::unix::fs::symlink(example, own.join("fake-cni")).unwrap();
        let config = NetworkConfig {
            plugin_dirs: std::iter::once(own).chain(PLUGINS.map(PathBuf::from)).collect(),
            conf_dir: root.join("conf"),
            cache_dir: root.join("cache"),
            netns_dir: root.join("netns"),
            plugin_deadline: PATIENCE,
        };
        Self {
            network: Network::new(config.clone()),
            config,
            root,
        }
    }

    /// A network whose plugins have this long.
    pub(crate) fn with_deadline(mut self, deadline: Duration) -> Self {
        self.config.plugin_deadline = deadline;
        self.network = Network::new(self.config.clone());
        self
    }

    pub(crate) fn write_conflist(&self, version: &str, plugins: &[Value]) {
        let list = json!({ "cniVersion": version, "name": "pods", "plugins": plugins });
        fs::write(self.config.conf_dir.join("10-pods.conflist"), list.to_string()).unwrap();
    }

    /// host-local with an IPv4 and an IPv6 range.
    pub(crate) fn ipam(&self) -> Value {
        json!({
            "type": "host-local",
            "dataDir": self.root.join("leases"),
            "ranges": [[{ "subnet": "10.88.0.0/16" }], [{ "subnet": "fd00:88::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]
        })
    }

    pub(crate) fn bridge(&self) -> Value {
        json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "mtu": 1420, "ipam": self.ipam() })
    }

    pub(crate) fn fake(&self, behaviour: Value) -> Value {
        json!({
            "type": "fake-cni", "log": self.root.join("calls"), "behaviour": behaviour,
            "capabilities": { "portMappings": true }
        })
    }

    /// Calls of the fake plugin so far.
    pub(crate) fn calls(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.root.join("calls")).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    pub(crate) fn commands(&self) -> Vec<String> {
        self.calls()
            .iter()
            .map(|call| call["command"].as_str().unwrap().to_owned())
            .collect()
    }

    /// All that a pod's network could leave behind.
    pub(crate) fn inventory(&self) -> BTreeMap<String, BTreeSet<String>> {
        let lines = |text: String| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        let mut all = BTreeMap::new();
        let links = lines(run("ip", &["-o", "link"]));
        all.insert(
            "links".into(),
            links
                .iter()
                .filter_map(|l| l.split(": ").nth(1))
                .map(str::to_owned)
                .collect(),
        );
        for program in ["iptables-save", "ip6tables-save"] {
            let rules = lines(run(program, &[]));
            let rules = rules.into_iter().filter(|line| !line.starts_with('#'));
            let rules = rules.map(|line| line.split(" [").next().unwrap_or_default().to_owned());
            all.insert(program.into(), rules.collect());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        all.insert(
            "mounts".into(),
            mounts
                .lines()
                .filter_map(|l| l.split(' ').nth(4))
                .map(str::to_owned)
                .collect(),
        );
        for (name, path) in [
            ("namespaces", self.config.netns_dir.clone()),
            ("cache", self.config.cache_dir.join("results")),
            ("cache root", self.config.cache_dir.clone()),
            ("leases", self.root.join("leases/pods")),
        ] {
            let files = fs::read_dir(path)
                .into_iter()
                .flatten()
                .map(|e| e.unwrap().file_name());
            let files = files.map(|name| name.to_string_lossy().into_owned());
            // host-local's own memory, not a lease.
            all.insert(
                name.into(),
                files
                    .filter(|n| !n.starts_with("last_reserved") && n != "lock")
                    .collect(),
            );
        }
        let open = fs::read_dir("/proc/self/fd")
            .unwrap()
            .map(|e| fs::read_link(e.unwrap().path()));
        let open = open.flatten().map(|to| to.to_string_lossy().into_owned());
        all.insert(
            "descriptors".into(),
            open.filter(|to| to.contains("tun") || to.contains("net:"))
                .collect(),
        );
        all
    }

    /// Runs a pod through once, so that what plugins make for the first pod and keep (bridge, chains) is there.
    pub(crate) async fn warm_up(&self, spec: &PodNetworkSpec) {
        drop(self.network.setup("warm", spec).await.unwrap());
        self.network.teardown("warm", spec).await.unwrap();
    }
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a program in a pod's namespace.
pub(crate) fn run_in(netns: &Path, args: &[&str]) -> String {
    let net = format!("--net={}", netns.display());
    run("nsenter", &[&[net.as_str()], args].concat())
}

/// Waits until it holds.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
