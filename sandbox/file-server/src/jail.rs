//! A root of its own: an almost empty tmpfs with `/volumes`, where the daemon moves the pod's mounts, and the process's own
//! `/proc/self/fd`, through which the file system opens what it holds a location of.

use std::{fs, io, path::Path};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

/// What the guest sees as the root of the file system.
pub(crate) const VOLUMES: &str = "/volumes";

/// Needs a mount namespace of its own, and a directory to mount on. An error names the step.
pub(crate) fn enter(root: &Path) -> Result<(), (&'static str, io::Error)> {
    let at = |step: &'static str| move |error: io::Error| (step, error);
    let at_call = |step: &'static str| move |error: rustix::io::Errno| (step, error.into());
    // Nothing that happens on the host arrives here but through the mounts that the daemon moves in.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(at_call("making mounts private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", root, "tmpfs", flags, c"mode=0755,size=4m,nr_inodes=8k")
        .map_err(at_call("mounting the new root"))?;
    let below = |name: &str| root.join(name.trim_start_matches('/'));
    fs::create_dir_all(below(VOLUMES)).map_err(at("making the directory of volumes"))?;
    let own = format!("/proc/{}/fd", std::process::id());
    let descriptors = below("/proc/self/fd");
    fs::create_dir_all(&descriptors).map_err(at("making a place for descriptors"))?;
    mount_bind(&own, &descriptors).map_err(at_call("binding the process's descriptors"))?;
    rustix::process::chdir(root).map_err(at_call("entering the new root"))?;
    rustix::process::pivot_root(".", ".").map_err(at_call("changing the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(at_call("removing the old root"))?;
    rustix::process::chdir("/").map_err(at_call("entering the root"))
}
