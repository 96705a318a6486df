//! Joining the pod's user namespace: the last thing before the process becomes its user.
//!
//! Everything before is done as the guest's root. What is mounted is handed over locked, so that nothing below a mask can be uncovered;
//! what the process mounts itself, it may.
#![expect(unsafe_code, reason = "unshare has no safe form")]

use std::os::fd::{AsFd, OwnedFd};

use caisson_agent_api::v1;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};

use super::{At, StageError};
use crate::{stage_spec::Identity, user_namespace};

/// The pod's user namespace.
pub(super) struct Users<'a> {
    pub(super) namespace: &'a OwnedFd,
    pub(super) mapping: &'a v1::UserNamespace,
}

impl Users<'_> {
    /// User and group that root of the pod is.
    pub(super) fn root(&self) -> (u32, u32) {
        (self.user(0).unwrap_or(0), self.group(0).unwrap_or(0))
    }

    /// What a user of the pod is outside.
    pub(super) fn user(&self, id: u32) -> Option<u32> {
        user_namespace::outside(&self.mapping.uids, id)
    }

    /// What a group of the pod is outside.
    pub(super) fn group(&self, id: u32) -> Option<u32> {
        user_namespace::outside(&self.mapping.gids, id)
    }
}

/// Who the identity is outside the namespace: an id that it does not have cannot be anybody in it.
pub(super) fn outside(users: Option<&Users<'_>>, identity: &Identity) -> Result<Identity, StageError> {
    let Some(users) = users else {
        return Ok(identity.clone());
    };
    let missing = |what: &str, id: u32| {
        StageError::Invalid(format!("{what} {id} is not mapped in the pod's user namespace"))
    };
    for group in &identity.groups {
        users.group(*group).ok_or_else(|| missing("group", *group))?;
    }
    Ok(Identity {
        uid: users
            .user(identity.uid)
            .ok_or_else(|| missing("user", identity.uid))?,
        gid: users
            .group(identity.gid)
            .ok_or_else(|| missing("group", identity.gid))?,
        ..identity.clone()
    })
}

/// Enters the namespace, with every capability over it; with a mount namespace that belongs to it when `own_mounts` asks for one.
pub(super) fn join(users: &Users<'_>, own_mounts: bool) -> Result<(), StageError> {
    move_into_thread_name_spaces(users.namespace.as_fd(), ThreadNameSpaceType::USER)
        .at(|| "joining the user namespace")?;
    if own_mounts {
        // SAFETY: CLONE_FILES is not among the flags, so no descriptor changes its owner.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.at(|| "making the mounts the user namespace's")?;
    }
    Ok(())
}
