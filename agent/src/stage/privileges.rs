//! What the process may do: resource limits, capabilities, user and groups.

use caisson_agent_api::{capabilities::number, v1};
use rustix::{
    fs::{Gid, Uid},
    io::Errno,
    process::{Resource, Rlimit, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
        set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{At, StageError};
use crate::stage_spec::Identity;

const RLIMITS: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_CORE", Resource::Core),
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_STACK", Resource::Stack),
];

/// The set with these names; the first unknown name is the error.
pub(crate) fn capability_set(names: &[String]) -> Result<CapabilitySet, String> {
    let mut set = CapabilitySet::empty();
    for name in names {
        set |= number(name).map_or(Err(name.clone()), |bit| {
            Ok(CapabilitySet::from_bits_retain(1 << bit))
        })?;
    }
    Ok(set)
}

/// The limit with this name.
pub(crate) fn rlimit(name: &str) -> Option<Resource> {
    RLIMITS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, resource)| *resource)
}

/// How soon the kernel kills this process and its children when memory is short.
pub(super) fn set_oom_score_adj(adjustment: i32) -> Result<(), StageError> {
    std::fs::write("/proc/self/oom_score_adj", adjustment.to_string())
        .at(|| format!("setting oom_score_adj to {adjustment}"))
}

/// Sets all limits.
pub(super) fn set_rlimits(limits: &[v1::Rlimit]) -> Result<(), StageError> {
    for limit in limits {
        let name = &limit.r#type;
        let resource = rlimit(name).ok_or_else(|| StageError::Invalid(format!("unknown rlimit {name}")))?;
        let value = |value: u64| (value != u64::MAX).then_some(value);
        let wanted = Rlimit {
            current: value(limit.soft),
            maximum: value(limit.hard),
        };
        setrlimit(resource, wanted).at(|| format!("setting {name} to {}:{}", limit.soft, limit.hard))?;
    }
    Ok(())
}

/// Becomes the user with exactly these capabilities; with CAP_SYS_ADMIN besides when `borrow` asks for it, to be given back by
/// [`settle`]. Answers what it settles on.
pub(super) fn become_user(
    identity: &Identity,
    wanted: &v1::Capabilities,
    borrow: bool,
) -> Result<CapabilitySets, StageError> {
    let set = |names: &[String]| {
        capability_set(names).map_err(|name| StageError::Invalid(format!("unknown capability {name}")))
    };
    let kernel = known_to_kernel();
    let bounding = set(&wanted.bounding)?;
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kernel.contains(capability) && !bounding.contains(capability) {
            remove_capability_from_bounding_set(capability).at(|| format!("dropping capability {bit}"))?;
        }
    }
    set_keep_capabilities(true).at(|| "keeping capabilities across the change of user")?;
    let groups: Vec<Gid> = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).at(|| format!("setting supplemental groups {:?}", identity.groups))?;
    let gid = Gid::from_raw(identity.gid);
    set_thread_res_gid(gid, gid, gid).at(|| format!("becoming group {}", identity.gid))?;
    let uid = Uid::from_raw(identity.uid);
    set_thread_res_uid(uid, uid, uid).at(|| format!("becoming user {}", identity.uid))?;
    set_keep_capabilities(false).at(|| "dropping capabilities")?;
    let sets = CapabilitySets {
        effective: set(&wanted.effective)? & kernel,
        permitted: set(&wanted.permitted)? & kernel,
        inheritable: set(&wanted.inheritable)? & kernel,
    };
    let borrowed = if borrow {
        CapabilitySet::SYS_ADMIN
    } else {
        CapabilitySet::empty()
    };
    let for_now = CapabilitySets {
        effective: sets.effective | borrowed,
        permitted: sets.permitted | borrowed,
        inheritable: sets.inheritable,
    };
    set_capabilities(None, for_now).at(|| "setting capabilities")?;
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error).at(|| "clearing ambient capabilities"),
    }
    for capability in (set(&wanted.ambient)? & kernel).iter() {
        configure_capability_in_ambient_set(capability, true)
            .at(|| format!("raising ambient capability {capability:?}"))?;
    }
    Ok(sets)
}

/// Gives back what [`become_user`] borrowed.
pub(super) fn settle(own: CapabilitySets) -> Result<(), StageError> {
    set_capabilities(None, own).at(|| "giving up CAP_SYS_ADMIN under the seccomp filter")
}

/// Root has all that the kernel knows; a name that it does not know is not worth an error.
fn known_to_kernel() -> CapabilitySet {
    capabilities(None).map_or_else(|_| CapabilitySet::all(), |sets| sets.permitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree_with_the_kernel_headers() {
        let set = |name: &str| capability_set(&[name.to_owned()]).unwrap();
        assert_eq!(set("CAP_CHOWN"), CapabilitySet::CHOWN);
        assert_eq!(set("CAP_SYS_ADMIN"), CapabilitySet::SYS_ADMIN);
        assert_eq!(set("CAP_SETFCAP"), CapabilitySet::SETFCAP);
        assert_eq!(set("CAP_CHECKPOINT_RESTORE"), CapabilitySet::CHECKPOINT_RESTORE);
    }

    #[test]
    fn an_unknown_name_is_told() {
        assert_eq!(
            capability_set(&["CAP_CHOWN".into(), "CAP_FLY".into()]),
            Err("CAP_FLY".into())
        );
        assert!(rlimit("RLIMIT_WINGS").is_none());
        assert!(rlimit("RLIMIT_NOFILE").is_some());
    }
}
