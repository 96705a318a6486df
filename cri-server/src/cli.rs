//! The command line. `--help` is meant to be enough.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::{config::Overrides, image_command::ImageCommand};

/// Kubernetes node daemon that runs every pod as a microVM.
#[derive(Debug, Parser)]
#[command(
    name = "caissond",
    version,
    about = "Kubernetes node daemon that runs every pod as a microVM",
    long_about = "caissond serves the Container Runtime Interface (CRI, runtime.v1) on a Unix socket. Each pod sandbox is one \
                  microVM; its containers run inside. It needs root, a CNI configuration, the guest kernel and initramfs, and a \
                  CPU that KVM can use (for the VMM of its own) or else QEMU.",
    after_long_help = EXAMPLES
)]
pub struct Cli {
    /// Configuration file; files in the directory of the same name with .d are merged over it [default: /etc/caisson/config.toml]
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// What wins over the files.
    #[command(flatten)]
    pub overrides: Overrides,
    /// What to do; serve when absent.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What caissond can do.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serve the CRI until SIGTERM; pods go on running and are found again at the next start (the default)
    Serve,
    /// Tell what this host can do and what would be used; exit status 0 when a pod could run
    Check {
        /// Print one JSON document instead of lines for people
        #[arg(long)]
        json: bool,
    },
    /// Ask the daemon that runs now how it is
    Status {
        /// Print one JSON document instead of lines for people
        #[arg(long)]
        json: bool,
    },
    /// List, import, export and pin images: through the daemon when one runs, else in its store
    #[command(subcommand)]
    Image(ImageCommand),
}

const EXAMPLES: &str = "\
Examples:
  See whether this host can run pods, and what is missing:
      caissond check

  Run the daemon on a scratch directory, with a kernel and an initramfs built in a checkout:
      caissond --root /tmp/c/lib --run-dir /tmp/c/run --kernel guest/out/distribution/vmlinuz --initramfs guest/out/distribution/initramfs.cpio

  Talk to it:
      crictl --runtime-endpoint unix:///tmp/c/run/caisson.sock info

  Bring images to a node without a registry:
      docker save registry.example/app:v1 | caissond image import -
      caissond image import --pin /media/layout

  And from one node to another:
      caissond image export registry.example/app:v1 - | ssh other caissond image import -

  Give it to kubelet:
      kubelet --container-runtime-endpoint=unix:///run/caisson/caisson.sock

Configuration file (TOML; every key may be left out):
  root = \"/var/lib/caisson\"          run_dir = \"/run/caisson\"
  listen = \"unix:///run/caisson/caisson.sock\"
  log = \"info\"                       cgroup_driver = \"cgroupfs\"
  [guest]       kernel, initramfs, cmdline = []
  [vm]          default_memory_mib = 512, default_vcpus = 1, max_memory_mib = 0, max_vcpus = 0,
                guest_overhead_mib = 48, host_reserve_mib = 96,
                scratch_mib = 10240, attach_slots = 16, empty_dir_mib = 65536, file_server, boot_deadline_seconds = 100, agent_deadline_seconds = 60
  [hypervisor]  driver = \"auto\"|\"builtin\"|\"qemu\", vmm, accelerator = \"auto\"|\"kvm\"|\"tcg\", qemu, vsock_backend,
                 user = \"per-vm\"|\"uid:gid\"|\"root\", uid_base, huge_pages = false
  [apparmor]    profile_dir = \"/etc/apparmor.d\", parser
  [network]     conf_dir, plugin_dirs = [], cache_dir, netns_dir, plugin_deadline_seconds = 60
  [images]      root, insecure_registries = [], ca_files = [], max_image_mib = 32768, stall_deadline_seconds = 60
                hosts_dirs = [\"/etc/containerd/certs.d\", \"/etc/docker/certs.d\"], auth_files = [], converter
  [images.mirrors]  \"registry.k8s.io\" = [\"mirror.example:5000\"]
  [images.signatures.\"registry.example/team\"]  policy = \"accept\"|\"reject\"|\"cosign\", keys = []
  [streaming]   listen = \"127.0.0.1:0\", tls_cert_file, tls_key_file, idle_timeout_seconds = 14400
  [nri]         enabled = true, connections = true, socket = \"/var/run/nri/nri.sock\", plugin_dir = \"/opt/nri/plugins\",
                plugin_config_dir = \"/etc/nri/conf.d\", registration_timeout_seconds = 5, request_timeout_seconds = 2
";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_may_stand_before_and_after_the_command() {
        let cli = Cli::parse_from(["caissond", "--root", "/r", "check", "--json", "--log", "debug"]);
        assert_eq!(cli.command, Some(Command::Check { json: true }));
        assert_eq!(cli.overrides.root, Some(PathBuf::from("/r")));
        assert_eq!(cli.overrides.log.as_deref(), Some("debug"));
        assert_eq!(Cli::parse_from(["caissond"]).command, None);
    }

    #[test]
    fn the_help_names_every_key_of_the_configuration() {
        let help = Cli::command().render_long_help().to_string();
        // Whose examples are read as configurations by the tests of the configuration.
        let pages = [
            include_str!("../../docs/configure.md"),
            include_str!("../../docs/nri.md"),
        ];
        let mut keys = 0;
        for page in pages {
            let example = page.split("```").nth(1).unwrap_or_default();
            for line in example.lines() {
                let line = line.strip_prefix("# ").unwrap_or(line);
                let word = match line.split_once(" = ") {
                    Some((key, _)) if !key.starts_with('"') => key.to_owned(),
                    _ => match line
                        .strip_prefix('[')
                        .and_then(|rest| rest.split([']', '.']).next())
                    {
                        Some(section) => format!("[{section}"),
                        None => continue,
                    },
                };
                keys += 1;
                assert!(help.contains(&word), "{word} is not in the help");
            }
        }
        assert!(keys > 50, "{keys}");
    }
}
