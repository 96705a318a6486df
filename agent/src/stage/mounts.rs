//! A container's file systems: what is mounted where, in the container's own mount namespace, and how it becomes the root.
//!
//! Runs in the second half, before it has entered the root: sources are the agent's paths, destinations are resolved inside the root.

use std::{
    ffi::{CStr, CString, OsStr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::Path,
};

use caisson_agent_api::v1::MountPropagation;
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, StatVfsMountFlags, openat2},
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
        mount_bind_recursive, mount_change, mount_remount, move_mount, open_tree, unmount,
    },
};

use super::{At, StageError, device_nodes, users::Users};
use crate::{
    rootfs::{self, Want, name_of},
    stage_spec::{RootSpec, StageMount, StageSocket},
    user_namespace::{bind_mapped, map_owners},
};

/// The group of terminals.
const TTY: u32 = 5;

/// f_type of procfs.
const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// One tmpfs for all containers of the pod, as they share their IPC namespace.
pub(crate) const POD_SHM: &str = "/run/shm";

/// Mounts everything into the root; the answer is an open location of the root.
pub(super) fn build(spec: &RootSpec, users: Option<&Users<'_>>) -> Result<OwnedFd, StageError> {
    // While this namespace's mounts are still those of the agent's, to and from which others travel.
    let travelling = spec
        .mounts
        .iter()
        .map(travelling)
        .collect::<Result<Vec<_>, _>>()?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .at(|| "making the mount namespace private")?;
    let root = rustix::fs::open(
        &spec.path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .at(|| format!("opening the root file system {}", spec.path))?;
    kernel_file_systems(&root, spec.privileged, users)?;
    for (mount, tree) in spec.mounts.iter().zip(travelling) {
        match tree {
            Some(tree) => attach(&root, mount, &tree, users)?,
            None => one(&root, mount, users)?,
        }
        sockets(&root, mount, users)?;
    }
    for device in &spec.devices {
        device_nodes::own(&root, device, users)?;
    }
    for path in &spec.readonly_paths {
        make_readonly(&root, path)?;
    }
    for path in &spec.masked {
        mask(&root, path)?;
    }
    Ok(root)
}

fn kernel_file_systems(
    root: &OwnedFd,
    privileged: bool,
    users: Option<&Users<'_>>,
) -> Result<(), StageError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let system = if privileged {
        quiet
    } else {
        quiet | MountFlags::RDONLY
    };
    let (uid, gid) = users.map_or((0, 0), Users::root);
    special(root, "/proc", "proc", quiet, c"")?;
    special(
        root,
        "/dev",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::STRICTATIME,
        &options(format!("mode=755,size=65536k,uid={uid},gid={gid}"))?,
    )?;
    let device_directory =
        rootfs::open(root, "/dev", OFlags::RDONLY | OFlags::DIRECTORY).at(|| "opening /dev")?;
    device_nodes::create(&device_directory, privileged)?;
    special(
        root,
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        &options(match users.map_or(Some(TTY), |users| users.group(TTY)) {
            Some(group) => format!("newinstance,ptmxmode=0666,mode=0620,gid={group}"),
            None => "newinstance,ptmxmode=0666,mode=0620".to_owned(),
        })?,
    )?;
    special(root, "/dev/mqueue", "mqueue", quiet, c"")?;
    bind(root, "/dev/shm", POD_SHM, false, None)?;
    special(root, "/sys", "sysfs", system, c"")?;
    special(root, "/sys/fs/cgroup", "cgroup2", system, c"")
}

fn options(text: String) -> Result<CString, StageError> {
    CString::new(text).map_err(|_| StageError::Protocol("NUL in mount options"))
}

fn special(
    root: &OwnedFd,
    path: &str,
    kind: &str,
    flags: MountFlags,
    options: &CStr,
) -> Result<(), StageError> {
    // A link of the image's may lead anywhere inside, but not into the /proc that is mounted first.
    let target = destination(root, path, Want::Directory)?;
    mount(kind, name_of(&target), kind, flags, options).at(|| format!("mounting {kind} on {path}"))
}

/// A copy of what is to be mounted, attached nowhere, which mounts travel to; `None` when they shall not.
fn travelling(wanted: &StageMount) -> Result<Option<OwnedFd>, StageError> {
    if wanted.propagation() == MountPropagation::MountPrivate {
        return Ok(None);
    }
    let source = opened(wanted)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(&source, c"", flags).at(|| format!("copying the mounts at {}", wanted.source))?;
    Ok(Some(tree))
}

/// What is to be bound, as a location.
fn opened(wanted: &StageMount) -> Result<OwnedFd, StageError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let source =
        rustix::fs::open(&wanted.source, flags, Mode::empty()).at(|| format!("opening {}", wanted.source))?;
    if wanted.inside.is_empty() {
        return Ok(source);
    }
    rootfs::open(&source, &wanted.inside, OFlags::PATH)
        .at(|| format!("opening {} in {}", wanted.inside, wanted.source))
}

/// Attaches such a copy.
fn attach(
    root: &OwnedFd,
    wanted: &StageMount,
    tree: &OwnedFd,
    users: Option<&Users<'_>>,
) -> Result<(), StageError> {
    let path = &wanted.destination;
    let step = || format!("binding {} to {path}", wanted.source);
    let metadata = std::fs::metadata(name_of(tree)).at(step)?;
    let want = if metadata.is_dir() {
        Want::Directory
    } else {
        Want::File
    };
    let target = destination(root, path, want)?;
    if let Some(users) = users.filter(|_| wanted.pod_ids) {
        map_owners(tree.as_fd(), users.namespace.as_fd()).at(step)?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(tree, c"", rustix::fs::CWD, name_of(&target).as_path(), flags).at(step)?;
    if wanted.propagation() == MountPropagation::MountSlave {
        let mounted = rootfs::open(root, path, OFlags::PATH).at(step)?;
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change(name_of(&mounted), flags).at(step)?;
    }
    if wanted.readonly {
        remount_readonly(root, path)?;
    }
    Ok(())
}

fn one(root: &OwnedFd, wanted: &StageMount, users: Option<&Users<'_>>) -> Result<(), StageError> {
    let path = &wanted.destination;
    if !wanted.inside.is_empty() {
        let inside = opened(wanted)?;
        let source = name_of(&inside).to_string_lossy().into_owned();
        let users = users.filter(|_| wanted.pod_ids);
        return bind(root, path, &source, wanted.readonly, users);
    }
    if !wanted.source.is_empty() {
        let users = users.filter(|_| wanted.pod_ids);
        bind(root, path, &wanted.source, wanted.readonly, users)?;
        return if wanted.inert {
            remount_inert(root, path)
        } else {
            Ok(())
        };
    }
    let (uid, gid) = users.map_or((0, 0), Users::root);
    let options = options(format!("{},uid={uid},gid={gid}", wanted.options))?;
    let target = destination(root, path, Want::Directory)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if wanted.readonly {
        flags |= MountFlags::RDONLY;
    }
    mount("tmpfs", name_of(&target), "tmpfs", flags, options.as_c_str())
        .at(|| format!("mounting tmpfs on {path}"))
}

fn bind(
    root: &OwnedFd,
    path: &str,
    source: &str,
    readonly: bool,
    users: Option<&Users<'_>>,
) -> Result<(), StageError> {
    let directory = std::fs::metadata(source)
        .at(|| format!("looking at {source}"))?
        .is_dir();
    let target = destination(root, path, if directory { Want::Directory } else { Want::File })?;
    match users {
        Some(users) => bind_mapped(Path::new(source), target.as_fd(), users.namespace.as_fd())
            .at(|| format!("binding {source} to {path} with the ids of the user namespace"))?,
        // With what other containers have mounted in a volume of the pod's so far.
        None => {
            mount_bind_recursive(source, name_of(&target)).at(|| format!("binding {source} to {path}"))?
        }
    }
    if readonly {
        remount_readonly(root, path)?;
    }
    Ok(())
}

/// Binds sockets of the agent's over those of the host below a mount, where they are still seen. What a container of the pod has put there
/// meanwhile stays what it is.
fn sockets(root: &OwnedFd, wanted: &StageMount, users: Option<&Users<'_>>) -> Result<(), StageError> {
    if wanted.sockets.is_empty() {
        return Ok(());
    }
    let path = &wanted.destination;
    let volume = rootfs::open(root, path, OFlags::PATH).at(|| format!("opening {path}"))?;
    for socket in &wanted.sockets {
        let step = || {
            let name = String::from_utf8_lossy(&socket.path);
            format!("binding {} to {name:?} below {path}", socket.source)
        };
        let Some(target) = below(&volume, socket) else {
            continue;
        };
        match users.filter(|_| wanted.pod_ids) {
            Some(users) => {
                bind_mapped(Path::new(&socket.source), target.as_fd(), users.namespace.as_fd()).at(step)?;
            }
            None => mount_bind(&socket.source, name_of(&target)).at(step)?,
        }
        if wanted.readonly
            && let Some(mounted) = opened_below(&volume, socket, ResolveFlags::empty())
        {
            set_readonly(&mounted, &step())?;
        }
    }
    Ok(())
}

/// The socket of the host below a volume; `None` when something else is there by now, or a link or a mount on the way.
fn below(volume: &OwnedFd, socket: &StageSocket) -> Option<OwnedFd> {
    let target = opened_below(volume, socket, ResolveFlags::NO_XDEV)?;
    let found = std::fs::metadata(name_of(&target)).ok()?;
    let meant = std::fs::symlink_metadata(&socket.same_as).ok()?;
    // Both are seen through file systems that number files as they come; a socket's time is that of its making.
    let same = (found.mtime(), found.mtime_nsec()) == (meant.mtime(), meant.mtime_nsec());
    (found.file_type().is_socket() && same).then_some(target)
}

fn opened_below(volume: &OwnedFd, socket: &StageSocket, besides: ResolveFlags) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | besides;
    openat2(
        volume,
        OsStr::from_bytes(&socket.path),
        flags,
        Mode::empty(),
        resolve,
    )
    .ok()
}

/// Where a mount goes. Never into /proc, by whatever links the image has: what is there would be believed by this very stage.
fn destination(root: &OwnedFd, path: &str, want: Want) -> Result<OwnedFd, StageError> {
    let target = rootfs::ensure(root, path, want).at(|| format!("creating mount point {path}"))?;
    let kind = rustix::fs::fstatfs(&target)
        .at(|| format!("looking at mount point {path}"))?
        .f_type;
    if kind == PROC_SUPER_MAGIC {
        return Err(StageError::Invalid(format!(
            "mount destination {path} is inside /proc"
        )));
    }
    Ok(target)
}

/// Makes the mount at `path` one of which nothing can come but reading.
fn remount_inert(root: &OwnedFd, path: &str) -> Result<(), StageError> {
    let mounted = rootfs::open(root, path, OFlags::PATH).at(|| format!("opening {path}"))?;
    let flags =
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_remount(name_of(&mounted), flags, c"").at(|| format!("restricting {path}"))
}

/// Makes the mount at `path` read-only, keeping its other flags.
fn remount_readonly(root: &OwnedFd, path: &str) -> Result<(), StageError> {
    // A new lookup: the old location is below the mount now.
    let mounted = rootfs::open(root, path, OFlags::PATH).at(|| format!("opening {path}"))?;
    set_readonly(&mounted, path)
}

fn set_readonly(mounted: &OwnedFd, path: &str) -> Result<(), StageError> {
    let old = rustix::fs::fstatvfs(mounted)
        .at(|| format!("looking at {path}"))?
        .f_flag;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    for (has, keep) in [
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ] {
        if old.contains(has) {
            flags |= keep;
        }
    }
    mount_remount(name_of(mounted), flags, c"").at(|| format!("making {path} read-only"))
}

fn existing(root: &OwnedFd, path: &str) -> Result<Option<(OwnedFd, bool)>, StageError> {
    let directory = match rootfs::is_directory(root, path) {
        Ok(Some(directory)) => directory,
        Ok(None) => return Ok(None),
        Err(error) => return Err(error).at(|| format!("looking at {path}")),
    };
    match rootfs::open(root, path, OFlags::PATH) {
        Ok(fd) => Ok(Some((fd, directory))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error).at(|| format!("opening {path}")),
    }
}

fn make_readonly(root: &OwnedFd, path: &str) -> Result<(), StageError> {
    let Some((target, _)) = existing(root, path)? else {
        return Ok(());
    };
    let name = name_of(&target);
    mount_bind(&name, &name).at(|| format!("binding {path} to itself"))?;
    remount_readonly(root, path)
}

fn mask(root: &OwnedFd, path: &str) -> Result<(), StageError> {
    let Some((target, directory)) = existing(root, path)? else {
        return Ok(());
    };
    let masked = if directory {
        mount(
            "tmpfs",
            name_of(&target),
            "tmpfs",
            MountFlags::RDONLY,
            c"size=0k,nr_inodes=1",
        )
        .or_else(|_| mount("tmpfs", name_of(&target), "tmpfs", MountFlags::RDONLY, c""))
    } else {
        mount_bind("/dev/null", name_of(&target))
    };
    masked.at(|| format!("masking {path}"))
}

/// Binds `slave`, a terminal, to /dev/console.
pub(super) fn console(root: impl AsFd, slave: impl AsFd) -> Result<(), StageError> {
    let target = rootfs::ensure(root, "/dev/console", Want::File).at(|| "creating /dev/console")?;
    mount_bind(name_of(slave), name_of(&target)).at(|| "binding the terminal to /dev/console")
}

/// Makes the built tree the root of this process, and drops everything that was visible before.
pub(super) fn enter(spec: &RootSpec, root: OwnedFd) -> Result<(), StageError> {
    if spec.readonly {
        remount_readonly(&root, "/")?;
    }
    rustix::process::fchdir(&root).at(|| "entering the root file system")?;
    // The old root ends on top of the new one, from where it is removed: no directory for it is needed.
    rustix::process::pivot_root(".", ".").at(|| "changing the root")?;
    unmount(".", UnmountFlags::DETACH).at(|| "removing the old root")?;
    rustix::process::chdir("/").at(|| "entering the root")
}
