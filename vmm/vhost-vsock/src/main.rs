//! A virtio socket device behind vhost-user, for hypervisors that are not ours: one process for each VM, gone with it.
//!
//! Owns the process: its arguments, its confinement, its end. What the device does is in `caisson-devices`; this program must not know
//! what travels on a connection.

mod arguments;
mod confinement;
mod device;

use std::{
    os::fd::AsRawFd,
    process::ExitCode,
    sync::{Arc, Mutex},
};

use arguments::{Arguments, Invocation};
use caisson_devices::virtio::vsock::{Vsock, VsockError};
use device::Backend;
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// Why the process ended with a failure.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Arguments(#[from] arguments::Wrong),
    #[error("cannot make the device")]
    Device(#[from] VsockError),
    #[error("cannot name the process")]
    Name(#[source] std::io::Error),
    #[error("cannot confine the process")]
    Confinement(#[from] confinement::ConfinementError),
    #[error("vhost-user: {0}")]
    Daemon(DaemonError),
    #[error("cannot watch the hybrid vsock socket")]
    Watch(#[source] std::io::Error),
}

fn main() -> ExitCode {
    // A thread that panicked would leave a device that looks alive and does nothing.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
    let outcome = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Help) => {
            println!("{}", arguments::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Version) => {
            println!("caisson-vhost-vsock {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Run(arguments)) => run(arguments),
        Err(wrong) => Err(wrong.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("caisson-vhost-vsock: {failure}");
            let mut cause = std::error::Error::source(&failure);
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

/// Serves one VM until it goes.
fn run(arguments: Arguments) -> Result<(), Failure> {
    // Executed through a descriptor, it would be called by the descriptor's number.
    rustix::thread::set_name(c"caisson-vhost-v").map_err(|e| Failure::Name(e.into()))?;
    confinement::raise_file_limit();
    let vsock = Vsock::new(arguments.cid, arguments.hybrid)?;
    let host_events = vsock.as_raw_fd();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Mutex::new(Backend::new(vsock, memory.clone())));
    let mut daemon =
        VhostUserDaemon::new("vhost-user".to_owned(), backend, memory).map_err(Failure::Daemon)?;
    for handler in daemon.get_epoll_handlers() {
        handler
            .register_listener(host_events, EventSet::IN, u64::from(device::HOST_EVENT))
            .map_err(Failure::Watch)?;
    }
    let mut listener = arguments.vhost_user.into();
    // From here on nothing is opened by name: the VM's memory comes over the socket.
    confinement::confine()?;
    daemon.start(&mut listener).map_err(Failure::Daemon)?;
    match daemon.wait() {
        // The hypervisor has gone, or was killed within a message.
        Ok(()) => Ok(()),
        Err(DaemonError::HandleRequest(
            vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
        )) => Ok(()),
        Err(e) => Err(Failure::Daemon(e)),
    }
}
