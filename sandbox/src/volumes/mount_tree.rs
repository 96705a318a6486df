//! Mount trees as objects: a copy of what is mounted at a place, changed while nobody sees it, and moved into another mount namespace.

#![expect(
    unsafe_code,
    reason = "mount_setattr has no safe form, and a thread leaves the file system context that it shares"
)]

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use serde::{Deserialize, Serialize};

use crate::spec::Propagation;

/// How much of a tree is read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReadOnly {
    No,
    /// What is mounted at the place itself, and not what is mounted below it.
    Top,
    All,
}

/// struct mount_attr of linux/mount.h.
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// A copy of the mounts at a location and below, attached nowhere.
#[derive(Debug)]
pub(crate) struct MountTree(OwnedFd);

impl MountTree {
    /// Copies. What is mounted below on the host later appears in the copy when it is a slave, and only then.
    pub(crate) fn copy(
        location: impl AsFd,
        readonly: ReadOnly,
        propagation: Propagation,
    ) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = Self(open_tree(location, c"", flags)?);
        let propagation = match propagation {
            Propagation::Private => libc::MS_PRIVATE,
            // The other direction is refused before.
            Propagation::Slave | Propagation::Shared => libc::MS_SLAVE,
        };
        let set = |set| MountAttributes {
            set,
            ..MountAttributes::default()
        };
        let spread = MountAttributes {
            propagation,
            ..MountAttributes::default()
        };
        tree.change(&spread, true)?;
        match readonly {
            ReadOnly::No => {}
            ReadOnly::Top => tree.change(&set(libc::MOUNT_ATTR_RDONLY), false)?,
            ReadOnly::All => tree.change(&set(libc::MOUNT_ATTR_RDONLY), true)?,
        }
        Ok(tree)
    }

    fn change(&self, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
        let mut flags = libc::AT_EMPTY_PATH;
        if recursive {
            flags |= libc::AT_RECURSIVE;
        }
        // SAFETY: the path is a static empty string, the structure lives across the call, which reads as many bytes as it is told.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                flags,
                std::ptr::from_ref(attributes),
                size_of::<MountAttributes>(),
            )
        };
        if answer == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Attaches it at `place` of another mount namespace, where a directory or file is made for it. Blocking, on a thread of its own.
    pub(crate) fn attach(self, namespace: File, place: &Path, directory: bool) -> io::Result<()> {
        let place = place.to_owned();
        let thread = std::thread::Builder::new()
            .name("volume-mount".to_owned())
            .spawn(move || {
                // SAFETY: only the thread's own root and working directory are separated, of which no other thread knows; its
                // descriptors stay shared.
                unsafe { unshare_unsafe(UnshareFlags::FS) }?;
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
                if directory {
                    fs::create_dir(&place)?;
                } else {
                    File::create_new(&place)?;
                }
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                Ok(move_mount(&self.0, c"", rustix::fs::CWD, &place, flags)?)
            })?;
        thread
            .join()
            .map_err(|_| io::Error::other("the thread in the mount namespace has panicked"))?
    }
}
