//! Configuration: files, then flags, then validation, with every problem told at once.
//!
//! `/etc/caisson/config.toml`, then `config.d/*.toml` beside it in lexical order (a later file wins key by key, a list as a whole), then the
//! flags of the command line. What comes out is complete and usable: nothing below asks again.

mod cgroup_driver;
mod files;
mod nri;
mod reader;
mod signatures;

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::VmUser;
use caisson_image::ImageStoreConfig;
use caisson_net::NetworkConfig;
use caisson_qemu::Accelerator;
use caisson_sandbox::{AppArmorSettings, SandboxesConfig};
use caisson_streaming::{Config as StreamingConfig, TlsFiles};
use serde_json::json;

pub use cgroup_driver::CgroupDriver;
pub use files::Merged;
pub use nri::{DEFAULT_SOCKET as DEFAULT_NRI_SOCKET, NriConfig};
use reader::Section;

/// Where the configuration is looked for when no flag names a file.
pub const DEFAULT_FILE: &str = "/etc/caisson/config.toml";

/// File name of the vsock helper, which is looked for beside the daemon and then in [`LIBEXEC`].
pub const VSOCK_BACKEND: &str = "caisson-vhost-vsock";

/// File name of the built-in VMM, which is looked for in the same places.
pub const VMM: &str = "caisson-vmm";

/// File name of the helper that serves shared volumes, looked for in the same places.
pub const FILE_SERVER: &str = "caisson-file-server";
/// The process that reads image layers.
pub const LAYER_CONVERTER: &str = "caisson-layer-converter";

const LIBEXEC: &str = "/usr/libexec/caisson";

/// Everything that is configured, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// The daemon itself.
    pub daemon: Daemon,
    /// What every VM boots.
    pub guest: Guest,
    /// How large VMs are.
    pub vm: VmSize,
    /// Which driver runs them.
    pub hypervisor: HypervisorChoice,
    /// AppArmor profiles of the node.
    pub apparmor: AppArmorSettings,
    /// CNI.
    pub network: NetworkConfig,
    /// The image store.
    pub images: ImageStoreConfig,
    /// The server of exec, attach and port-forward.
    pub streaming: StreamingConfig,
    /// Plugins of the Node Resource Interface; `None`: switched off.
    pub nri: Option<NriConfig>,
}

/// The daemon itself.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Durable state.
    pub root: PathBuf,
    /// Sockets and logs of VMs; gone after a reboot.
    pub run_dir: PathBuf,
    /// The CRI socket.
    pub socket: PathBuf,
    /// Which driver kubelet is told to use.
    pub cgroup_driver: CgroupDriver,
    /// Filter for the log, as tracing's `EnvFilter` reads it.
    pub log: String,
}

/// What every VM boots.
#[derive(Debug, Clone)]
pub struct Guest {
    /// vmlinux or bzImage.
    pub kernel: PathBuf,
    /// The agent's archive.
    pub initramfs: PathBuf,
    /// More words for the kernel command line.
    pub cmdline: Vec<String>,
}

/// How large VMs are, and how long they may take.
#[derive(Debug, Clone)]
pub struct VmSize {
    /// Memory without limits, MiB.
    pub default_memory_mib: u64,
    /// vCPUs without limits.
    pub default_vcpus: u32,
    /// What a VM may grow to, MiB; 0: the host's memory.
    pub max_memory_mib: u64,
    /// vCPUs that a VM may grow to; 0: those of the boot.
    pub max_vcpus: u32,
    /// What guest kernel and agent need beyond the containers' limits, MiB.
    pub guest_overhead_mib: u64,
    /// What is kept of the pod's cgroup for VMM and helpers, MiB.
    pub host_reserve_mib: u64,
    /// Each pod's writable disk (sparse), MiB.
    pub scratch_mib: u64,
    /// Images that one VM can have attached.
    pub attach_slots: u32,
    /// The helper that serves shared volumes.
    pub file_server: PathBuf,
    /// Size of the disk that an emptyDir gets, MiB.
    pub empty_dir_mib: u64,
    /// From RunPodSandbox to an answering agent.
    pub boot_deadline: Duration,
    /// For each call to the agent.
    pub agent_deadline: Duration,
}

/// Which driver runs VMs.
#[derive(Debug, Clone)]
pub struct HypervisorChoice {
    /// The driver.
    pub driver: Driver,
    /// The built-in VMM's program.
    pub vmm: PathBuf,
    /// How QEMU executes guest code; `tcg` also rules out the built-in VMM.
    pub accelerator: Accelerator,
    /// `qemu-system-x86_64`; absent: from PATH.
    pub qemu: Option<PathBuf>,
    /// The vsock helper.
    pub vsock_backend: PathBuf,
    /// Whom the VMs' processes run as.
    pub user: VmUser,
    /// Transparent huge pages for guests of the built-in VMM.
    pub huge_pages: bool,
}

/// A hypervisor driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// The best one for this host.
    Auto,
    /// Our own VMM.
    Builtin,
    /// QEMU.
    Qemu,
}

/// What is wrong with the configuration: every problem, each with the file and key it comes from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigProblems(pub Vec<String>);

impl fmt::Display for ConfigProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} problem(s)", self.0.len())?;
        for problem in &self.0 {
            write!(f, "\n  - {problem}")?;
        }
        Ok(())
    }
}

/// What the command line says about the configuration; each given flag wins over the files.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Configuration (each flag wins over the files)")]
pub struct Overrides {
    /// Durable state: images, writable disks, the journal of pods [default: /var/lib/caisson]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,
    /// Sockets and logs of VMs [default: /run/caisson]
    #[arg(long, value_name = "DIR", global = true)]
    pub run_dir: Option<PathBuf>,
    /// The CRI socket that kubelet and crictl connect to [default: unix:///run/caisson/caisson.sock]
    #[arg(long, value_name = "unix://PATH", global = true)]
    pub listen: Option<String>,
    /// Directory with the CNI configuration [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR", global = true)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Directory with CNI plugins; may be repeated, the first match wins [default: /opt/cni/bin and /usr/lib/cni]
    #[arg(long, value_name = "DIR", global = true)]
    pub cni_bin_dir: Vec<PathBuf>,
    /// Guest kernel [default: /usr/lib/caisson/guest/vmlinuz]
    #[arg(long, value_name = "FILE", global = true)]
    pub kernel: Option<PathBuf>,
    /// Guest initramfs with the agent [default: /usr/lib/caisson/guest/initramfs.cpio]
    #[arg(long, value_name = "FILE", global = true)]
    pub initramfs: Option<PathBuf>,
    /// Registry (host:port) that is spoken to over plain HTTP; may be repeated
    #[arg(long, value_name = "HOST:PORT", global = true)]
    pub insecure_registry: Vec<String>,
    /// Socket where NRI plugins connect [default: /var/run/nri/nri.sock]
    #[arg(long, value_name = "PATH", global = true)]
    pub nri_socket: Option<PathBuf>,
    /// Driver that runs the VMs: auto, builtin or qemu [default: auto]
    #[arg(long, value_name = "DRIVER", global = true)]
    pub hypervisor: Option<String>,
    /// What is logged: error, warn, info, debug, or a filter such as caisson_sandbox=debug,info [default: info]
    #[arg(long, value_name = "FILTER", global = true)]
    pub log: Option<String>,
}

impl Overrides {
    fn apply(&self, merged: &mut Merged) {
        // A person at a shell means a path from where he stands.
        let text = |path: &Path| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            toml::Value::String(path.to_string_lossy().into_owned())
        };
        let texts = |list: &[PathBuf]| toml::Value::Array(list.iter().map(|path| text(path)).collect());
        let paths = [
            ("root", "--root", &self.root),
            ("run_dir", "--run-dir", &self.run_dir),
            ("network.conf_dir", "--cni-conf-dir", &self.cni_conf_dir),
            ("guest.kernel", "--kernel", &self.kernel),
            ("guest.initramfs", "--initramfs", &self.initramfs),
            ("nri.socket", "--nri-socket", &self.nri_socket),
        ];
        for (key, flag, value) in paths {
            if let Some(path) = value {
                merged.set(key, text(path), flag);
            }
        }
        let words = [
            ("listen", "--listen", &self.listen),
            ("hypervisor.driver", "--hypervisor", &self.hypervisor),
            ("log", "--log", &self.log),
        ];
        for (key, flag, value) in words {
            if let Some(word) = value {
                merged.set(key, toml::Value::String(word.clone()), flag);
            }
        }
        if !self.cni_bin_dir.is_empty() {
            merged.set("network.plugin_dirs", texts(&self.cni_bin_dir), "--cni-bin-dir");
        }
        if !self.insecure_registry.is_empty() {
            let list = self.insecure_registry.iter().cloned().map(toml::Value::String);
            merged.set(
                "images.insecure_registries",
                toml::Value::Array(list.collect()),
                "--insecure-registry",
            );
        }
    }
}

impl Config {
    /// Reads, merges and validates. `file` given: it must exist; absent: the default one may be missing.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigProblems> {
        let mut merged = match file {
            Some(file) => Merged::read(file, true),
            None => Merged::read(Path::new(DEFAULT_FILE), false),
        };
        overrides.apply(&mut merged);
        Self::validate(merged)
    }

    fn validate(merged: Merged) -> Result<Self, ConfigProblems> {
        let mut top = Section::top(merged);
        let daemon = daemon(&mut top);
        let guest = guest(&mut top);
        let vm = vm(&mut top);
        let hypervisor = hypervisor(&mut top);
        let apparmor = apparmor(&mut top);
        let network = network(&mut top, &daemon);
        let images = images(&mut top, &daemon);
        let streaming = streaming(&mut top);
        let nri = nri::nri(&mut top);
        let problems = top.finish();
        if !problems.is_empty() {
            return Err(ConfigProblems(problems));
        }
        Ok(Self {
            daemon,
            guest,
            vm,
            hypervisor,
            apparmor,
            network,
            images,
            streaming,
            nri,
        })
    }

    /// What the sandbox room is opened with.
    #[must_use]
    pub fn sandboxes(&self) -> SandboxesConfig {
        SandboxesConfig {
            root: self.daemon.root.join("sandboxes"),
            run: self.daemon.run_dir.clone(),
            kernel: self.guest.kernel.clone(),
            initramfs: self.guest.initramfs.clone(),
            cmdline: self.guest.cmdline.clone(),
            default_memory_mib: self.vm.default_memory_mib,
            default_vcpus: self.vm.default_vcpus,
            max_memory_mib: self.vm.max_memory_mib,
            max_vcpus: self.vm.max_vcpus,
            guest_overhead_mib: self.vm.guest_overhead_mib,
            host_reserve_mib: self.vm.host_reserve_mib,
            scratch_bytes: self.vm.scratch_mib << 20,
            file_server: self.vm.file_server.clone(),
            empty_dir_bytes: self.vm.empty_dir_mib << 20,
            apparmor: self.apparmor.clone(),
            attach_slots: self.vm.attach_slots,
            boot_deadline: self.vm.boot_deadline,
            agent_deadline: self.vm.agent_deadline,
        }
    }

    /// The effective configuration, for people.
    #[must_use]
    pub fn summary(&self) -> serde_json::Value {
        json!({
            "root": self.daemon.root,
            "runDir": self.daemon.run_dir,
            "socket": self.daemon.socket,
            "kernel": self.guest.kernel,
            "initramfs": self.guest.initramfs,
            "cmdline": self.guest.cmdline,
            "driver": format!("{:?}", self.hypervisor.driver).to_lowercase(),
            "accelerator": format!("{:?}", self.hypervisor.accelerator).to_lowercase(),
            "vmm": self.hypervisor.vmm,
            "vsockBackend": self.hypervisor.vsock_backend,
            "user": self.hypervisor.user.to_string(),
            "hugePages": self.hypervisor.huge_pages,
            "defaultMemoryMiB": self.vm.default_memory_mib,
            "defaultVcpus": self.vm.default_vcpus,
            "maxMemoryMiB": self.vm.max_memory_mib,
            "maxVcpus": self.vm.max_vcpus,
            "guestOverheadMiB": self.vm.guest_overhead_mib,
            "hostReserveMiB": self.vm.host_reserve_mib,
            "scratchMiB": self.vm.scratch_mib,
            "attachSlots": self.vm.attach_slots,
            "emptyDirMiB": self.vm.empty_dir_mib,
            "fileServer": self.vm.file_server,
            "cgroupDriver": self.daemon.cgroup_driver.as_str(),
            "apparmorProfileDir": self.apparmor.directory,
            "apparmorParser": self.apparmor.parser,
            "cniConfDir": self.network.conf_dir,
            "cniPluginDirs": self.network.plugin_dirs,
            "layerConverter": self.images.converter,
            "insecureRegistries": self.images.insecure_registries,
            "mirrors": self.images.mirrors,
            "hostsDirs": self.images.hosts_dirs,
            "authFiles": self.images.auth_files,
            "signatureRules": self.images.signatures.keys().collect::<Vec<_>>(),
            "streamingListen": self.streaming.listen.to_string(),
            "streamingTls": self.streaming.tls.is_some(),
            "nri": nri::summary(self.nri.as_ref()),
            "streamingIdleTimeoutSeconds": self.streaming.idle_timeout.as_secs(),
        })
    }
}

fn daemon(top: &mut Section) -> Daemon {
    let root = top.absolute("root", "/var/lib/caisson");
    let run_dir = top.absolute("run_dir", "/run/caisson");
    let listen = top.text("listen");
    let socket = match listen {
        None => run_dir.join("caisson.sock"),
        Some(text) => {
            let path = PathBuf::from(text.strip_prefix("unix://").unwrap_or(&text));
            if !path.is_absolute() {
                top.problem("listen", format!("{text:?} is not unix:// and an absolute path"));
            }
            path
        }
    };
    if socket.as_os_str().len() > 100 {
        top.problem(
            "listen",
            format!("{} is too long for a Unix socket", socket.display()),
        );
    }
    let driver = top.text("cgroup_driver").unwrap_or_else(|| "cgroupfs".into());
    let cgroup_driver = CgroupDriver::parse(&driver).unwrap_or_else(|| {
        let reason = format!("{driver:?} is none of \"cgroupfs\", \"systemd\" and \"auto\"");
        top.problem("cgroup_driver", reason);
        CgroupDriver::Cgroupfs
    });
    let log = top.text("log").unwrap_or_else(|| "info".into());
    if let Err(error) = tracing_subscriber::EnvFilter::try_new(&log) {
        top.problem("log", format!("{log:?} is not a log filter: {error}"));
    }
    Daemon {
        root,
        run_dir,
        socket,
        cgroup_driver,
        log,
    }
}

fn guest(top: &mut Section) -> Guest {
    top.section("guest", |guest| Guest {
        kernel: guest.absolute("kernel", "/usr/lib/caisson/guest/vmlinuz"),
        initramfs: guest.absolute("initramfs", "/usr/lib/caisson/guest/initramfs.cpio"),
        cmdline: guest.texts("cmdline").unwrap_or_default(),
    })
}

fn vm(top: &mut Section) -> VmSize {
    top.section("vm", |vm| VmSize {
        default_memory_mib: vm.number("default_memory_mib", 512, 64..=1 << 24),
        default_vcpus: vm.number("default_vcpus", 1, 1..=255),
        max_memory_mib: vm.number("max_memory_mib", 0, 0..=1 << 22),
        max_vcpus: vm.number("max_vcpus", 0, 0..=254),
        guest_overhead_mib: vm.number("guest_overhead_mib", 48, 16..=1 << 16),
        host_reserve_mib: vm.number("host_reserve_mib", 96, 0..=1 << 16),
        scratch_mib: vm.number("scratch_mib", 10 << 10, 16..=1 << 30),
        attach_slots: vm.number("attach_slots", 16, 1..=30),
        empty_dir_mib: vm.number("empty_dir_mib", 64 << 10, 16..=1 << 30),
        file_server: vm
            .optional_absolute("file_server")
            .unwrap_or_else(|| beside_the_daemon(FILE_SERVER)),
        boot_deadline: vm.seconds("boot_deadline_seconds", 100, 1..=3600),
        agent_deadline: vm.seconds("agent_deadline_seconds", 60, 1..=3600),
    })
}

fn apparmor(top: &mut Section) -> AppArmorSettings {
    top.section("apparmor", |section| {
        let directory = section.absolute("profile_dir", "/etc/apparmor.d");
        AppArmorSettings::new(directory, section.optional_absolute("parser"))
    })
}

fn hypervisor(top: &mut Section) -> HypervisorChoice {
    top.section("hypervisor", |section| HypervisorChoice {
        driver: section.choice(
            "driver",
            &[
                ("auto", Driver::Auto),
                ("builtin", Driver::Builtin),
                ("qemu", Driver::Qemu),
            ],
        ),
        vmm: section
            .optional_absolute("vmm")
            .unwrap_or_else(|| beside_the_daemon(VMM)),
        accelerator: section.choice(
            "accelerator",
            &[
                ("auto", Accelerator::Auto),
                ("kvm", Accelerator::Kvm),
                ("tcg", Accelerator::Tcg),
            ],
        ),
        qemu: section.optional_absolute("qemu"),
        vsock_backend: section
            .optional_absolute("vsock_backend")
            .unwrap_or_else(|| beside_the_daemon(VSOCK_BACKEND)),
        user: section.vm_user("user", "uid_base"),
        huge_pages: section.flag("huge_pages", false),
    })
}

/// A helper's path: next to the daemon when it is there, else where packages put it.
fn beside_the_daemon(name: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|own| own.parent().map(|dir| dir.join(name)))
        .filter(|path| path.exists())
        .unwrap_or_else(|| Path::new(LIBEXEC).join(name))
}

fn network(top: &mut Section, daemon: &Daemon) -> NetworkConfig {
    top.section("network", |network| NetworkConfig {
        plugin_dirs: network.absolutes("plugin_dirs", &["/opt/cni/bin", "/usr/lib/cni"]),
        conf_dir: network.absolute("conf_dir", "/etc/cni/net.d"),
        cache_dir: network
            .optional_absolute("cache_dir")
            .unwrap_or_else(|| daemon.root.join("cni")),
        netns_dir: network
            .optional_absolute("netns_dir")
            .unwrap_or_else(|| daemon.run_dir.join("netns")),
        plugin_deadline: network.seconds("plugin_deadline_seconds", 60, 1..=600),
    })
}

fn images(top: &mut Section, daemon: &Daemon) -> ImageStoreConfig {
    top.section("images", |images| ImageStoreConfig {
        root: images
            .optional_absolute("root")
            .unwrap_or_else(|| daemon.root.join("images")),
        insecure_registries: images.hosts("insecure_registries"),
        mirrors: mirrors(images),
        hosts_dirs: images.absolutes("hosts_dirs", &["/etc/containerd/certs.d", "/etc/docker/certs.d"]),
        auth_files: images.absolutes("auth_files", &[]),
        signatures: signatures::read(images),
        ca_files: images.absolutes("ca_files", &[]),
        max_image_bytes: images.number::<u64>("max_image_mib", 32 << 10, 1..=1 << 24) << 20,
        stall_deadline: images.seconds("stall_deadline_seconds", 60, 1..=3600),
        converter: images
            .optional_absolute("converter")
            .unwrap_or_else(|| beside_the_daemon(LAYER_CONVERTER)),
    })
}

fn streaming(top: &mut Section) -> StreamingConfig {
    top.section("streaming", |section| {
        let listen = section.address("listen", SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let certificate = section.optional_absolute("tls_cert_file");
        let key = section.optional_absolute("tls_key_file");
        let tls = match (certificate, key) {
            (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
            (None, None) => None,
            (Some(_), None) => {
                section.problem("tls_cert_file", "needs tls_key_file");
                None
            }
            (None, Some(_)) => {
                section.problem("tls_key_file", "needs tls_cert_file");
                None
            }
        };
        StreamingConfig {
            listen,
            tls,
            idle_timeout: section.seconds("idle_timeout_seconds", 4 * 3600, 1..=7 * 24 * 3600),
        }
    })
}

fn mirrors(images: &mut Section) -> BTreeMap<String, Vec<String>> {
    images.text_lists("mirrors")
}

#[cfg(test)]
mod tests;
