//! Random layers against a naive model of the image layer specification, and random bytes against nothing but the wish to survive.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use caisson_erofs::{Limits, ModeBits, convert_layer, restore_layer};
use proptest::prelude::*;
use support::layer::{Layer, Meta};
use support::oracle::{check, fsck};
use support::{ImageBuilder, build, build_with, reader};
use tar::EntryType;

/// An entry of a random layer.
#[derive(Debug, Clone)]
enum Op {
    File(String, Meta, Vec<u8>),
    Dir(String, Meta),
    Symlink(String, Meta, String),
    Fifo(String, Meta),
    Whiteout(String),
    Opaque(String),
}

/// A file of the model: type bits and permissions, owner, times, contents, attributes.
type Plain = (u16, u32, u32, (i64, u32), Vec<u8>, BTreeMap<String, Vec<u8>>);

fn name() -> impl Strategy<Value = String> {
    prop_oneof![8 => "[abc]", 1 => "[!~.][a-z]{1,3}", 1 => "[a-z]{90,120}"]
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(name(), 1..4).prop_map(|names| names.join("/"))
}

fn meta() -> impl Strategy<Value = Meta> {
    let xattrs = prop::collection::vec(
        ("user\\.[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..600)),
        0..4,
    );
    (
        0_u32..0o10000,
        any::<u16>(),
        0_u32..u32::MAX,
        any::<i32>(),
        0_u32..1_000_000_000,
        xattrs,
    )
        .prop_map(|(mode, uid, gid, seconds, nanoseconds, xattrs)| {
            let sign = if seconds < 0 { "-" } else { "" };
            let mtime = format!("{sign}{}.{nanoseconds:09}", seconds.unsigned_abs());
            let mut pax = vec![
                ("mtime".to_owned(), mtime.into_bytes()),
                ("gid".into(), gid.to_string().into_bytes()),
            ];
            pax.extend(
                xattrs
                    .into_iter()
                    .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value)),
            );
            Meta {
                mode,
                uid: uid.into(),
                gid: 0,
                mtime: 0,
                pax,
            }
        })
}

fn op() -> impl Strategy<Value = Op> {
    let data = prop_oneof![Just(0), 0_usize..100, 4090_usize..4100, 0_usize..20_000]
        .prop_flat_map(|length| any::<u8>().prop_map(move |byte| vec![byte; length]));
    prop_oneof![
        4 => (path(), meta(), data).prop_map(|(path, meta, data)| Op::File(path, meta, data)),
        4 => (path(), meta()).prop_map(|(path, meta)| Op::Dir(path, meta)),
        1 => (path(), meta(), "[a-z/.]{1,300}").prop_map(|(path, meta, to)| Op::Symlink(path, meta, to)),
        1 => (path(), meta()).prop_map(|(path, meta)| Op::Fifo(path, meta)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
    ]
}

fn layer(ops: &[Op]) -> Vec<u8> {
    let none = Meta::default();
    let beside = |path: &str, name: &str| match path.rsplit_once('/') {
        Some((parent, _)) => format!("{parent}/{name}"),
        None => name.to_owned(),
    };
    let written = ops.iter().fold(Layer::new(), |layer, op| match op {
        Op::File(path, meta, data) => layer.entry(path, EntryType::Regular, meta, data, ""),
        Op::Dir(path, meta) => layer.entry(&format!("{path}/"), EntryType::Directory, meta, b"", ""),
        Op::Symlink(path, meta, to) => layer.entry(path, EntryType::Symlink, meta, b"", to),
        Op::Fifo(path, meta) => layer.entry(path, EntryType::Fifo, meta, b"", ""),
        Op::Whiteout(path) => {
            let name = path.rsplit('/').next().unwrap_or(path);
            layer.entry(
                &beside(path, &format!(".wh.{name}")),
                EntryType::Regular,
                &none,
                b"",
                "",
            )
        }
        Op::Opaque(path) => layer.entry(
            &format!("{path}/.wh..wh..opq"),
            EntryType::Regular,
            &none,
            b"",
            "",
        ),
    });
    written.finish()
}

fn plain(kind: u16, meta: &Meta, data: &[u8]) -> Plain {
    let value = |key: &str| {
        let found = meta.pax.iter().rev().find(|(k, _)| k == key).unwrap();
        String::from_utf8(found.1.clone()).unwrap()
    };
    // The model's own arithmetic: all in nanoseconds.
    let time: i128 = value("mtime").replace('.', "").parse().unwrap();
    let mtime = (
        time.div_euclid(1_000_000_000) as i64,
        time.rem_euclid(1_000_000_000) as u32,
    );
    let xattrs = meta
        .pax
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix("SCHILY.xattr.")?.to_owned(), value.clone())));
    let gid = value("gid").parse().unwrap();
    (
        kind | meta.mode as u16,
        meta.uid as u32,
        gid,
        mtime,
        data.to_vec(),
        xattrs.collect(),
    )
}

fn implicit() -> Plain {
    (0o040_755, 0, 0, (0, 0), Vec::new(), BTreeMap::new())
}

fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory)
        .is_some_and(|rest| rest.starts_with('/'))
}

/// The naive way: a map of whole paths, first all whiteouts of a layer, then everything else in its order. `None` if a layer puts
/// something below a file, which is refused; such a layer is left out from both.
fn model(lower: &BTreeMap<String, Plain>, ops: &[Op]) -> Option<BTreeMap<String, Plain>> {
    let mut files = lower.clone();
    for op in ops {
        match op {
            Op::Whiteout(path) => files.retain(|file, _| file != path && !is_below(file, path)),
            Op::Opaque(path) => files.retain(|file, _| !is_below(file, path)),
            _ => {}
        }
    }
    for op in ops {
        let (path, file) = match op {
            Op::File(path, meta, data) => (path, plain(0o100_000, meta, data)),
            Op::Dir(path, meta) => (path, plain(0o040_000, meta, b"")),
            Op::Symlink(path, meta, to) => (path, plain(0o120_000, meta, to.as_bytes())),
            Op::Fifo(path, meta) => (path, plain(0o010_000, meta, b"")),
            Op::Whiteout(_) | Op::Opaque(_) => continue,
        };
        for (at, _) in path.match_indices('/') {
            let parent = files.entry(path[..at].to_owned()).or_insert_with(implicit);
            if parent.0 & 0o170_000 != 0o040_000 {
                return None;
            }
        }
        if file.0 & 0o170_000 != 0o040_000 {
            files.retain(|other, _| !is_below(other, path));
        }
        files.insert(path.clone(), file);
    }
    Some(files)
}

/// Ops whose result does not depend on the order in the archive: lower parts that are files or links when a path is walked, and
/// whited out only later, make a difference that the specification leaves open. Whiteouts first is what every builder writes.
fn whiteouts_first(ops: &[Op]) -> Vec<Op> {
    let is_whiteout = |op: &&Op| matches!(op, Op::Whiteout(_) | Op::Opaque(_));
    ops.iter()
        .filter(is_whiteout)
        .chain(ops.iter().filter(|op| !is_whiteout(op)))
        .cloned()
        .collect()
}

fn directories_only(ops: &[Op]) -> Vec<Op> {
    ops.iter()
        .filter(|op| matches!(op, Op::Dir(..) | Op::Whiteout(_) | Op::Opaque(_)))
        .cloned()
        .collect()
}

fn image_of(layers: &[Vec<u8>]) -> BTreeMap<String, Plain> {
    let found = reader::read(&build(layers).unwrap());
    let plain = |(path, f): (String, reader::Found)| {
        let data = if f.mode & 0o170_000 == 0o040_000 {
            Vec::new()
        } else {
            f.data
        };
        (path, (f.mode, f.uid, f.gid, f.mtime, data, f.xattrs))
    };
    found
        .into_iter()
        .filter(|(path, _)| !path.is_empty())
        .map(plain)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_compose_as_in_the_naive_model(layers in prop::collection::vec(prop::collection::vec(op(), 0..20), 1..5)) {
        let mut expected = BTreeMap::new();
        let mut accepted = Vec::new();
        for ops in &layers {
            let ops = whiteouts_first(ops);
            // Through symbolic links a path means something else; those have tests of their own.
            if let Some(next) = model(&expected, &ops) {
                expected = next;
                accepted.push(layer(&ops));
            }
        }
        prop_assert_eq!(image_of(&accepted), expected);
    }

    #[test]
    fn whiteouts_of_directories_do_not_depend_on_the_order(
        layers in prop::collection::vec(prop::collection::vec(op(), 0..25), 1..4),
    ) {
        let mut expected = BTreeMap::new();
        let mut written = Vec::new();
        for ops in &layers {
            let ops = directories_only(ops);
            expected = model(&expected, &ops).unwrap();
            written.push(layer(&ops));
        }
        prop_assert_eq!(image_of(&written), expected);
    }

    #[test]
    fn an_archive_that_is_made_again_converts_to_the_same_layer(
        ops in prop::collection::vec(op(), 0..30),
        modes in prop_oneof![Just(ModeBits::Permissions), Just(ModeBits::FileType)],
    ) {
        let limits = Limits::default();
        let (mut file, summary) = convert_layer(layer(&ops).as_slice(), tempfile::tempfile().unwrap(), &limits).unwrap();
        let mut converted = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut converted).unwrap();
        let (archive, restored) = restore_layer(&[file], Vec::new(), modes, &limits).unwrap();
        prop_assert_eq!((restored.bytes, restored.entries), (archive.len() as u64, summary.entries));
        let (again, _) = convert_layer(archive.as_slice(), Vec::new(), &limits).unwrap();
        prop_assert!(again == converted);
    }

    #[test]
    fn mutated_archives_give_an_image_or_an_error(
        ops in prop::collection::vec(op(), 0..10),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..10),
        fix in any::<bool>(),
    ) {
        let mut bytes = layer(&ops);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
            let block = at / 512 * 512;
            if fix && bytes.len() >= block + 512 {
                fix_checksum(&mut bytes[block..block + 512]);
            }
        }
        let limits = Limits { max_image_bytes: 8 << 20, ..Limits::default() };
        match build_with(&[bytes], limits) {
            Ok(image) => { reader::read(&image); }
            Err(error) => prop_assert!(error.is_hostile(), "{}", error),
        }
    }

    #[test]
    fn random_bytes_give_an_image_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let mut builder = ImageBuilder::new(Limits::default());
        if let Err(error) = builder.layer(bytes.as_slice()) {
            prop_assert!(error.is_hostile());
        }
    }

    #[test]
    fn random_headers_with_a_right_checksum_give_an_image_or_an_error(
        blocks in prop::collection::vec((prop::collection::vec(any::<u8>(), 512), "[0-7xgLKS]", 0_u16..2000), 1..8),
    ) {
        let mut bytes = Vec::new();
        for (mut block, kind, size) in blocks {
            block[156] = kind.as_bytes()[0];
            for (field, length) in [(100, 8), (108, 8), (116, 8), (136, 12)] {
                block[field..field + length].fill(b' ');
            }
            block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
            block[257..265].copy_from_slice(b"ustar\x0000");
            fix_checksum(&mut block);
            bytes.extend(block);
        }
        let limits = Limits { max_image_bytes: 8 << 20, ..Limits::default() };
        match build_with(&[bytes], limits) {
            Ok(image) => { reader::read(&image); }
            Err(error) => prop_assert!(error.is_hostile()),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fsck_finds_no_fault_with_random_images(layers in prop::collection::vec(prop::collection::vec(op(), 0..60), 1..3)) {
        if let Some(fsck) = fsck() {
            let mut builder = ImageBuilder::new(Limits::default());
            if layers.iter().all(|ops| builder.layer(layer(ops).as_slice()).is_ok()) {
                let written: Vec<_> = layers.iter().map(|ops| layer(ops)).collect();
                check(&fsck, &build(&written).unwrap());
            }
        }
    }
}

fn fix_checksum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
