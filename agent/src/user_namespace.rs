//! The user namespace that a pod's containers may have: made once, mapped as asked, held by a descriptor.
//!
//! Ids of the pod are those inside; what the kernel compares are those outside. File systems whose owners are written in ids of the pod
//! (images, volumes) are mounted with the same mapping, so that owners are who they are inside.
#![expect(unsafe_code, reason = "unshare and mount_setattr have no safe form")]

use std::{
    ffi::CStr,
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use caisson_agent_api::v1;
use rustix::{
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::{
    error::{AgentError, At},
    rootfs::name_of,
};

/// Argument that selects the role of the process that the namespace is made in.
pub(crate) const ARGUMENT: &str = "user-namespace";

/// Most lines of a mapping that a kernel takes.
const MAX_LINES: usize = 340;

/// Checks a mapping. Pure.
pub(crate) fn check(wanted: &v1::UserNamespace) -> Result<(), AgentError> {
    for (field, lines) in [
        ("user_namespace.uids", &wanted.uids),
        ("user_namespace.gids", &wanted.gids),
    ] {
        let ends = |from: u32, length: u32| from.checked_add(length).is_some();
        let fine = |line: &v1::IdMapping| {
            line.length > 0 && ends(line.container_id, line.length) && ends(line.host_id, line.length)
        };
        if lines.is_empty() || lines.len() > MAX_LINES || !lines.iter().all(fine) {
            let reason = format!("must be 1 to {MAX_LINES} ranges of ids below 2^32");
            return Err(AgentError::invalid(field, reason));
        }
        if outside(lines, 0).is_none() {
            return Err(AgentError::invalid(field, "do not map 0"));
        }
    }
    Ok(())
}

/// What an id of the pod is outside of it. Pure.
pub(crate) fn outside(lines: &[v1::IdMapping], id: u32) -> Option<u32> {
    lines.iter().find_map(|line| {
        let offset = id.checked_sub(line.container_id)?;
        (offset < line.length).then(|| line.host_id.checked_add(offset))?
    })
}

/// Content of a uid_map or gid_map. Pure.
fn map(lines: &[v1::IdMapping]) -> String {
    lines
        .iter()
        .map(|line| format!("{} {} {}\n", line.container_id, line.host_id, line.length))
        .collect()
}

/// Makes the namespace. Blocking.
pub(crate) fn create(wanted: &v1::UserNamespace) -> Result<OwnedFd, AgentError> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("caisson-agent")
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .at(|| "starting a process for the user namespace")?;
    let made = mapped(&mut child, wanted);
    // Its stdin closes, and it ends; the descriptor holds the namespace.
    drop(child.stdin.take());
    child.wait().at(|| "waiting for the user namespace's process")?;
    made
}

fn mapped(child: &mut std::process::Child, wanted: &v1::UserNamespace) -> Result<OwnedFd, AgentError> {
    let mut ready = [0];
    let stdout = child.stdout.as_mut().ok_or(rustix::io::Errno::BADF);
    stdout
        .map_err(std::io::Error::from)
        .and_then(|stdout| stdout.read_exact(&mut ready))
        .at(|| "making the user namespace")?;
    let of = |file: &str| Path::new("/proc").join(child.id().to_string()).join(file);
    for (file, lines) in [("gid_map", &wanted.gids), ("uid_map", &wanted.uids)] {
        fs::write(of(file), map(lines)).at(|| format!("writing {file}"))?;
    }
    let namespace = fs::File::open(of("ns/user")).at(|| "opening the user namespace")?;
    Ok(namespace.into())
}

/// The process that it is made in: says when it is there, and ends with its stdin.
pub(crate) fn main() -> ExitCode {
    // SAFETY: CLONE_FILES is not among the flags, so no descriptor changes its owner; there is no other thread.
    if unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }.is_err() {
        return ExitCode::FAILURE;
    }
    let mut stdout = std::io::stdout();
    let told = stdout.write_all(b"!").and_then(|()| stdout.flush());
    match told.and_then(|()| std::io::stdin().read(&mut [0])) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// As in linux/mount.h.
#[derive(Debug, Default)]
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// Maps the owners of a tree that is attached nowhere; what is mounted below its top keeps its own.
pub(crate) fn map_owners(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> std::io::Result<()> {
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP,
        user_namespace: u64::from(namespace.as_raw_fd().cast_unsigned()),
        ..MountAttributes::default()
    };
    let empty: &CStr = c"";
    // SAFETY: the path and the structure outlive the call, which only reads them; the size is that of the structure.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(&attributes),
            size_of::<MountAttributes>(),
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Mounts what is at `source` once more on `target`, with its owners mapped as in the namespace.
pub(crate) fn bind_mapped(
    source: &Path,
    target: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
) -> std::io::Result<()> {
    let tree = open_tree(
        rustix::fs::CWD,
        source,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    map_owners(tree.as_fd(), namespace)?;
    Ok(move_mount(
        tree.as_fd(),
        c"",
        rustix::fs::CWD,
        name_of(target).as_path(),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(container_id: u32, host_id: u32, length: u32) -> v1::IdMapping {
        v1::IdMapping {
            container_id,
            host_id,
            length,
        }
    }

    #[test]
    fn ids_are_mapped_where_a_range_has_them() {
        let lines = [line(0, 1000, 100), line(200, 5000, 1)];
        for (id, outside_id) in [
            (0, Some(1000)),
            (99, Some(1099)),
            (100, None),
            (200, Some(5000)),
            (201, None),
        ] {
            assert_eq!(outside(&lines, id), outside_id, "{id}");
        }
        assert_eq!(map(&lines), "0 1000 100\n200 5000 1\n");
    }

    #[test]
    fn mappings_that_no_kernel_takes_are_refused() {
        let check = |uids: Vec<v1::IdMapping>| {
            check(&v1::UserNamespace {
                uids,
                gids: vec![line(0, 0, 1)],
            })
        };
        assert!(check(vec![line(0, 1000, 65536)]).is_ok());
        for bad in [
            vec![],
            vec![line(0, 1000, 0)],
            vec![line(1, 1000, 10)],
            vec![line(0, u32::MAX, 2)],
            vec![line(0, 0, 1); MAX_LINES + 1],
        ] {
            assert!(check(bad).is_err());
        }
    }
}
