//! Whom the processes of a VM run as: by default each VM is a user of its own, so that one that is taken over owns nothing and can
//! neither signal nor trace another's.
//!
//! A user is a number: nothing is added to the node's databases. Must not know what the processes are.

use std::{
    collections::HashSet,
    fmt, fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::HypervisorError;

/// First user id of VMs by default. Debian and systemd assign nothing from 1879048192 to 2147352575, and the ranges of SSSD and FreeIPA end
/// at 2000200000.
pub const UID_BASE: u32 = 2_100_000_000;

/// How many ids, from the first on, VMs may get.
pub const UID_COUNT: u32 = 65_536;

/// Whom the processes of VMs run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmUser {
    /// Each VM as a user and group of its own, `base` to `base + UID_COUNT - 1`.
    PerVm {
        /// First id.
        base: u32,
    },
    /// All as this one, who can then signal and trace among them.
    Fixed {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// As the daemon: without capabilities, and yet the owner of its files.
    Daemon,
}

impl Default for VmUser {
    fn default() -> Self {
        Self::PerVm { base: UID_BASE }
    }
}

impl fmt::Display for VmUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerVm { base } => write!(f, "each VM as a user of its own from {base} on"),
            Self::Fixed { uid, gid } => write!(f, "VMs as user {uid}:{gid}"),
            Self::Daemon => f.write_str("VMs as the daemon's own user"),
        }
    }
}

type Taken = Arc<Mutex<HashSet<u32>>>;

/// Gives out users. Clones share what is taken; drivers that may run VMs at the same time share one.
#[derive(Debug, Clone)]
pub struct Users {
    who: VmUser,
    taken: Taken,
}

/// A VM's user, its own until this is dropped.
#[derive(Debug)]
pub struct Lease {
    uid: u32,
    gid: u32,
    /// Absent where users are shared.
    taken: Option<Taken>,
}

impl Lease {
    /// User and group id.
    #[must_use]
    pub fn ids(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(taken) = &self.taken {
            lock(taken).remove(&self.uid);
        }
    }
}

/// Whoever panicked held it for one insertion or removal, which is either done or not.
fn lock(taken: &Taken) -> MutexGuard<'_, HashSet<u32>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Users {
    /// Errors say in half a sentence why this host cannot have such users. A daemon that is not root has nothing to give up.
    pub fn new(who: VmUser) -> Result<Self, String> {
        let who = match who {
            VmUser::PerVm { .. } if !rustix::process::geteuid().is_root() => VmUser::Daemon,
            VmUser::PerVm { base } => {
                for map in ["/proc/self/uid_map", "/proc/self/gid_map"] {
                    let text = fs::read_to_string(map).map_err(|e| format!("cannot read {map}: {e}"))?;
                    if !maps(&text, base) {
                        let last = base.saturating_add(UID_COUNT - 1);
                        return Err(format!(
                            "the ids {base} to {last}, one for each VM, do not exist in this user namespace ({map}): set \
                             hypervisor.uid_base or hypervisor.user"
                        ));
                    }
                }
                who
            }
            other => other,
        };
        Ok(Self {
            who,
            taken: Taken::default(),
        })
    }

    /// Whom VMs run as: what was asked for, or the daemon where it is not root.
    #[must_use]
    pub fn who(&self) -> VmUser {
        self.who
    }

    /// The user for a new VM; `None` is the daemon's own. An id's place in the range follows from the VM's id; one that another VM of this
    /// daemon has is passed over.
    pub fn claim(&self, vm: &str) -> Result<Option<Lease>, HypervisorError> {
        match self.who {
            VmUser::Daemon => Ok(None),
            VmUser::Fixed { uid, gid } => Ok(Some(Lease {
                uid,
                gid,
                taken: None,
            })),
            VmUser::PerVm { base } => {
                let mut taken = lock(&self.taken);
                let first = place(vm);
                let free = (0..UID_COUNT)
                    .map(|step| base + (first + step) % UID_COUNT)
                    .find(|uid| taken.insert(*uid));
                drop(taken);
                match free {
                    Some(uid) => Ok(Some(self.lease(uid))),
                    None => Err(HypervisorError::Spec(format!(
                        "all {UID_COUNT} user ids from {base} on are in use"
                    ))),
                }
            }
        }
    }

    /// Notes the user of a VM that runs already, whoever chose it.
    pub fn recall(&self, pid: i32) -> Option<Lease> {
        let VmUser::PerVm { base } = self.who else {
            return None;
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uid = user_of(&status)?;
        let ours = (base..base.saturating_add(UID_COUNT)).contains(&uid);
        (ours && lock(&self.taken).insert(uid)).then(|| self.lease(uid))
    }

    fn lease(&self, uid: u32) -> Lease {
        Lease {
            uid,
            gid: uid,
            taken: Some(Arc::clone(&self.taken)),
        }
    }
}

/// FNV-1a, folded to 16 bits.
fn place(vm: &str) -> u32 {
    let hash = vm.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    (hash ^ (hash >> 16)) % UID_COUNT
}

/// Whether a line of an id map (user_namespaces(7)) holds the whole range.
fn maps(map: &str, base: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        let base = u64::from(base);
        inside <= base && base + u64::from(UID_COUNT) <= inside + count
    })
}

/// The real user of /proc/PID/status.
fn user_of(status: &str) -> Option<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn per_vm() -> Users {
        Users {
            who: VmUser::default(),
            taken: Taken::default(),
        }
    }

    fn uid(lease: &Option<Lease>) -> u32 {
        lease.as_ref().unwrap().ids().0
    }

    #[test]
    fn two_vms_never_share_a_user_even_when_their_ids_fall_on_the_same_place() {
        let users = per_vm();
        let first = users.claim("0a").unwrap();
        let second = users.claim("0a").unwrap();
        assert_ne!(uid(&first), uid(&second));
        assert_eq!(first.as_ref().unwrap().ids().0, first.as_ref().unwrap().ids().1);
        let freed = uid(&first);
        drop(first);
        assert_eq!(uid(&users.claim("0a").unwrap()), freed, "free again");
    }

    #[test]
    fn every_user_lies_in_the_range_and_a_full_range_is_an_error() {
        let users = per_vm();
        let leases: Vec<_> = (0..UID_COUNT)
            .map(|n| users.claim(&n.to_string()).unwrap())
            .collect();
        assert!(
            leases
                .iter()
                .all(|lease| (UID_BASE..UID_BASE + UID_COUNT).contains(&uid(lease)))
        );
        let error = users.claim("one-more").unwrap_err().to_string();
        assert!(error.contains("all 65536 user ids"), "{error}");
    }

    #[test]
    fn a_fixed_user_is_shared_and_the_daemon_gives_none() {
        let mut users = per_vm();
        users.who = VmUser::Fixed { uid: 7, gid: 8 };
        let (a, b) = (users.claim("a").unwrap(), users.claim("b").unwrap());
        assert_eq!((a.unwrap().ids(), b.unwrap().ids()), ((7, 8), (7, 8)));
        users.who = VmUser::Daemon;
        assert!(users.claim("a").unwrap().is_none());
    }

    #[test]
    fn a_user_namespace_without_the_range_is_noticed() {
        assert!(maps("         0          0 4294967295\n", UID_BASE));
        assert!(!maps("         0     100000      65536\n", UID_BASE));
        assert!(maps("0 100000 1000\n1000 200000 65536\n", 1000));
        assert!(!maps("0 0 2100000001\n", UID_BASE), "the range's end counts");
        assert!(!maps("", UID_BASE));
    }

    #[test]
    fn the_user_is_read_from_the_status_file() {
        assert_eq!(
            user_of("Name:\tx\nUid:\t2100000007\t1\t2\t3\nGid:\t5\n"),
            Some(2_100_000_007)
        );
        assert_eq!(user_of("Name:\tUid\n"), None);
    }
}
