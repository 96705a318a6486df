//! `caisson-agent`: the guest's `/init` and the agent behind it, one static binary.
//!
//! Owns everything that runs in a pod's VM. Must not know CRI, Kubernetes, images' formats, or which hypervisor it runs under. The
//! protocol is `caisson-agent-api`'s.
//!
//! One binary, five roles: PID 1 ([`init`]), the agent proper ([`service`]), the stage that becomes a container's process ([`stage`]),
//! PID 1 of a shared PID namespace ([`stage`]), and for a moment the process that a user namespace is made in ([`user_namespace`]).

mod apparmor;
mod cgroup;
mod clock;
mod configure;
mod console;
mod copy_tree;
mod cpus;
mod create;
mod delete_tree;
mod device_filter;
mod devices;
mod error;
mod exec;
mod flush;
mod forward;
mod guest;
mod handoff;
mod hello;
mod images;
mod init;
mod input;
mod kernel_modules;
mod launch;
mod listen;
mod names;
mod netlink;
mod network;
mod output;
mod own_devices;
mod pod_volumes;
mod power;
mod process;
mod release;
mod remove;
mod rootfs;
mod service;
mod shared;
mod signal;
mod socket_forwards;
mod stage;
mod stage_spec;
mod start;
mod stats;
mod streams;
mod sysctl;
mod terminal;
mod update;
mod user_namespace;
mod volumes;
mod wait;
mod watch_fd;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("agent") => service::main(arguments),
        Some(stage::ARGUMENT) => stage::main(),
        Some(stage::POD_REAPER_ARGUMENT) => stage::pod_reaper_main(),
        Some(user_namespace::ARGUMENT) => user_namespace::main(),
        // The kernel hands PID 1 whatever it does not know of its command line.
        _ if std::process::id() == 1 => init::main(),
        _ => {
            console::complain("this is the init of a Caisson guest, not a command for people");
            ExitCode::FAILURE
        }
    }
}
