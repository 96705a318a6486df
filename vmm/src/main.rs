//! `caisson-vmm`: one process for one VM, on KVM.
//!
//! Owns the process: what it inherits ([`descriptors`]), its confinement, its threads ([`threads`]), its control socket ([`control`]), its last words
//! ([`record`]), and the one place where the devices of a VM are listed ([`machine`]). Must not know pods, images or paths: it gets numbers
//! and open descriptors (`caisson_vmm_api::spec`). What the machine and its devices are is in `caisson-machine` and `caisson-devices`.
//!
//! ```text
//! inherited -> namespaced (a child goes on) -> confined -> built -> filtered -> running -> ended: exit record
//! ```

mod allocator;
mod control;
mod descriptors;
mod machine;
mod record;
mod running;
mod saved;
mod threads;
mod wire;

use std::{error::Error, io::Write, os::fd::OwnedFd, process::ExitCode, sync::Arc};

use caisson_confinement::{
    ConfinementError, Enforcement, Filters, Plan, ThreadKind, confine, into_pid_namespace,
};
use caisson_machine::End;
use caisson_vmm_api::{
    exit::Cause,
    spec::{Started, VmSpec},
};

use crate::{descriptors::Inherited, running::Running, threads::Maker};

const HELP: &str = "\
Runs one virtual machine on KVM. Started by caissond; not for the command line.

usage: caisson-vmm --spec-fd N

  --spec-fd N   a descriptor with the VM's specification, in JSON; every descriptor that it names is inherited as well
  --help        this text
  --version     the version";

/// Why the process did not run a VM.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("--spec-fd and a number are all that it takes; --help shows the usage")]
    Usage,
    #[error(transparent)]
    Inherited(#[from] descriptors::InheritanceError),
    #[error("cannot confine the process")]
    Confinement(#[from] ConfinementError),
    #[error("cannot tell of the start")]
    Tell(#[source] std::io::Error),
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    #[error(transparent)]
    Machine(#[from] machine::BuildError),
}

fn main() -> ExitCode {
    allocator::keep_little();
    record::abort_on_panic();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--help" | "-h"] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        ["--version"] => {
            println!("caisson-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--spec-fd", number] => number.parse().map_err(|_| Failure::Usage),
        _ => Err(Failure::Usage),
    };
    match number.and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let message = chain(&failure);
            eprintln!("caisson-vmm: {message}");
            record::write(Cause::Failure { message }, Vec::new());
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn run(number: i32) -> Result<(), Failure> {
    let (spec, mut inherited) = Inherited::take(number)?;
    record::open(inherited.give(spec.exit_record)?);
    let mut started = std::fs::File::from(inherited.give(spec.started)?);
    enter(&spec, &started)?;

    let control: OwnedFd = inherited.give(spec.control)?;
    let filters = Arc::new(Filters::new(Enforcement::Refuse)?);
    // From here on every thread has this filter at least, this one included.
    filters.enter(ThreadKind::Control)?;
    let maker = Maker::start(Arc::clone(&filters)).map_err(Failure::Thread)?;
    let built = machine::build(&spec, &mut inherited, &maker, &filters)?;
    record::begin();
    let running = Arc::new(Running::new(&spec, built.boot()?));
    let server = Arc::clone(&running);
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control::serve(control, &*server))
        .map_err(Failure::Thread)?;
    started
        .write_all(Started::Running.line().as_bytes())
        .map_err(Failure::Tell)?;
    drop(started);
    allocator::give_back();

    let end = running.wait();
    let failed = matches!(end, End::Failed(_));
    record::write(cause(end), running.exits());
    // Threads of devices may be in the middle of something that nobody will ask for any more.
    std::process::exit(i32::from(failed))
}

/// Namespaces, user, capabilities; says which process goes on.
fn enter(spec: &VmSpec, started: &std::fs::File) -> Result<(), Failure> {
    let tell = |pid: i32| {
        let mut pipe = started;
        pipe.write_all(Started::Process(pid).line().as_bytes())
    };
    if spec.confinement.namespaces {
        into_pid_namespace(|pid| match tell(pid) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        })?;
    } else {
        tell(std::process::id().cast_signed()).map_err(Failure::Tell)?;
    }
    confine(&Plan {
        user: spec.confinement.user.map(|user| (user.uid, user.gid)),
        namespaces: spec.confinement.namespaces,
    })?;
    Ok(())
}

fn cause(end: End) -> Cause {
    match end {
        End::PowerOff => Cause::PowerOff,
        End::Reset => Cause::Reset,
        End::TripleFault => Cause::TripleFault,
        End::Stopped => Cause::Killed,
        End::Failed(message) => Cause::Failure { message },
    }
}
