//! System calls, by kind of thread: seccomp(2) filters.
//!
//! Two layers. [`ThreadKind::Control`] is the first: the main thread takes it before it starts any other, so that every thread has it. The others
//! come on top, each on the thread that it is for, and a call must pass both. What is not listed answers ENOSYS instead of killing the process: a
//! C library that tries a new call falls back to the older one, and a process that was taken over gets no further either way.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::ConfinementError;

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// Serves the control socket, and makes, changes and ends the others.
    Control,
    /// Runs guest code.
    Vcpu,
    /// Reads and writes disk images.
    Block,
    /// Moves frames between a tap and the guest.
    Net,
    /// Moves bytes between Unix sockets and the guest.
    Vsock,
    /// Gives the guest random numbers.
    Entropy,
    /// Gives memory back to the host, plugs it, or flushes it.
    Memory,
}

impl ThreadKind {
    const ALL: [Self; 7] = [
        Self::Control,
        Self::Vcpu,
        Self::Block,
        Self::Net,
        Self::Vsock,
        Self::Entropy,
        Self::Memory,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Control => "the control thread",
            Self::Vcpu => "a vCPU's thread",
            Self::Block => "a disk's thread",
            Self::Net => "a network device's thread",
            Self::Vsock => "the socket device's thread",
            Self::Entropy => "the entropy device's thread",
            Self::Memory => "a memory device's thread",
        }
    }
}

/// What happens to a call that is not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Enforcement {
    /// It answers ENOSYS.
    #[default]
    Refuse,
    /// It is made, and logged by the kernel (audit, or dmesg): for finding out what a thread needs.
    Log,
}

/// The filters of all kinds, built beforehand: building allocates, and threads come and go while the guest runs.
#[derive(Debug)]
pub struct Filters(BTreeMap<ThreadKind, BpfProgram>);

/// One value that one argument must have, under a mask.
#[derive(Debug, Clone, Copy)]
struct Argument {
    index: u8,
    mask: u64,
    value: u64,
}

const fn equals(index: u8, value: u64) -> Argument {
    Argument {
        index,
        mask: 0xffff_ffff,
        value,
    }
}

/// What every thread needs: what is open, memory, locks, time, signals, its end.
const EVERY_THREAD: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Memory that can be executed is neither made nor found.
const EVERY_THREAD_WITH: &[(libc::c_long, Argument)] = &[
    (libc::SYS_mmap, NOT_EXECUTABLE),
    (libc::SYS_mprotect, NOT_EXECUTABLE),
    // Its own name; and, on the way to a narrower filter, what it has already.
    (libc::SYS_prctl, equals(0, libc::PR_SET_NAME as u64)),
    (libc::SYS_prctl, equals(0, libc::PR_SET_NO_NEW_PRIVS as u64)),
    (libc::SYS_prctl, equals(0, PR_SET_VMA)),
    (libc::SYS_seccomp, equals(0, libc::SECCOMP_SET_MODE_FILTER as u64)),
];

const NOT_EXECUTABLE: Argument = Argument {
    index: 2,
    mask: libc::PROT_EXEC as u64,
    value: 0,
};

/// Names of anonymous memory (prctl(2)), which C libraries set.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What reads and writes disk images, by thread or by io_uring.
const BLOCK: &[libc::c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_io_uring_enter,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sync_file_range,
    libc::SYS_timerfd_settime,
];

const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// What makes the others, and devices while the guest runs.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_ftruncate,
    libc::SYS_getsockopt,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_memfd_create,
    libc::SYS_setsockopt,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// New threads, and nothing else that clone(2) makes: no process, no namespace.
const NEW_THREAD: Argument = Argument {
    index: 0,
    mask: (libc::CLONE_VM
        | libc::CLONE_THREAD
        | libc::CLONE_VFORK
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP) as u32 as u64,
    value: (libc::CLONE_VM | libc::CLONE_THREAD) as u64,
};

/// All of linux/kvm.h: requests of type 0xAE.
const KVM: Argument = request_type(0xAE);
/// KVM_SIGNAL_MSI of linux/kvm.h: how a device interrupts the guest.
const INTERRUPT: Argument = equals(1, 0x4020_aea5);

const fn request_type(kind: u64) -> Argument {
    Argument {
        index: 1,
        mask: 0xff00,
        value: kind << 8,
    }
}

/// All of linux/vhost.h: requests of type 0xAF.
const VHOST: Argument = request_type(0xAF);

/// TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ and TUNSETQUEUE of linux/if_tun.h: what a NIC settles with its tap. Not TUNSETIFF, which makes
/// taps.
const TAP: [Argument; 4] = [
    equals(1, 0x8004_54d2),
    equals(1, 0x4004_54d0),
    equals(1, 0x4004_54d8),
    equals(1, 0x4004_54d9),
];
/// BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKDISCARD and BLKZEROOUT of linux/fs.h.
const BLOCK_DEVICE: [Argument; 5] = [
    equals(1, 0x8008_1272),
    equals(1, 0x1268),
    equals(1, 0x127b),
    equals(1, 0x1277),
    equals(1, 0x127f),
];
const NOT_BLOCKING: Argument = equals(1, libc::FIONBIO);

/// A filter in the making.
#[derive(Default)]
struct List(BTreeMap<i64, Vec<Argument>>);

impl List {
    fn calls(&mut self, calls: &[libc::c_long]) {
        for call in calls {
            self.0.insert(*call, Vec::new());
        }
    }

    fn with(&mut self, call: libc::c_long, arguments: &[Argument]) {
        self.0.entry(call).or_default().extend_from_slice(arguments);
    }

    /// Starts threads, and raises signals among those of this process (its pid is not known here: in a PID namespace of its own, there is
    /// no other).
    fn threads(&mut self) {
        self.with(libc::SYS_clone, &[NEW_THREAD]);
        self.calls(&[libc::SYS_tgkill]);
    }

    fn of(kind: ThreadKind) -> Self {
        let mut list = Self::default();
        list.calls(EVERY_THREAD);
        for (call, argument) in EVERY_THREAD_WITH {
            list.with(*call, &[*argument]);
        }
        match kind {
            ThreadKind::Control => {
                list.calls(CONTROL);
                list.calls(BLOCK);
                list.calls(SOCKETS);
                list.threads();
                // By which it speaks to the guest's vsock.
                list.with(libc::SYS_socketpair, &[equals(0, libc::AF_UNIX as u64)]);
                list.with(libc::SYS_ioctl, &[KVM, VHOST, NOT_BLOCKING]);
                list.with(libc::SYS_ioctl, &TAP);
                list.with(libc::SYS_ioctl, &BLOCK_DEVICE);
            }
            ThreadKind::Vcpu => {
                list.threads();
                list.with(libc::SYS_ioctl, &[KVM]);
            }
            ThreadKind::Block => {
                list.calls(BLOCK);
                list.calls(&[libc::SYS_timerfd_settime]);
                list.with(libc::SYS_ioctl, &BLOCK_DEVICE);
            }
            ThreadKind::Net => {
                list.with(libc::SYS_ioctl, &TAP);
                list.with(libc::SYS_ioctl, &[VHOST]);
            }
            ThreadKind::Vsock => {
                list.calls(SOCKETS);
                list.with(libc::SYS_ioctl, &[NOT_BLOCKING]);
            }
            ThreadKind::Entropy => {}
            ThreadKind::Memory => {
                list.calls(&[
                    libc::SYS_fallocate,
                    libc::SYS_fdatasync,
                    libc::SYS_fsync,
                    libc::SYS_msync,
                ]);
                // vhost must know of memory before the guest may use it.
                list.with(libc::SYS_ioctl, &[KVM, VHOST]);
            }
        }
        if !matches!(kind, ThreadKind::Control | ThreadKind::Vcpu | ThreadKind::Memory) {
            list.with(libc::SYS_ioctl, &[INTERRUPT]);
        }
        if kind == ThreadKind::Control {
            // Every thread has this filter below its own.
            list.calls(&[libc::SYS_msync]);
        }
        list
    }

    fn compile(self, enforcement: Enforcement) -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for (call, arguments) in self.0 {
            let mut alternatives = Vec::with_capacity(arguments.len());
            for argument in arguments {
                let condition = SeccompCondition::new(
                    argument.index,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::MaskedEq(argument.mask),
                    argument.value,
                )?;
                alternatives.push(SeccompRule::new(vec![condition])?);
            }
            rules.insert(call, alternatives);
        }
        let otherwise = match enforcement {
            Enforcement::Refuse => SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
            Enforcement::Log => SeccompAction::Log,
        };
        let arch = std::env::consts::ARCH.try_into()?;
        SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
    }
}

impl Filters {
    /// Builds the filters of all kinds.
    pub fn new(enforcement: Enforcement) -> Result<Self, ConfinementError> {
        let mut programs = BTreeMap::new();
        for kind in ThreadKind::ALL {
            let program = List::of(kind)
                .compile(enforcement)
                .map_err(|source| ConfinementError::Filter {
                    thread: kind.name(),
                    source,
                })?;
            programs.insert(kind, program);
        }
        Ok(Self(programs))
    }

    /// Installs the filter of this kind on the calling thread; threads that it starts have it, too.
    pub fn enter(&self, kind: ThreadKind) -> Result<(), ConfinementError> {
        let program = self.0.get(&kind).map_or(&[][..], Vec::as_slice);
        seccompiler::apply_filter(program).map_err(|source| ConfinementError::Install {
            thread: kind.name(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_can_be_built_and_none_is_wider_than_the_control_threads() {
        Filters::new(Enforcement::Refuse).unwrap();
        let control = List::of(ThreadKind::Control).0;
        for kind in ThreadKind::ALL {
            for (call, arguments) in List::of(kind).0 {
                let below = control
                    .get(&call)
                    .unwrap_or_else(|| panic!("{kind:?} has call {call}, which the layer below refuses"));
                assert!(
                    below.is_empty() || !arguments.is_empty(),
                    "{kind:?} has call {call} with any argument"
                );
            }
        }
    }

    #[test]
    fn nothing_that_reaches_out_of_the_process_is_on_any_list() {
        let never = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_clone3,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_setuid,
            libc::SYS_unlinkat,
            libc::SYS_renameat2,
        ];
        for kind in ThreadKind::ALL {
            let list = List::of(kind).0;
            for call in never {
                assert!(!list.contains_key(&call), "{kind:?} may make call {call}");
            }
        }
    }
}
