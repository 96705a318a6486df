//! Archives that are made again out of converted layers: before Go and GNU tar, which wrote them first, and out of damaged layers.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;

use caisson_erofs::{ErofsError, ErrorKind, Limits, ModeBits, convert_layer, restore_layer};
use support::layer::{Layer, Meta, mode};
use tar::EntryType;

fn converted(archive: &[u8]) -> File {
    let output = tempfile::tempfile().unwrap();
    convert_layer(archive, output, &Limits::default()).unwrap().0
}

fn restored(layers: &[File]) -> Result<Vec<u8>, ErofsError> {
    restored_with(layers, ModeBits::Permissions)
}

fn restored_with(layers: &[File], modes: ModeBits) -> Result<Vec<u8>, ErofsError> {
    let (archive, said) = restore_layer(layers, Vec::new(), modes, &Limits::default())?;
    assert_eq!(archive.len() as u64, said.bytes);
    Ok(archive)
}

fn bytes_of(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn an_archive_as_go_writes_it_comes_back_byte_for_byte() {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/go/layer.go");
    for (modes, arguments) in [
        (ModeBits::Permissions, &["run", program][..]),
        (ModeBits::FileType, &["run", program, "types"]),
    ] {
        let output = match Command::new("go").args(arguments).output() {
            Ok(output) => output,
            Err(error) => return eprintln!("skipped: go: {error}"),
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "go run: {said}");
        let again = restored_with(&[converted(&output.stdout)], modes).unwrap();
        let differs = again
            .iter()
            .zip(&output.stdout)
            .position(|(ours, theirs)| ours != theirs);
        assert_eq!(differs, None, "in block {:?}", differs.map(|at| at / 512));
        assert_eq!(again.len(), output.stdout.len());
    }
}

#[test]
fn an_archive_as_gnu_tar_writes_it_comes_back_byte_for_byte() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    std::fs::create_dir(root.join("bin")).unwrap();
    for size in [0, 511, 512, 300_000] {
        std::fs::write(root.join(format!("bin/{size}")), vec![b'x'; size]).unwrap();
    }
    std::os::unix::fs::symlink("../bin/0", root.join("bin/link")).unwrap();
    std::fs::hard_link(root.join("bin/511"), root.join("bin/second")).unwrap();
    let setgid = std::fs::Permissions::from_mode(0o2750);
    std::fs::set_permissions(root.join("bin/512"), setgid).unwrap();
    // Its own records carry times of access, and its blocks come in twenties.
    let output = Command::new("tar")
        .args([
            "--format=ustar",
            "--numeric-owner",
            "--sort=name",
            "-b1",
            "-cf-",
            "bin",
        ])
        .current_dir(root)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tar: {said}");
    let again = restored(&[converted(&output.stdout)]).unwrap();
    assert!(again == output.stdout, "it came back differently");
}

#[test]
fn an_empty_archive_is_two_empty_blocks() {
    assert_eq!(restored(&[converted(&[])]).unwrap(), [0; 1024]);
}

/// Mode, owner, and attributes of each hard link.
fn links(archive: &[u8]) -> BTreeMap<String, (u32, u64, Vec<String>)> {
    let mut archive = tar::Archive::new(archive);
    let mut found = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.header().entry_type() != EntryType::Link {
            continue;
        }
        let records = entry.pax_extensions().unwrap();
        let keys = records
            .into_iter()
            .flatten()
            .map(|record| record.unwrap().key().unwrap().to_owned());
        let keys = keys.collect();
        let header = entry.header();
        let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        found.insert(path, (header.mode().unwrap(), header.uid().unwrap(), keys));
    }
    found
}

#[test]
fn a_hard_link_says_of_its_target_what_the_target_is_wherever_that_lies() {
    let capable = Meta {
        mode: 0o4711,
        uid: 7,
        pax: vec![("SCHILY.xattr.security.capability".to_owned(), vec![1; 20])],
        ..Meta::default()
    };
    let lower = Layer::new()
        .entry("usr/lib/tool", EntryType::Regular, &capable, b"tool", "")
        .symlink("lib", "usr/lib")
        .finish();
    let upper = Layer::new()
        .entry(
            "here",
            EntryType::Regular,
            &Meta {
                uid: 9,
                ..mode(0o600)
            },
            b"h",
            "",
        )
        .hardlink("second", "here")
        .hardlink("third", "/second")
        .hardlink("below", "lib/tool")
        .finish();
    let (lower, mut upper) = (converted(&lower), converted(&upper));
    let archive = restored(&[lower.try_clone().unwrap(), upper.try_clone().unwrap()]).unwrap();
    let found = links(&archive);
    assert_eq!(found["second"], (0o600, 9, Vec::new()));
    assert_eq!(found["third"], (0o600, 9, Vec::new()));
    assert_eq!(
        found["below"],
        (0o4711, 7, vec!["SCHILY.xattr.security.capability".to_owned()])
    );
    assert_eq!(bytes_of(&mut converted(&archive)), bytes_of(&mut upper));
    // Without what it lies on it is no layer of an image.
    assert!(matches!(restored(&[upper]), Err(ErofsError::Entry { .. })));
}

#[test]
fn a_layer_without_end_and_no_layer_at_all_are_errors() {
    assert!(restored(&[]).is_err());
    assert!(restored(&[file_of(b"no layer")]).is_err());
    // Files that reach into each other.
    let tar = Layer::new()
        .file("a", vec![b'x'; 100_000])
        .file("b", vec![b'x'; 100_000])
        .finish();
    let bytes = bytes_of(&mut converted(&tar));
    let first = 0_u32.to_le_bytes();
    let size = 100_000_u64.to_le_bytes();
    let at = bytes
        .windows(12)
        .position(|window| window == [&size[..], &first[..]].concat())
        .unwrap();
    let mut changed = bytes.clone();
    changed[at..at + 8].copy_from_slice(&(4096_u64 * 40).to_le_bytes());
    let error = restored(&[file_of(&changed)]).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Host, "{error}");
    let few = Limits {
        max_entries: 1,
        ..Limits::default()
    };
    let error = restore_layer(&[file_of(&bytes)], Vec::new(), ModeBits::Permissions, &few).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
}

#[test]
fn a_damaged_layer_is_an_error_or_an_archive_and_never_a_panic() {
    let tar = Layer::new()
        .dir("d", 0o755)
        .entry(
            "d/file",
            EntryType::Regular,
            &Meta {
                pax: vec![("SCHILY.xattr.user.a".to_owned(), b"1".to_vec())],
                ..mode(0o644)
            },
            b"content",
            "",
        )
        .hardlink("d/link", "d/file")
        .symlink("s", "d/file")
        .device("null", EntryType::Char, 1, 3)
        .file("d/.wh.gone", "")
        .finish();
    let bytes = bytes_of(&mut converted(&tar));
    // The records; what is behind them is looked at where converted layers are read.
    let records = 4096..4096
        + bytes[4096..]
            .iter()
            .rposition(|byte| *byte != 0)
            .unwrap()
            .min(800);
    let mut file = file_of(&bytes);
    for at in records {
        file.write_all_at(&[bytes[at] ^ 0x81], at as u64).unwrap();
        if let Ok(archive) = restored(&[file.try_clone().unwrap()]) {
            assert!(archive.len() < 1 << 20);
        }
        file.write_all_at(&bytes[at..=at], at as u64).unwrap();
    }
    assert_eq!(bytes_of(&mut file), bytes);
}
