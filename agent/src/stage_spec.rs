//! What the agent tells a stage, and what the stage reports: messages inside one binary, never seen by the daemon.

use caisson_agent_api::v1;

/// Which descriptor is which, in the order they are attached to the first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum FdKind {
    /// A memfd with the encoded [`StageSpec`].
    Spec = 0,
    Stdin = 1,
    Stdout = 2,
    Stderr = 3,
    /// Directory of the cgroup to be born in.
    Cgroup = 4,
    /// pidfd of a process whose PID namespace is joined.
    PidNamespace = 5,
    /// pidfd of a container's first process, all of whose namespaces are joined.
    Container = 6,
    /// The user namespace of the pod's containers.
    UserNamespace = 17,
}

/// The first message to a stage.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Manifest {
    #[prost(enumeration = "FdKind", repeated, tag = "1")]
    pub(crate) fds: Vec<i32>,
}

/// What to become.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StageSpec {
    /// The process; `args`, `env`, `cwd` and so on are complete.
    #[prost(message, optional, tag = "1")]
    pub(crate) process: Option<v1::Process>,
    /// Absent: the process joins a running container.
    #[prost(message, optional, tag = "2")]
    pub(crate) root: Option<RootSpec>,
    /// Present: used instead of looking up `process.user`.
    #[prost(message, optional, tag = "3")]
    pub(crate) identity: Option<Identity>,
    /// Of the user namespace that is joined; its descriptor is attached.
    #[prost(message, optional, tag = "20")]
    pub(crate) users: Option<v1::UserNamespace>,
}

/// A container's own view of the file system.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RootSpec {
    /// A mount point of the agent's.
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(bool, tag = "2")]
    pub(crate) readonly: bool,
    #[prost(bool, tag = "3")]
    pub(crate) privileged: bool,
    /// In the order in which they are made.
    #[prost(message, repeated, tag = "4")]
    pub(crate) mounts: Vec<StageMount>,
    #[prost(string, repeated, tag = "5")]
    pub(crate) masked: Vec<String>,
    #[prost(string, repeated, tag = "6")]
    pub(crate) readonly_paths: Vec<String>,
    /// Not empty: a UTS namespace of its own, with this name.
    #[prost(string, tag = "7")]
    pub(crate) hostname: String,
    /// A PID namespace of its own.
    #[prost(bool, tag = "8")]
    pub(crate) new_pid_namespace: bool,
    /// Made last of all, on whatever is mounted where they are.
    #[prost(message, repeated, tag = "20")]
    pub(crate) devices: Vec<StageDevice>,
}

/// A device node to be made.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StageDevice {
    /// Absolute, in the container.
    #[prost(string, tag = "1")]
    pub(crate) path: String,
    #[prost(uint32, tag = "2")]
    pub(crate) major: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) minor: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) mode: u32,
    #[prost(uint32, tag = "5")]
    pub(crate) uid: u32,
    #[prost(uint32, tag = "6")]
    pub(crate) gid: u32,
    /// A disk, no character device.
    #[prost(bool, tag = "7")]
    pub(crate) block: bool,
    #[prost(bool, tag = "8")]
    pub(crate) read: bool,
    #[prost(bool, tag = "9")]
    pub(crate) write: bool,
}

/// One mount.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StageMount {
    /// Absolute, in the container.
    #[prost(string, tag = "1")]
    pub(crate) destination: String,
    /// A path of the agent's to bind; empty: a tmpfs.
    #[prost(string, tag = "2")]
    pub(crate) source: String,
    #[prost(bool, tag = "3")]
    pub(crate) readonly: bool,
    /// Options of a tmpfs.
    #[prost(string, tag = "4")]
    pub(crate) options: String,
    /// Content of somebody else's: no set-user-id, devices or programs, and read-only.
    #[prost(bool, tag = "21")]
    pub(crate) inert: bool,
    /// What of `source` is bound, resolved with it as the root: a container may have changed what is there.
    #[prost(string, tag = "8")]
    pub(crate) inside: String,
    /// Its owners are ids of the pod, and have to be mapped where there is a user namespace.
    #[prost(bool, tag = "22")]
    pub(crate) pod_ids: bool,
    /// How mounts at `source` travel; private unless it is a volume of the pod's.
    #[prost(enumeration = "v1::MountPropagation", tag = "23")]
    pub(crate) propagation: i32,
    /// What is bound over sockets below it.
    #[prost(message, repeated, tag = "24")]
    pub(crate) sockets: Vec<StageSocket>,
}

/// A socket of the host that is seen below a mount.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StageSocket {
    /// Relative to the mount.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) path: Vec<u8>,
    /// The agent's socket, which leads to it.
    #[prost(string, tag = "2")]
    pub(crate) source: String,
    /// Another name of the agent's for what is to be seen there.
    #[prost(string, tag = "3")]
    pub(crate) same_as: String,
}

/// Who a process is, as numbers.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Identity {
    #[prost(uint32, tag = "1")]
    pub(crate) uid: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) gid: u32,
    #[prost(uint32, repeated, tag = "3")]
    pub(crate) groups: Vec<u32>,
    #[prost(string, tag = "4")]
    pub(crate) home: String,
}

/// What a stage says. After the last one, the socket closes when execve succeeds.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Report {
    #[prost(oneof = "ReportKind", tags = "1, 2, 3, 4")]
    pub(crate) kind: Option<ReportKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum ReportKind {
    /// PID in the agent's namespace; the pidfd is attached.
    #[prost(uint32, tag = "1")]
    Spawned(u32),
    /// The terminal's controlling side is attached.
    #[prost(bool, tag = "2")]
    Terminal(bool),
    /// Everything is set up; execve is next.
    #[prost(message, tag = "3")]
    Identity(Identity),
    /// It did not work.
    #[prost(message, tag = "4")]
    Failure(Failure),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Failure {
    #[prost(string, tag = "1")]
    pub(crate) message: String,
    /// The request is at fault, not the guest.
    #[prost(bool, tag = "2")]
    pub(crate) requested: bool,
}
