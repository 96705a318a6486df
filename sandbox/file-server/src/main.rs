//! Serves a pod's shared volumes: FUSE messages in, answers out, on connections that the daemon has opened to the guest; and, when it is
//! started for them, connections to Unix sockets among the volumes.
//!
//! Owns the process: its arguments, its confinement, its end. It sees `/volumes` of its own mount namespace and nothing else of the host;
//! the daemon moves mounts there. Ends with the last connection, that is with the VM; when anything goes wrong it ends at once, and the
//! guest answers EIO for what was shared.

mod arguments;
mod confinement;
mod forward;
mod handshake;
mod jail;
mod serve;

use std::{io::Write, process::ExitCode, sync::Arc};

use arguments::{Arguments, Invocation};
use fuse_backend_rs::{api::server::Server, passthrough::PassthroughFs};

/// Why the process ended with a failure.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Arguments(#[from] arguments::Wrong),
    #[error("cannot name the process")]
    Name(#[source] std::io::Error),
    #[error("cannot open the file system")]
    FileSystem(#[source] std::io::Error),
    #[error("cannot leave the host's file systems: {0}")]
    Jail(&'static str, #[source] std::io::Error),
    #[error("cannot confine the process")]
    Confinement(#[from] confinement::ConfinementError),
    #[error("cannot tell that it is ready")]
    Ready(#[source] std::io::Error),
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    #[error("cannot serve a connection")]
    Connection(#[source] std::io::Error),
    #[error("a thread ended without a word")]
    Vanished,
}

fn main() -> ExitCode {
    // A thread that panicked would leave requests without an answer.
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
            println!("caisson-file-server {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Invocation::Run(arguments)) => run(arguments),
        Err(wrong) => Err(wrong.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("caisson-file-server: {failure}");
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
    rustix::thread::set_name(c"caisson-files").map_err(|error| Failure::Name(error.into()))?;
    confinement::raise_file_limit();
    // While /proc of the host is still there: it keeps a descriptor of its own /proc/self/fd.
    let fs = PassthroughFs::new(serve::configuration()).map_err(Failure::FileSystem)?;
    let fs: Arc<PassthroughFs> = Arc::new(fs);
    jail::enter(&arguments.root).map_err(|(step, error)| Failure::Jail(step, error))?;
    confinement::confine(!arguments.forwards.is_empty())?;
    let server = Arc::new(Server::new(Arc::clone(&fs)));

    let mut threads = Vec::new();
    for (number, connection) in arguments.connections.into_iter().enumerate() {
        let (fs, server) = (Arc::clone(&fs), Arc::clone(&server));
        let thread = std::thread::Builder::new()
            .name(format!("files-{number}"))
            .spawn(move || serve::connection(&fs, &server, connection))
            .map_err(Failure::Thread)?;
        threads.push(thread);
    }
    for (number, connection) in arguments.forwards.into_iter().enumerate() {
        let thread = std::thread::Builder::new()
            .name(format!("socket-{number}"))
            .spawn(move || forward::connection(connection))
            .map_err(Failure::Thread)?;
        threads.push(thread);
    }
    let mut ready = arguments.ready;
    ready.write_all(&[1]).map_err(Failure::Ready)?;
    drop(ready);
    for thread in threads {
        thread
            .join()
            .map_err(|_| Failure::Vanished)?
            .map_err(Failure::Connection)?;
    }
    Ok(())
}
