//! Images before outside judges: fsck.erofs, the running kernel against GNU tar, and packages of a real distribution.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod support;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::layer::{Layer, Meta, mode};
use support::oracle::{Mounted, check, fsck};
use support::{ImageBuilder, build};
use tar::EntryType;

/// Everything a program could ask about a file, but its inode number.
#[derive(Debug, PartialEq)]
struct Seen {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    links: u64,
    rdev: u64,
    data: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The least name under which the same file is known.
    first_name: String,
}

fn walk(root: &Path) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut to_visit = vec![String::new()];
    while let Some(name) = to_visit.pop() {
        let path = root.join(&name);
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let data = if kind.is_file() {
            fs::read(&path).unwrap()
        } else if kind.is_symlink() {
            fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        if kind.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                let child = entry.unwrap().file_name().into_string().unwrap();
                to_visit.push(if name.is_empty() {
                    child
                } else {
                    format!("{name}/{child}")
                });
            }
        }
        names.entry(metadata.ino()).or_default().push(name.clone());
        let found = Seen {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            // The link count of a directory is every file system's own business.
            links: if kind.is_dir() { 0 } else { metadata.nlink() },
            rdev: metadata.rdev(),
            data,
            xattrs: xattrs(&path),
            first_name: String::new(),
        };
        seen.insert(name, (metadata.ino(), found));
    }
    let first = |ino| names[&ino].iter().min().unwrap().clone();
    seen.into_iter()
        .map(|(name, (ino, found))| {
            (
                name,
                Seen {
                    first_name: first(ino),
                    ..found
                },
            )
        })
        .collect()
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut list).unwrap();
    let mut found = BTreeMap::new();
    for name in list[..length].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let name_c = CString::new(name).unwrap();
        let length = rustix::fs::lgetxattr(path, &name_c, &mut value).unwrap();
        found.insert(name.to_vec(), value[..length].to_vec());
    }
    found
}

/// What GNU tar makes of a layer, as root.
fn untar(layer: &[u8], directory: &Path) {
    let archive = directory.with_extension("tar");
    fs::write(&archive, layer).unwrap();
    let status = Command::new("tar")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--same-owner",
            "--delay-directory-restore",
            "--numeric-owner",
            "-pxf",
        ])
        .arg(&archive)
        .arg("-C")
        .arg(directory)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

fn assert_same(expected: &BTreeMap<String, Seen>, found: &BTreeMap<String, Seen>) {
    assert_eq!(
        expected.keys().collect::<Vec<_>>(),
        found.keys().collect::<Vec<_>>()
    );
    for (name, file) in expected {
        assert!(
            *file == found[name],
            "{name}: tar has {file:?}, the image {:?}",
            found[name]
        );
    }
}

/// A layer with everything in it that a layer can have.
fn varied() -> Vec<u8> {
    let pax = |records: &[(&str, &[u8])]| Meta {
        mode: 0o755,
        uid: 70_000,
        gid: 3_000_000_000,
        mtime: 1_700_000_000,
        pax: records
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.to_vec()))
            .collect(),
    };
    let capability: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let acl: &[u8] = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x05\0\x01\0\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x05\0\xff\xff\xff\xff\x20\0\x05\0\xff\xff\xff\xff";
    let big = vec![b'v'; 3000];
    let attributes = pax(&[
        ("SCHILY.xattr.security.capability", capability),
        ("SCHILY.xattr.user.plain", b"x"),
        ("SCHILY.xattr.user.big", &big),
        ("SCHILY.xattr.trusted.t", b"\0\x01"),
        ("mtime", b"1700000000.123456789"),
    ]);
    let mut layer = Layer::new()
        .dir("./", 0o755)
        .entry(
            "bin/",
            EntryType::Directory,
            &pax(&[("SCHILY.xattr.user.d", b"1"), ("mtime", b"-5.5")]),
            b"",
            "",
        )
        .entry("bin/tool", EntryType::Regular, &attributes, &[0x5a; 9000], "")
        .entry(
            "bin/acl",
            EntryType::Regular,
            &pax(&[("SCHILY.xattr.system.posix_acl_access", acl)]),
            b"a",
            "",
        )
        .hardlink("bin/tool2", "bin/tool")
        .hardlink("zz", "./bin/tool2")
        .symlink("short", "bin/tool")
        .symlink("long", &"l/".repeat(2047))
        .device("null", EntryType::Char, 1, 3)
        .device("disk", EntryType::Block, 259, 70_000)
        .entry("pipe", EntryType::Fifo, &mode(0o622), b"", "")
        .file("empty", "")
        .file("block", [1; 4096])
        .file("block1", [1; 4097])
        .dir("hollow", 0o500)
        .dir("many", 0o1777);
    for i in 0..3000 {
        layer = layer.file(&format!("many/{i}-{}", "y".repeat(i % 230)), i.to_string());
    }
    // Names around "." and "..", and every size of a directory's last block.
    for name in ["!", "-", ".a", "..a", "...", ".-", "0", "~"] {
        layer = layer.file(&format!("odd/{name}"), name);
    }
    for i in 0..60 {
        let name = format!("sizes/{i}/{}", "s".repeat(200));
        layer = (0..i).fold(layer, |layer, j| layer.file(&format!("{name}{j}"), ""));
        let long = Meta {
            pax: vec![("SCHILY.xattr.user.n".into(), vec![b'n'; 62 * i])],
            ..mode(0o755)
        };
        layer = layer.entry(&format!("sizes/{i}"), EntryType::Directory, &long, b"", "");
        layer = layer.entry(
            &format!("sizes/l{i}"),
            EntryType::Symlink,
            &mode(0o777),
            b"",
            &"t".repeat(1 + 67 * i),
        );
    }
    layer.finish()
}

#[test]
fn fsck_finds_no_fault_with_a_varied_image() {
    let Some(fsck) = fsck() else { return };
    check(&fsck, &build(&[]).unwrap());
    check(&fsck, &build(&[varied()]).unwrap());
    let upper = Layer::new()
        .file(".wh.bin", "")
        .dir("many", 0o700)
        .file("many/.wh..wh..opq", "")
        .finish();
    check(&fsck, &build(&[varied(), upper]).unwrap());
}

#[test]
fn the_kernel_shows_what_gnu_tar_extracts() {
    let layer = varied();
    let Some(mounted) = Mounted::new(&build(std::slice::from_ref(&layer)).unwrap()) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let extracted = directory.path().join("root");
    fs::create_dir(&extracted).unwrap();
    untar(&layer, &extracted);
    let (mut expected, found) = (walk(&extracted), walk(&mounted.root()));
    // tar gives directories that are not in the archive the current time; ours have the epoch.
    for name in ["odd", "sizes"] {
        assert_eq!(found[name].mtime, (0, 0));
        expected.get_mut(name).unwrap().mtime = (0, 0);
    }
    assert_same(&expected, &found);
}

#[test]
fn attributes_over_many_blocks_are_read_by_kernel_and_fsck() {
    let value = |i: usize| (0..60_000 + i).map(|n| (n % 251) as u8).collect::<Vec<_>>();
    let mut layer = Layer::new();
    for i in 0..20 {
        let pax = vec![
            ("SCHILY.xattr.user.a".into(), vec![b'a'; 100 * i]),
            ("SCHILY.xattr.user.big".into(), value(i)),
            (
                format!("SCHILY.xattr.security.{}", "z".repeat(200)),
                vec![b'z'; i],
            ),
        ];
        layer = layer.entry(
            &format!("d{i}"),
            EntryType::Directory,
            &Meta { pax, ..mode(0o755) },
            b"",
            "",
        );
    }
    let image = build(&[layer.finish()]).unwrap();
    if let Some(fsck) = fsck() {
        check(&fsck, &image);
    }
    let Some(mounted) = Mounted::new(&image) else {
        return;
    };
    for i in 0..20 {
        let found = xattrs(&mounted.root().join(format!("d{i}")));
        assert_eq!(found.len(), 3);
        assert!(found[&b"user.big"[..]] == value(i) && found[&b"user.a"[..]].len() == 100 * i);
        assert_eq!(
            found[format!("security.{}", "z".repeat(200)).as_bytes()],
            vec![b'z'; i]
        );
    }
}

#[test]
fn the_kernel_finds_every_name_in_a_large_directory() {
    let mut layer = Layer::new();
    for i in 0..20_000 {
        layer = layer.file(&format!("d/{}{}", i * 7919 % 20_000, "x".repeat(i % 50)), "");
    }
    let Some(mounted) = Mounted::new(&build(&[layer.finish()]).unwrap()) else {
        return;
    };
    for i in 0..20_000 {
        let name = format!("d/{}{}", i * 7919 % 20_000, "x".repeat(i % 50));
        assert!(mounted.root().join(&name).symlink_metadata().is_ok(), "{name}");
    }
    assert!(mounted.root().join("d/absent").symlink_metadata().is_err());
}

/// The files of an installed package, as a layer.
fn package(name: &str) -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let cached = fs::read_dir("/var/cache/apt/archives")
        .ok()?
        .filter_map(Result::ok)
        .map(|e| e.path());
    let is_it = |path: &std::path::PathBuf| {
        let file = path.file_name().and_then(|f| f.to_str()).unwrap_or_default();
        file.starts_with(&format!("{name}_")) && file.ends_with(".deb")
    };
    let deb = cached.into_iter().find(is_it).or_else(|| {
        let mut download = Command::new("apt-get");
        download
            .args(["-q", "download", name])
            .current_dir(directory.path());
        download
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .ok()?;
        fs::read_dir(directory.path())
            .ok()?
            .filter_map(Result::ok)
            .map(|e| e.path())
            .find(is_it)
    });
    let Some(deb) = deb else {
        eprintln!("skipped: no package {name} in apt's cache, and it cannot be downloaded");
        return None;
    };
    let output = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .output()
        .ok()?;
    output.status.success().then_some(output.stdout)
}

#[test]
fn packages_of_a_distribution_become_an_image_that_runs() {
    let (Some(busybox), Some(libc)) = (package("busybox"), package("libc6")) else {
        return;
    };
    let image = build(&[libc.clone(), busybox.clone()]).unwrap();
    if let Some(fsck) = fsck() {
        check(&fsck, &image);
    }
    let Some(mounted) = Mounted::new(&image) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let extracted = directory.path().join("root");
    fs::create_dir(&extracted).unwrap();
    untar(&libc, &extracted);
    untar(&busybox, &extracted);
    assert_same(&walk(&extracted), &walk(&mounted.root()));
    let output = Command::new("chroot")
        .arg(mounted.root())
        .args(["/bin/busybox", "echo", "hello"])
        .output();
    assert_eq!(output.unwrap().stdout, b"hello\n");
}

#[test]
fn an_image_with_a_file_over_four_gib_is_sound() {
    // As sparse as a reader can be: the zeros are never in memory, and the file system may keep them out of the disk.
    let size: u64 = (4 << 30) + 5000;
    let room = rustix::fs::statvfs("/tmp")
        .map(|s| s.f_bavail * s.f_frsize)
        .unwrap_or(0);
    if std::env::var_os("CAISSON_TEST_LARGE").is_none() || room < 3 * size {
        eprintln!("skipped: set CAISSON_TEST_LARGE and have 13 GB free in /tmp");
        return;
    }
    let head = Layer::new()
        .raw("large", EntryType::Regular, &mode(0o644), b"", "", |header| {
            header.set_size(size)
        })
        .finish();
    let tail = Layer::new().file("after", "x").finish();
    let zeros = std::io::Read::take(std::io::repeat(0xee), size.next_multiple_of(512));
    let layer = std::io::Read::chain(std::io::Read::chain(&head[..512], zeros), &tail[..]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.erofs");
    let mut builder = ImageBuilder::new(caisson_erofs::Limits::default());
    builder.layer(layer).unwrap();
    let mut image = fs::File::create(&path).unwrap();
    for mut part in builder.finish().unwrap().0 {
        std::io::copy(&mut part, &mut image).unwrap();
    }
    let target = directory.path().join("root");
    fs::create_dir(&target).unwrap();
    rustix::mount::mount(&path, &target, "erofs", rustix::mount::MountFlags::RDONLY, None).unwrap();
    let file = fs::File::open(target.join("large")).unwrap();
    let mut last = [0; 5000];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut last, size - 5000).unwrap();
    let after = fs::read(target.join("after")).unwrap();
    drop(file);
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!((last, after.as_slice()), ([0xee; 5000], &b"x"[..]));
}
