//! Deletes a tree that a container has filled, however deep it is.
//!
//! A container can nest directories deeper than any stack, path or table of descriptors reaches. So nothing here recurses: what lies
//! deeper than one level is moved up, until there is nothing below the first level. Links are never followed.

use std::{
    ffi::CStr,
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat},
    io::Errno,
};

/// Somebody who still runs could refill a tree as fast as it is emptied.
const BOUND: Duration = Duration::from_secs(60);

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Deletes what is at `path`, a directory or not. Blocking.
pub(crate) fn delete(path: &Path) -> io::Result<()> {
    let top = match rustix::fs::open(path, DIRECTORY, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOTDIR | Errno::LOOP) => return fs::remove_file(path),
        Err(error) => return Err(error.into()),
    };
    let deadline = Instant::now() + BOUND;
    let mut moved = 0;
    while !pass(&top, &mut moved)? {
        if Instant::now() > deadline {
            return Err(Errno::TIMEDOUT.into());
        }
    }
    fs::remove_dir(path)
}

/// Takes one level off; true when there was nothing any more.
fn pass(top: &OwnedFd, moved: &mut u64) -> io::Result<bool> {
    let mut empty = true;
    for entry in Dir::read_from(top)? {
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        empty = false;
        if remove(top, name)? {
            continue;
        }
        let below = openat(top, name, DIRECTORY, Mode::empty())?;
        for inner in Dir::read_from(&below)? {
            let inner = inner?;
            if !is_dots(inner.file_name()) && !remove(&below, inner.file_name())? {
                raise(&below, inner.file_name(), top, moved)?;
            }
        }
        // If somebody has put something there meanwhile, the next pass finds it.
        remove(top, name)?;
    }
    Ok(empty)
}

fn is_dots(name: &CStr) -> bool {
    name == c"." || name == c".."
}

/// Removes a file or an empty directory; false for a directory that is not empty.
fn remove(parent: &OwnedFd, name: &CStr) -> io::Result<bool> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(error) => return Err(error.into()),
    }
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Moves a directory up, to a name that is free.
fn raise(from: &OwnedFd, name: &CStr, top: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved = moved.wrapping_add(1);
        let free = format!(".caisson-{moved}");
        match renameat_with(from, name, top, free, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_deeper_than_any_stack_or_path_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut here = rustix::fs::open(&tree, DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..5_000 {
            rustix::fs::mkdirat(&here, "d", Mode::RWXU).unwrap();
            here = openat(&here, "d", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(here);
        // The stack of the agent's threads.
        std::thread::Builder::new()
            .stack_size(512 << 10)
            .spawn({
                let tree = tree.clone();
                move || delete(&tree).unwrap()
            })
            .unwrap()
            .join()
            .unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn links_are_deleted_and_not_followed_and_taken_names_are_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::create_dir_all(tree.join("a/e/f")).unwrap();
        fs::create_dir_all(tree.join(".caisson-1/x")).unwrap();
        fs::write(tree.join(".caisson-2"), "").unwrap();
        fs::write(tree.join("a/b/c/file"), "").unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        symlink(&outside, tree.join("a/b/link")).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        delete(&tree).unwrap();
        assert!(!tree.exists() && outside.join("kept").exists());
        symlink(&outside, &tree).unwrap();
        delete(&tree).unwrap();
        assert!(!tree.is_symlink() && outside.join("kept").exists());
        assert_eq!(delete(&tree).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
