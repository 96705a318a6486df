//! `ConfigureSandbox`: gives the VM its identity, once.
#![expect(unsafe_code, reason = "crediting entropy is an ioctl without a safe form")]

use std::{
    fmt::Write as _,
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Instant,
};

use caisson_agent_api::v1;
use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::{
    clock, devices,
    error::{AgentError, At},
    guest::{Configured, Guest, Sandbox},
    launch, names, network,
    stage::{self, POD_SHM},
    stage_spec::StageSpec,
    sysctl, user_namespace,
};

/// Where containers' writable layers are.
pub(crate) const SCRATCH: &str = "/run/scratch";

/// Files that every container of the pod sees at the same path below /etc, unless it has its own mount there.
pub(crate) const POD_FILES: &str = "/run/pod";

const DEFAULT_SHM_BYTES: u64 = 64 << 20;

/// Most bytes of entropy in a request.
const MAX_ENTROPY: usize = 4096;

/// What root in a user namespace would otherwise be able to do by CAP_NET_BIND_SERVICE and CAP_NET_RAW.
const UNPRIVILEGED_NETWORK: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Does it, or repeats the answer of the same request before. Blocking.
pub(crate) fn configure(
    guest: &Guest,
    request: v1::ConfigureSandboxRequest,
) -> Result<v1::ConfigureSandboxReply, AgentError> {
    let plan = check(&request)?;
    let key = v1::ConfigureSandboxRequest {
        realtime_nanos: 0,
        entropy: Vec::new(),
        ..request.clone()
    };
    if let Some(reply) = begin(guest, &key)? {
        return Ok(reply);
    }
    let done = apply(&request, &plan);
    let mut sandbox = guest.sandbox();
    match done {
        Ok(made) => {
            *sandbox = Sandbox::Configured(Box::new(Configured {
                request: key,
                reply: made.reply,
                pod_reaper: made.pod_reaper.map(Arc::new),
                user_namespace: made.user_namespace.map(Arc::new),
            }));
            Ok(made.reply)
        }
        Err(error) => {
            *sandbox = Sandbox::Blank;
            Err(error)
        }
    }
}

/// Everything that can be known to be wrong before anything is changed.
fn check(request: &v1::ConfigureSandboxRequest) -> Result<network::Plan, AgentError> {
    names::hostname(&request.hostname)?;
    if !request.scratch_serial.is_empty() {
        names::serial("scratch_serial", &request.scratch_serial)?;
    }
    if request.entropy.len() > MAX_ENTROPY {
        return Err(AgentError::invalid(
            "entropy",
            format!("over {MAX_ENTROPY} bytes"),
        ));
    }
    if let Some(users) = &request.user_namespace {
        user_namespace::check(users)?;
    }
    request.sysctls.keys().try_for_each(|name| sysctl::check(name))?;
    network::plan(request)
}

fn begin(
    guest: &Guest,
    key: &v1::ConfigureSandboxRequest,
) -> Result<Option<v1::ConfigureSandboxReply>, AgentError> {
    let state = |reason| {
        Err(AgentError::State {
            what: "sandbox",
            id: key.sandbox_id.clone(),
            reason,
        })
    };
    let mut sandbox = guest.sandbox();
    match &*sandbox {
        Sandbox::Blank => {
            *sandbox = Sandbox::Configuring;
            Ok(None)
        }
        Sandbox::Configuring => state("is being configured"),
        Sandbox::Configured(configured) if configured.request == *key => Ok(Some(configured.reply)),
        Sandbox::Configured(_) => state("cannot be: this VM has been configured otherwise"),
    }
}

/// What configuring has made.
struct Made {
    reply: v1::ConfigureSandboxReply,
    pod_reaper: Option<OwnedFd>,
    user_namespace: Option<OwnedFd>,
}

fn apply(request: &v1::ConfigureSandboxRequest, plan: &network::Plan) -> Result<Made, AgentError> {
    if request.realtime_nanos > 0 {
        clock::set_real(request.realtime_nanos).at(|| "setting the clock")?;
    }
    add_entropy(&request.entropy).at(|| "crediting entropy")?;
    if !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes())
            .at(|| format!("setting the host name {}", request.hostname))?;
    }
    let begin = Instant::now();
    network::apply(plan)?;
    let network_nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    if request.user_namespace.is_some() {
        // The network is the guest's, over which no capability of a user namespace reaches.
        for (name, value) in UNPRIVILEGED_NETWORK {
            sysctl::set(name, value)?;
        }
    }
    let mut sysctls: Vec<_> = request.sysctls.iter().collect();
    sysctls.sort();
    for (name, value) in sysctls {
        sysctl::set(name, value)?;
    }
    write_pod_files(request)?;
    mount_scratch(&request.scratch_serial)?;
    let bytes = if request.shm_bytes == 0 {
        DEFAULT_SHM_BYTES
    } else {
        request.shm_bytes
    };
    mount_shm(bytes)?;
    let pod_reaper = if request.share_pid_namespace {
        let reaper = launch::launch(stage::POD_REAPER_ARGUMENT, &StageSpec::default(), &[])?;
        Some(reaper.pidfd)
    } else {
        None
    };
    let user_namespace = request
        .user_namespace
        .as_ref()
        .map(user_namespace::create)
        .transpose()?;
    Ok(Made {
        reply: v1::ConfigureSandboxReply { network_nanos },
        pod_reaper,
        user_namespace,
    })
}

/// _IOW('R', 0x03, int[2]) of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// struct rand_pool_info with its bytes: bits of entropy, length, content.
#[repr(C)]
struct Pool {
    entropy_bits: i32,
    length: i32,
    content: [u8; MAX_ENTROPY],
}

fn add_entropy(bytes: &[u8]) -> std::io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let length = i32::try_from(bytes.len()).map_err(std::io::Error::other)?;
    let mut pool = Box::new(Pool {
        entropy_bits: length.saturating_mul(8),
        length,
        content: [0; MAX_ENTROPY],
    });
    pool.content
        .get_mut(..bytes.len())
        .ok_or(Errno::INVAL)?
        .copy_from_slice(bytes);
    let device = fs::File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the structure, of which `length` bytes of content exist, and writes nothing.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, std::ptr::from_ref(&*pool)) };
    if answer == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Content of resolv.conf. Pure.
fn resolv_conf(dns: &v1::DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _infallible = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

/// Content of a hosts file for a pod that brings none. Pure.
fn hosts(request: &v1::ConfigureSandboxRequest) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n".to_owned();
    let addresses = request
        .interfaces
        .iter()
        .flat_map(|interface| &interface.addresses);
    for address in addresses.filter(|_| !request.hostname.is_empty()) {
        let address = address.split('/').next().unwrap_or_default();
        let _infallible = writeln!(text, "{address}\t{}", request.hostname);
    }
    text
}

fn write_pod_files(request: &v1::ConfigureSandboxRequest) -> Result<(), AgentError> {
    fs::create_dir_all(POD_FILES).at(|| format!("creating {POD_FILES}"))?;
    let write = |name: &str, content: &str| {
        let path = Path::new(POD_FILES).join(name);
        fs::write(&path, content).at(|| format!("writing {}", path.display()))
    };
    if let Some(dns) = &request.dns {
        write("resolv.conf", &resolv_conf(dns))?;
    }
    if !request.hostname.is_empty() {
        write("hostname", &format!("{}\n", request.hostname))?;
    }
    write("hosts", &hosts(request))
}

fn is_mounted(path: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(path))
}

fn mount_scratch(serial: &str) -> Result<(), AgentError> {
    fs::create_dir_all(SCRATCH).at(|| format!("creating {SCRATCH}"))?;
    // Without a disk, writable layers are in memory.
    if serial.is_empty() || is_mounted(SCRATCH) {
        return Ok(());
    }
    let node = devices::disk(serial)?;
    mount(&node, SCRATCH, "ext4", MountFlags::NOATIME, None)
        .at(|| format!("mounting the scratch disk {serial} ({}) as ext4", node.display()))
}

fn mount_shm(bytes: u64) -> Result<(), AgentError> {
    fs::create_dir_all(POD_SHM).at(|| format!("creating {POD_SHM}"))?;
    if is_mounted(POD_SHM) {
        return Ok(());
    }
    let options = std::ffi::CString::new(format!("mode=1777,size={bytes}")).map_err(std::io::Error::other);
    let options = options.at(|| "formatting mount options")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("shm", POD_SHM, "tmpfs", flags, options.as_c_str())
        .at(|| format!("mounting {bytes} bytes of shared memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_what_was_asked_for() {
        let dns = v1::DnsConfig {
            servers: vec!["10.96.0.10".into(), "fd00::a".into()],
            searches: vec!["default.svc.cluster.local".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "search default.svc.cluster.local svc\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&v1::DnsConfig::default()), "");
    }

    #[test]
    fn the_default_hosts_file_names_the_pod() {
        let request = v1::ConfigureSandboxRequest {
            hostname: "web".into(),
            interfaces: vec![v1::Interface {
                addresses: vec!["10.88.0.5/16".into()],
                ..v1::Interface::default()
            }],
            ..v1::ConfigureSandboxRequest::default()
        };
        assert!(hosts(&request).starts_with("127.0.0.1\tlocalhost\n"));
        assert!(hosts(&request).ends_with("10.88.0.5\tweb\n"));
    }
}
