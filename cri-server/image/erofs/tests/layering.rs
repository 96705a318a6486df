//! Layers on top of each other, as the OCI image layer specification has it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod support;

use caisson_erofs::Limits;
use support::layer::{Layer, Meta, mode, pax_records};
use support::{ImageBuilder, build, build_with, files};
use tar::EntryType;

fn names(files: &support::reader::Files) -> Vec<&str> {
    files
        .keys()
        .map(String::as_str)
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn an_image_without_layers_is_an_empty_root() {
    let files = files(&[]);
    assert_eq!(files.len(), 1);
    assert_eq!(
        (files[""].mode, files[""].uid, files[""].mtime),
        (0o040_755, 0, (0, 0))
    );
}

#[test]
fn a_whiteout_removes_the_lower_file_and_not_its_namesake_of_the_same_layer() {
    let lower = Layer::new()
        .file("a", "lower")
        .file("b", "lower")
        .dir("d", 0o700)
        .file("d/x", "lower");
    let lower = lower.finish();
    let first = Layer::new()
        .file(".wh.a", "")
        .file("a", "upper")
        .file(".wh.b", "")
        .file(".wh.d", "");
    let first = first.file("d/y", "upper").finish();
    let last = Layer::new()
        .file("a", "upper")
        .file("d/y", "upper")
        .file(".wh.b", "")
        .file(".wh.a", "");
    let last = last.file(".wh.d", "").finish();
    for upper in [first, last] {
        let files = files(&[lower.clone(), upper]);
        assert_eq!(names(&files), ["a", "d", "d/y"]);
        assert_eq!(files["a"].data, b"upper");
        // No entry of this layer: what the lower layer said about it is gone with it.
        assert_eq!(files["d"].mode, 0o040_755);
    }
}

#[test]
fn an_opaque_directory_hides_lower_children_wherever_the_marker_stands() {
    let lower = Layer::new()
        .dir("d", 0o711)
        .file("d/old", "")
        .dir("d/sub", 0o700)
        .file("d/sub/old", "");
    let lower = lower.dir("d/gone", 0o755).file("d/gone/x", "").finish();
    let first = Layer::new()
        .dir("d", 0o750)
        .file("d/.wh..wh..opq", "")
        .file("d/new", "")
        .file("d/sub/new", "");
    let last = Layer::new()
        .dir("d", 0o750)
        .file("d/new", "")
        .file("d/sub/new", "")
        .file("d/.wh..wh..opq", "");
    for upper in [first.finish(), last.finish()] {
        let files = files(&[lower.clone(), upper]);
        assert_eq!(names(&files), ["d", "d/new", "d/sub", "d/sub/new"]);
        assert_eq!(files["d"].mode, 0o040_750);
        assert_eq!(files["d/sub"].mode, 0o040_755);
    }
}

#[test]
fn an_opaque_root_empties_the_image_and_nested_markers_change_nothing() {
    let lower = Layer::new().file("a/b/c/d", "").file("x", "").finish();
    let upper = Layer::new()
        .file("a/b/.wh..wh..opq", "")
        .file("a/b/n", "")
        .file("a/.wh..wh..opq", "");
    let upper = upper
        .file(".wh..wh..opq", "")
        .file("a/b/.wh..wh..opq", "")
        .finish();
    assert_eq!(names(&files(&[lower, upper])), ["a", "a/b", "a/b/n"]);
}

#[test]
fn whiteouts_of_what_is_not_there_do_nothing() {
    let layer = Layer::new()
        .file("no/.wh.x", "")
        .file("no/.wh..wh..opq", "")
        .file("f", "")
        .file("f/.wh.x", "");
    assert_eq!(names(&files(&[layer.finish()])), ["f"]);
}

#[test]
fn what_aufs_kept_for_itself_is_left_out() {
    let layer = Layer::new()
        .file(".wh..wh.aufs", "")
        .file(".wh..wh.plnk/1.2", "data")
        .file("f", "x");
    assert_eq!(names(&files(&[layer.finish()])), ["f"]);
}

#[test]
fn parents_that_no_layer_lists_are_plain_and_do_not_touch_those_of_lower_layers() {
    let lower = Layer::new().dir("", 0o700).dir("bin", 0o1711).finish();
    let files = files(&[lower, Layer::new().file("bin/x/y", "").finish()]);
    assert_eq!(files[""].mode, 0o040_700);
    assert_eq!(files["bin"].mode, 0o041_711);
    assert_eq!(
        (files["bin/x"].mode, files["bin/x"].uid, files["bin/x"].mtime),
        (0o040_755, 0, (0, 0))
    );
}

#[test]
fn a_directory_entry_changes_metadata_and_keeps_children() {
    let meta = Meta {
        mode: 0o2750,
        uid: 7,
        gid: 8,
        mtime: 9,
        pax: Vec::new(),
    };
    let lower = Layer::new().dir("d", 0o755).file("d/x", "1").finish();
    let upper = Layer::new()
        .entry("d/", EntryType::Directory, &meta, b"", "")
        .finish();
    let files = files(&[lower, upper]);
    assert_eq!(names(&files), ["d", "d/x"]);
    let d = &files["d"];
    assert_eq!((d.mode, d.uid, d.gid, d.mtime), (0o042_750, 7, 8, (9, 0)));
}

#[test]
fn files_and_directories_replace_each_other_and_the_last_duplicate_wins() {
    let lower = Layer::new()
        .dir("d", 0o755)
        .file("d/x/y", "")
        .file("f", "1")
        .file("f", "22");
    let upper = Layer::new().file("d", "file").dir("f", 0o700).file("f/x", "");
    let files = files(&[lower.finish(), upper.finish()]);
    assert_eq!(names(&files), ["d", "f", "f/x"]);
    assert_eq!(files["d"].data, b"file");
}

#[test]
fn hard_links_share_an_inode_across_layers_and_count() {
    let lower = Layer::new().file("a", "data").hardlink("b", "a").finish();
    let upper = Layer::new().hardlink("sub/c", "/b").hardlink("a", "a").finish();
    let found = files(&[lower.clone(), upper.clone()]);
    assert_eq!(found["a"].nid, found["sub/c"].nid);
    assert_eq!(found["a"].nlink, 3);
    let replaced = Layer::new().file("a", "new").file(".wh.b", "").finish();
    let found = files(&[lower, upper, replaced]);
    assert_eq!((&*found["sub/c"].data, found["sub/c"].nlink), (&b"data"[..], 1));
    assert_eq!((&*found["a"].data, found["a"].nlink), (&b"new"[..], 1));
}

#[test]
fn a_hard_link_may_replace_the_directory_its_target_was_in() {
    let lower = Layer::new().file("d/f", "data").finish();
    let found = files(&[lower, Layer::new().hardlink("d", "d/f").finish()]);
    assert_eq!((&*found["d"].data, found["d"].nlink), (&b"data"[..], 1));
}

#[test]
fn a_hard_link_to_a_symbolic_link_is_the_link_itself() {
    let found = files(&[Layer::new()
        .symlink("s", "../../etc/passwd")
        .hardlink("t", "s")
        .finish()]);
    assert_eq!(found["s"], found["t"]);
    assert_eq!(found["t"].data, b"../../etc/passwd");
}

#[test]
fn names_go_through_symbolic_links_of_the_image_and_stay_inside() {
    let lower = Layer::new()
        .dir("usr/lib", 0o755)
        .symlink("lib", "usr/lib")
        .symlink("up", "../../../../usr");
    let lower = lower
        .symlink("abs", "/usr/lib")
        .symlink("chain", "up/../lib/.")
        .symlink("new", "opt/made")
        .finish();
    let upper = Layer::new()
        .file("lib/a", "")
        .file("up/lib/b", "")
        .file("abs/c", "")
        .file("chain/d", "");
    let upper = upper.file("new/e", "").hardlink("f", "lib/a").finish();
    let found = files(&[lower, upper]);
    for name in [
        "usr/lib/a",
        "usr/lib/b",
        "usr/lib/c",
        "usr/lib/d",
        "opt/made/e",
        "f",
        "lib",
    ] {
        assert!(found.contains_key(name), "{name} in {:?}", names(&found));
    }
    assert_eq!(found["lib"].data, b"usr/lib");
}

#[test]
fn an_entry_replaces_a_symbolic_link_of_its_own_name() {
    let lower = Layer::new().symlink("a", "/etc").symlink("b", "/etc").finish();
    let found = files(&[lower, Layer::new().dir("a", 0o755).file("b", "x").finish()]);
    assert_eq!(names(&found), ["a", "b"]);
    assert_eq!((found["a"].mode, found["b"].mode), (0o040_755, 0o100_644));
}

#[test]
fn all_kinds_of_files_keep_their_metadata() {
    let long = "n".repeat(200);
    let pax = vec![
        ("mtime".to_owned(), b"-1.25".to_vec()),
        ("uid".to_owned(), b"4000000000".to_vec()),
        (
            "SCHILY.xattr.security.capability".to_owned(),
            b"\x01\0\0\x02\0\x04\0\0".to_vec(),
        ),
        ("SCHILY.xattr.user.a".to_owned(), b"=x\n=".to_vec()),
        ("SCHILY.xattr.trusted.overlay.opaque".to_owned(), b"y".to_vec()),
        ("SCHILY.xattr.user.overlay.redirect".to_owned(), b"/etc".to_vec()),
        ("SCHILY.xattr.com.apple.x".to_owned(), b"y".to_vec()),
    ];
    let meta = Meta {
        mode: 0o4755,
        uid: 0,
        gid: 70_000,
        mtime: 5,
        pax,
    };
    let layer = Layer::new()
        .entry("suid", EntryType::Regular, &meta, b"#!", "")
        .device("null", EntryType::Char, 1, 3)
        .device("disk", EntryType::Block, 259, 70_000)
        .entry("pipe", EntryType::Fifo, &mode(0o622), b"", "")
        .symlink("long", &"t".repeat(4095))
        .file(&format!("{long}/{long}/{long}"), "deep")
        .file("empty", "")
        .file("zero", [0; 4096])
        .finish();
    let found = files(&[layer]);
    let suid = &found["suid"];
    assert_eq!(
        (suid.mode, suid.uid, suid.gid),
        (0o104_755, 4_000_000_000, 70_000)
    );
    assert_eq!(suid.mtime, (-2, 750_000_000));
    assert_eq!(
        suid.xattrs.keys().collect::<Vec<_>>(),
        ["security.capability", "user.a"]
    );
    assert_eq!(suid.xattrs["user.a"], b"=x\n=");
    assert_eq!((found["null"].mode, found["null"].rdev), (0o020_600, 0x103));
    assert_eq!(
        (found["disk"].mode, found["disk"].rdev),
        (0o060_600, 0x1111_0370 & 0xff | 259 << 8 | (70_000 & !0xff) << 12)
    );
    assert_eq!(found["pipe"].mode, 0o010_622);
    assert_eq!(found["long"].data.len(), 4095);
    assert_eq!(found[&format!("{long}/{long}/{long}")].data, b"deep");
    assert_eq!((found["empty"].data.len(), found["zero"].data.len()), (0, 4096));
}

#[test]
fn equal_layers_give_equal_images_however_they_are_read() {
    struct Dribble<'a>(&'a [u8]);
    impl std::io::Read for Dribble<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let n = buf.len().min(self.0.len()).min(77);
            buf[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }
    let layers = [
        Layer::new().file("a", vec![7; 10_000]).file("b/c", "x").finish(),
        Layer::new()
            .file("a", "smaller")
            .file("z", vec![1; 5000])
            .finish(),
    ];
    let mut builder = ImageBuilder::new(Limits::default());
    for layer in &layers {
        builder.layer(Dribble(layer)).unwrap();
    }
    let mut dribbled = Vec::new();
    for mut part in builder.finish().unwrap().0 {
        std::io::Read::read_to_end(&mut part, &mut dribbled).unwrap();
    }
    assert_eq!(build(&layers).unwrap(), dribbled);
}

#[test]
fn the_reader_is_drained_behind_the_end_of_the_archive() {
    let mut layer = Layer::new().file("f", "x").finish();
    layer.resize(300_000, 0);
    layer.extend(Layer::new().file("hidden", "x").finish());
    let mut reader = layer.as_slice();
    let mut builder = ImageBuilder::new(Limits::default());
    let summary = builder.layer(&mut reader).unwrap();
    assert_eq!((summary.entries, summary.data_bytes, reader.len()), (1, 1, 0));
    assert_eq!(builder.finish().unwrap().1.inodes, 2);
}

#[test]
fn a_layer_is_the_same_bytes_in_every_image_and_one_without_contents_is_no_part_of_a_disk() {
    let shared = Layer::new().file("etc/a", vec![7; 5000]).file("b", "x").finish();
    let other = Layer::new().dir("etc", 0o700).file("c", "other").finish();
    let nothing = Layer::new().file(".wh.b", "").symlink("s", "c").finish();
    let parts = |layers: &[&Vec<u8>]| {
        let mut builder = ImageBuilder::new(Limits::default());
        for layer in layers {
            builder.layer(layer.as_slice()).unwrap();
        }
        let (parts, _) = builder.finish().unwrap();
        parts
            .into_iter()
            .map(|mut part| {
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut part, &mut bytes).unwrap();
                bytes
            })
            .collect::<Vec<_>>()
    };
    let (first, second) = (
        parts(&[&shared, &nothing, &other]),
        parts(&[&other, &shared, &nothing]),
    );
    assert_eq!((first.len(), second.len()), (3, 3));
    assert_eq!((&first[1], &first[2]), (&second[2], &second[1]));
    assert_ne!(first[0], second[0], "the metadata differs");
    let found = support::reader::read(&first.concat());
    assert_eq!(names(&found), ["c", "etc", "etc/a", "s"]);
    assert_eq!(found["etc/a"].data, vec![7; 5000]);
    let found = support::reader::read(&second.concat());
    assert_eq!(found["etc/a"].data, vec![7; 5000]);
    assert_eq!(found["c"].data, b"other");
}

#[test]
fn global_headers_are_passed_over_like_docker_does() {
    let records = pax_records(&[("comment", b"0123456789")]);
    let layer = Layer::new()
        .raw("g", EntryType::XGlobalHeader, &mode(0), &records, "", |_| {})
        .file("f", "x");
    assert_eq!(names(&files(&[layer.finish()])), ["f"]);
}

#[test]
fn gnu_long_names_and_old_headers_are_read() {
    let long = format!("{}/{}", "a".repeat(120), "b".repeat(120));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o600);
    builder.append_data(&mut header, &long, &b"x"[..]).unwrap();
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    link.set_mode(0o777);
    builder.append_link(&mut link, "link", "t".repeat(300)).unwrap();
    let mut old = tar::Header::new_old();
    old.as_old_mut().name[..4].copy_from_slice(b"dir/");
    old.as_old_mut().linkflag[0] = 0;
    old.set_mode(0o700);
    old.set_uid(0);
    old.set_gid(0);
    old.set_size(0);
    old.set_mtime(0);
    old.set_cksum();
    builder.append(&old, &b""[..]).unwrap();
    let found = files(&[builder.into_inner().unwrap()]);
    assert_eq!(found[&long].data, b"x");
    assert_eq!(found["link"].data.len(), 300);
    assert_eq!(found["dir"].mode, 0o040_700);
}

#[test]
fn a_directory_of_a_hundred_thousand_entries_is_searchable() {
    let mut layer = Layer::new();
    for i in 0..100_000 {
        layer = layer.file(&format!("d/{:05}-{}", i * 7919 % 100_000, "x".repeat(i % 40)), "");
    }
    let limits = Limits {
        max_entries: 200_000,
        ..Limits::default()
    };
    let image = build_with(&[layer.finish()], limits).unwrap();
    assert_eq!(support::reader::read(&image).len(), 100_002);
}
