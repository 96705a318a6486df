//! The stage between the agent and a container's process: started afresh from this binary, with a single thread, it becomes that process.
//!
//! First half: learns what to become, enters the namespaces, and has a child born into the cgroup, as a child *of the agent*. Second
//! half: builds the root file system, becomes the user, and calls execve. Reports go over the socket that was its stdin; execve
//! closes it. Nothing here may be called from the agent's threads.

mod apparmor;
mod command;
mod device_nodes;
mod fork;
mod identity;
mod mounts;
mod pod_reaper;
mod privileges;
mod seccomp;
mod terminal;
mod users;
mod vsock_filter;

use std::{
    fs::File,
    io::{Read, Seek},
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

use caisson_agent_api::v1;
use prost::Message;
use rustix::{
    fs::{Mode, OFlags},
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{ThreadNameSpaceType, move_into_thread_name_spaces},
};

use crate::{
    error::chain,
    handoff,
    stage_spec::{Failure, FdKind, Manifest, Report, ReportKind, RootSpec, StageSpec},
};

use identity::{Database, resolve};
use users::Users;

pub(crate) use mounts::POD_SHM;
pub(crate) use pod_reaper::{ARGUMENT as POD_REAPER_ARGUMENT, main as pod_reaper_main};
pub(crate) use privileges::{capability_set, rlimit};
pub(crate) use seccomp::decode as decode_seccomp;

/// Argument that selects this role.
pub(crate) const ARGUMENT: &str = "container-init";

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StageError {
    /// The kernel refused.
    #[error("{step}")]
    Step {
        /// What was tried on what.
        step: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The agent and the stage do not understand each other.
    #[error("init stage: {0}")]
    Protocol(&'static str),
    /// The image has no such user or group.
    #[error("unable to find {kind} {name}: no matching entries in {file} file")]
    Unknown {
        /// "user" or "group".
        kind: &'static str,
        /// As requested.
        name: String,
        /// "passwd" or "group".
        file: &'static str,
    },
    /// The command cannot be run; in the words that users of containers know.
    #[error("exec: {0}")]
    Command(String),
    /// A value that has no meaning.
    #[error("{0}")]
    Invalid(String),
}

/// Names the step that failed.
trait At<T> {
    fn at<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, StageError>;
}

impl<T, E: Into<std::io::Error>> At<T> for Result<T, E> {
    fn at<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, StageError> {
        self.map_err(|error| StageError::Step {
            step: step().into(),
            source: error.into(),
        })
    }
}

/// Descriptors from the agent.
#[derive(Debug, Default)]
struct Inherited {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    cgroup: Option<OwnedFd>,
    pid_namespace: Option<OwnedFd>,
    container: Option<OwnedFd>,
    users: Option<OwnedFd>,
    /// The guest's /proc, opened here when it will be needed: a container's own may be anything.
    proc: Option<OwnedFd>,
}

/// Runs the stage; what it returns is the exit code of whichever half failed, or of the first half that succeeded.
pub(crate) fn main() -> ExitCode {
    // Whoever shares our PID namespace must not look into this process, nor write to its binary.
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let control = match rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) {
        Ok(control) => control,
        Err(_) => return ExitCode::FAILURE,
    };
    match hidden.at(|| "hiding the init stage").and_then(|()| run(&control)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report_failure(&control, &error);
            ExitCode::FAILURE
        }
    }
}

fn report_failure(control: &OwnedFd, error: &StageError) {
    let requested = matches!(
        error,
        StageError::Unknown { .. } | StageError::Command(_) | StageError::Invalid(_)
    );
    let mut message = chain(error);
    message.truncate(message.floor_char_boundary(4096));
    let failure = ReportKind::Failure(Failure { message, requested });
    if let Err(error) = report(control, failure, &[]) {
        crate::console::complain(&format!("init stage cannot report: {}", chain(&error)));
    }
}

/// Sends one report.
fn report(
    control: &OwnedFd,
    kind: ReportKind,
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> Result<(), StageError> {
    let bytes = Report { kind: Some(kind) }.encode_to_vec();
    handoff::send(control, &bytes, fds).at(|| "reporting to the agent")
}

fn run(control: &OwnedFd) -> Result<(), StageError> {
    let (spec, mut inherited) = instructions(control)?;
    let process = spec.process.clone().ok_or(StageError::Protocol("no process"))?;
    if inherited.stdin.is_none() {
        // Before any namespace is entered: a container's own /dev/null may be anything.
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .at(|| "opening /dev/null")?;
        inherited.stdin = Some(null.into());
    }
    if process.apparmor.is_some() {
        inherited.proc = Some(apparmor::open_proc()?);
    }
    privileges::set_oom_score_adj(process.oom_score_adj)?;
    let mut birth = fork::Birth::default();
    if let Some(root) = &spec.root {
        birth.new_mount_namespace = true;
        birth.new_pid_namespace = root.new_pid_namespace;
        if let Some(target) = &inherited.pid_namespace {
            move_into_thread_name_spaces(target.as_fd(), ThreadNameSpaceType::PROCESS_ID)
                .at(|| "joining the PID namespace")?;
        }
    } else {
        let container = inherited
            .container
            .as_ref()
            .ok_or(StageError::Protocol("no container to join"))?;
        let all = ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
        move_into_thread_name_spaces(container.as_fd(), all).at(|| "joining the container's namespaces")?;
    }
    match fork::child_of_the_agent(&birth, inherited.cgroup.as_ref())? {
        fork::Half::Parent { pid, pidfd } => report(control, ReportKind::Spawned(pid), &[pidfd.as_fd()]),
        fork::Half::Child => become_process(control, process, spec, inherited),
    }
}

/// Reads the agent's only message.
fn instructions(control: &OwnedFd) -> Result<(StageSpec, Inherited), StageError> {
    let (bytes, fds) = handoff::receive(control)
        .at(|| "receiving the specification")?
        .ok_or(StageError::Protocol("the agent is gone"))?;
    let manifest =
        Manifest::decode(bytes.as_slice()).map_err(|_| StageError::Protocol("malformed manifest"))?;
    if manifest.fds.len() != fds.len() {
        return Err(StageError::Protocol("descriptors are missing"));
    }
    let mut spec = None;
    let mut inherited = Inherited::default();
    for (kind, fd) in manifest.fds().zip(fds) {
        match kind {
            FdKind::Spec => spec = Some(fd),
            FdKind::Stdin => inherited.stdin = Some(fd),
            FdKind::Stdout => inherited.stdout = Some(fd),
            FdKind::Stderr => inherited.stderr = Some(fd),
            FdKind::Cgroup => inherited.cgroup = Some(fd),
            FdKind::PidNamespace => inherited.pid_namespace = Some(fd),
            FdKind::Container => inherited.container = Some(fd),
            FdKind::UserNamespace => inherited.users = Some(fd),
        }
    }
    let mut file = File::from(spec.ok_or(StageError::Protocol("no specification"))?);
    let mut bytes = Vec::new();
    file.rewind().at(|| "reading the specification")?;
    file.read_to_end(&mut bytes).at(|| "reading the specification")?;
    let spec =
        StageSpec::decode(bytes.as_slice()).map_err(|_| StageError::Protocol("malformed specification"))?;
    Ok((spec, inherited))
}

/// The second half. On success it does not return: execve has replaced it.
fn become_process(
    control: &OwnedFd,
    process: v1::Process,
    spec: StageSpec,
    inherited: Inherited,
) -> Result<(), StageError> {
    let users = match (inherited.users.as_ref(), spec.users.as_ref()) {
        (Some(namespace), Some(mapping)) => Some(Users { namespace, mapping }),
        (None, None) => None,
        _ => return Err(StageError::Protocol("half a user namespace")),
    };
    let root = spec.root.as_ref();
    rustix::process::setsid().at(|| "starting a session")?;
    let terminal = match root {
        Some(root) => own_root(control, root, users.as_ref(), process.terminal)?,
        None => running_root(control, inherited.container.as_ref(), process.terminal)?,
    };
    let identity = match spec.identity {
        Some(identity) => identity,
        None => resolve(&process.user.clone().unwrap_or_default(), &Database::read("/")?)?,
    };
    report(control, ReportKind::Identity(identity.clone()), &[])?;
    let environment = command::environment(&process.env, &identity.home);
    privileges::set_rlimits(&process.rlimits)?;
    terminal::take_stdio(
        inherited.stdin,
        inherited.stdout,
        inherited.stderr,
        terminal,
        &users::outside(users.as_ref(), &identity)?,
    )?;
    command::enter_directory(&process.cwd)?;
    if let (Some(profile), Some(proc)) = (&process.apparmor, &inherited.proc) {
        apparmor::confine_after_exec(proc, &profile.name)?;
    }
    if let Some(users) = &users {
        users::join(users, root.is_some())?;
    }
    let filter = process.seccomp.as_ref();
    if filter.is_some() {
        vsock_filter::install()?;
    }
    // Without no_new_privileges a filter takes CAP_SYS_ADMIN, which then is the last thing to be given up.
    let borrow = filter.is_some() && !process.no_new_privileges;
    let capabilities = process.capabilities.clone().unwrap_or_default();
    let own = privileges::become_user(&identity, &capabilities, borrow)?;
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).at(|| "setting no_new_privileges")?;
    }
    // The filter comes so late that a profile has to allow nothing of the above.
    command::execute(&process.args, &environment, || {
        if let Some(filter) = filter {
            seccomp::install(filter)?;
        }
        if borrow { privileges::settle(own) } else { Ok(()) }
    })
}

/// Builds and enters the container's own root; answers its terminal.
fn own_root(
    control: &OwnedFd,
    root: &RootSpec,
    users: Option<&Users<'_>>,
    terminal: bool,
) -> Result<Option<OwnedFd>, StageError> {
    fork::own_views(&root.hostname)?;
    let tree = mounts::build(root, users)?;
    let terminal = terminal
        .then(|| terminal::open_in(control, &tree, true))
        .transpose()?;
    mounts::enter(root, tree)?;
    Ok(terminal)
}

/// Completes the joining of a running container, whose root this process has already; answers a new terminal there.
fn running_root(
    control: &OwnedFd,
    container: Option<&OwnedFd>,
    terminal: bool,
) -> Result<Option<OwnedFd>, StageError> {
    // Not before the birth: who is inside a delegated cgroup namespace cannot have a child born into it from outside.
    let container = container.ok_or(StageError::Protocol("no container to join"))?;
    move_into_thread_name_spaces(container.as_fd(), ThreadNameSpaceType::CONTROL_GROUP)
        .at(|| "joining the container's cgroup namespace")?;
    let open = || {
        let tree = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at(|| "opening /")?;
        terminal::open_in(control, &tree, false)
    };
    terminal.then(open).transpose()
}
