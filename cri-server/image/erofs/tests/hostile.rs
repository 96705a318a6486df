//! Layers that want something else than to be an image.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod support;

use caisson_erofs::{ArchiveProblem, Composer, EntryProblem, ErofsError, ErrorKind, LimitKind, Limits};
use support::layer::{Layer, Meta, mode, pax_records};
use support::{ImageBuilder, build, build_with};
use tar::EntryType;

fn archive_problem(layer: Vec<u8>) -> ArchiveProblem {
    match build(&[layer]) {
        Err(error @ ErofsError::Archive { problem, .. }) => {
            assert!(error.is_hostile());
            problem
        }
        other => panic!("{:?}", other.map(|image| image.len())),
    }
}

fn entry_problem(layer: Layer) -> EntryProblem {
    match build(&[layer.finish()]) {
        Err(error @ ErofsError::Entry { problem, .. }) => {
            assert!(error.is_hostile());
            problem
        }
        other => panic!("{:?}", other.map(|image| image.len())),
    }
}

fn limit(layers: &[Vec<u8>], limits: Limits) -> LimitKind {
    match build_with(layers, limits) {
        Err(error @ ErofsError::Limit { what, .. }) => {
            assert_eq!(error.kind(), ErrorKind::Limit);
            what
        }
        other => panic!("{:?}", other.map(|image| image.len())),
    }
}

#[test]
fn names_that_lead_out_of_the_image_are_refused() {
    for name in ["../x", "a/../../x", "/../x", "..", "a/.."] {
        assert_eq!(
            entry_problem(Layer::new().file(name, "")),
            EntryProblem::ParentComponent,
            "{name}"
        );
    }
    let pax = Meta {
        pax: vec![("path".into(), b"a\0b".to_vec())],
        ..mode(0o644)
    };
    let layer = Layer::new().entry("x", EntryType::Regular, &pax, b"", "");
    assert_eq!(entry_problem(layer), EntryProblem::Nul);
}

#[test]
fn hard_links_out_of_the_image_to_nothing_or_to_directories_are_refused() {
    let layer = || {
        Layer::new()
            .file("f", "x")
            .dir("d", 0o755)
            .symlink("out", "/../../..")
    };
    assert_eq!(
        entry_problem(layer().hardlink("l", "../etc/passwd")),
        EntryProblem::ParentComponent
    );
    assert_eq!(
        entry_problem(layer().hardlink("l", "/etc/passwd")),
        EntryProblem::LinkTargetMissing
    );
    assert_eq!(
        entry_problem(layer().hardlink("l", "out/etc/passwd")),
        EntryProblem::LinkTargetMissing
    );
    assert_eq!(
        entry_problem(layer().hardlink("l", "f/x")),
        EntryProblem::LinkTargetMissing
    );
    assert_eq!(
        entry_problem(layer().hardlink("l", "d")),
        EntryProblem::LinkTargetDirectory
    );
    assert_eq!(
        entry_problem(layer().hardlink("l", "/")),
        EntryProblem::LinkTargetDirectory
    );
    assert_eq!(
        entry_problem(layer().hardlink("l", "")),
        EntryProblem::LinkTargetDirectory
    );
}

#[test]
fn links_above_an_entry_end_at_the_root_of_the_image_or_are_refused() {
    let found = support::files(&[Layer::new()
        .symlink("out", "../../../../tmp")
        .file("out/x", "")
        .finish()]);
    assert!(found.contains_key("tmp/x"));
    let looping = Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", "");
    assert_eq!(entry_problem(looping), EntryProblem::LinkLoop);
    let through_file = Layer::new().file("f", "").symlink("s", "f").file("s/x", "");
    assert_eq!(entry_problem(through_file), EntryProblem::ParentNotDirectory);
    assert_eq!(
        entry_problem(Layer::new().file("f", "").file("f/x", "")),
        EntryProblem::ParentNotDirectory
    );
}

#[test]
fn links_that_multiply_through_links_stop_at_the_fortieth() {
    let mut layer = Layer::new().dir("d", 0o755).symlink("l0", "d");
    for i in 1..30 {
        layer = layer.symlink(&format!("l{i}"), &format!("l{}/../l{}/..", i - 1, i - 1));
    }
    assert_eq!(entry_problem(layer.file("l29/x", "")), EntryProblem::LinkLoop);
}

#[test]
fn whiteouts_that_name_no_sibling_are_refused() {
    for name in [".wh.", ".wh..", ".wh...", "a/.wh..", ".wh.a/b"] {
        assert_eq!(
            entry_problem(Layer::new().file(name, "")),
            EntryProblem::Whiteout,
            "{name}"
        );
    }
}

#[test]
fn what_would_steer_the_guests_overlay_is_refused() {
    assert_eq!(
        entry_problem(Layer::new().device("etc", EntryType::Char, 0, 0)),
        EntryProblem::WhiteoutDevice
    );
}

#[test]
fn the_root_is_a_directory() {
    assert_eq!(entry_problem(Layer::new().file("/", "x")), EntryProblem::Root);
    assert_eq!(entry_problem(Layer::new().symlink("./", "x")), EntryProblem::Root);
}

#[test]
fn symbolic_links_have_a_target_that_can_be_followed() {
    assert_eq!(
        entry_problem(Layer::new().symlink("s", "")),
        EntryProblem::SymlinkTarget
    );
    assert_eq!(
        entry_problem(Layer::new().symlink("s", &"t".repeat(4096))),
        EntryProblem::SymlinkTarget
    );
}

#[test]
fn an_archive_that_is_cut_short_is_refused_wherever_the_cut_is() {
    let layer = Layer::new()
        .file("a", vec![1; 1000])
        .symlink("l", &"t".repeat(200))
        .finish();
    let end = layer.len() - 1024;
    for cut in 1..end {
        // Between two entries an archive may end; the digest over the layer tells that apart.
        if cut == 512 + 1024 {
            continue;
        }
        assert_eq!(
            archive_problem(layer[..cut].to_vec()),
            if cut == end - 512 {
                ArchiveProblem::DanglingExtension
            } else {
                ArchiveProblem::CutShort
            },
            "cut at {cut}"
        );
    }
    build(&[layer[..end].to_vec()]).unwrap();
}

#[test]
fn headers_with_a_wrong_sum_or_number_are_refused() {
    let layer = Layer::new().file("a", "x").finish();
    for at in [0, 100, 124, 156, 257, 500] {
        let mut bad = layer.clone();
        bad[at] ^= 1;
        assert_eq!(archive_problem(bad), ArchiveProblem::Checksum, "byte {at}");
    }
    let with = |change: &dyn Fn(&mut tar::Header)| {
        Layer::new()
            .raw("a", EntryType::Regular, &mode(0o644), b"", "", change)
            .finish()
    };
    let size = |bytes: [u8; 12]| with(&|header| header.as_old_mut().size = bytes);
    assert_eq!(
        archive_problem(size([0xff; 12])),
        ArchiveProblem::OutOfRange("size")
    );
    let huge = [0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(archive_problem(size(huge)), ArchiveProblem::OutOfRange("size"));
    let over = [0x80, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(archive_problem(size(over)), ArchiveProblem::Number("size"));
    assert_eq!(
        archive_problem(size(*b"00000000009\0")),
        ArchiveProblem::Number("size")
    );
    let uid = with(&|header| header.as_old_mut().uid = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(archive_problem(uid), ArchiveProblem::OutOfRange("uid"));
}

#[test]
fn a_size_larger_than_the_archive_or_the_limit_ends_in_an_error() {
    let claims = |size| {
        Layer::new()
            .raw("a", EntryType::Regular, &mode(0o644), b"", "", |header| {
                header.set_size(size)
            })
            .finish()
    };
    assert_eq!(archive_problem(claims(1 << 20)), ArchiveProblem::CutShort);
    assert_eq!(
        limit(&[claims(1 << 59)], Limits::default()),
        LimitKind::ImageBytes
    );
    assert_eq!(
        limit(
            &[claims(1 << 60)],
            Limits {
                max_image_bytes: u64::MAX,
                ..Limits::default()
            }
        ),
        LimitKind::ImageBytes
    );
}

#[test]
fn what_parsers_read_differently_is_refused() {
    let extension = |kind, data: &[u8]| Layer::new().raw("x", kind, &mode(0), data, "", |_| {});
    let path = |name: &[u8]| pax_records(&[("path", name)]);
    let twice = extension(EntryType::XHeader, &path(b"a")).raw(
        "x",
        EntryType::XHeader,
        &mode(0),
        &path(b"b"),
        "",
        |_| {},
    );
    assert_eq!(
        archive_problem(twice.file("f", "").finish()),
        ArchiveProblem::Ambiguous
    );
    let both = extension(EntryType::XHeader, &path(b"a")).raw(
        "x",
        EntryType::GNULongName,
        &mode(0),
        b"b\0",
        "",
        |_| {},
    );
    assert_eq!(
        archive_problem(both.file("f", "").finish()),
        ArchiveProblem::Ambiguous
    );
    let global = extension(EntryType::XGlobalHeader, &pax_records(&[("size", b"0")])).file("f", "x");
    assert_eq!(archive_problem(global.finish()), ArchiveProblem::Ambiguous);
    assert_eq!(
        archive_problem(extension(EntryType::XHeader, &path(b"a")).finish()),
        ArchiveProblem::DanglingExtension
    );
    let mut lone = vec![0; 512];
    lone.extend(Layer::new().file("f", "").finish());
    assert_eq!(archive_problem(lone), ArchiveProblem::LoneZeroBlock);
}

#[test]
fn a_pax_size_counts_and_not_the_one_in_the_header() {
    // The archive within "outer" must stay contents.
    let inner = Layer::new().file("smuggled", "x").finish();
    let size = inner.len().to_string();
    let meta = Meta {
        pax: vec![("size".into(), size.into_bytes())],
        ..mode(0o644)
    };
    let layer = Layer::new().raw("outer", EntryType::Regular, &meta, &inner, "", |header| {
        header.set_size(0)
    });
    let found = support::files(&[layer.finish()]);
    assert_eq!(found["outer"].data, inner);
    assert!(!found.contains_key("smuggled"));
}

#[test]
fn sparse_files_and_unknown_entries_are_refused_by_name() {
    let layer = Layer::new()
        .raw("s", EntryType::GNUSparse, &mode(0o644), b"", "", |_| {})
        .finish();
    assert_eq!(archive_problem(layer), ArchiveProblem::Sparse);
    let meta = Meta {
        pax: vec![("GNU.sparse.major".into(), b"1".to_vec())],
        ..mode(0o644)
    };
    let layer = Layer::new()
        .entry("s", EntryType::Regular, &meta, b"", "")
        .finish();
    assert_eq!(archive_problem(layer), ArchiveProblem::Sparse);
    let layer = Layer::new()
        .raw("s", EntryType::new(b'V'), &mode(0o644), b"", "", |_| {})
        .finish();
    assert_eq!(archive_problem(layer), ArchiveProblem::EntryType(b'V'));
}

#[test]
fn limits_hold_for_contents_entries_names_attributes_and_what_follows_the_archive() {
    let limits = Limits {
        max_image_bytes: 1 << 20,
        max_entries: 20,
        max_path_bytes: 50,
        max_xattr_bytes: 100,
    };
    let half = Layer::new().file("a", vec![1; 600 << 10]).finish();
    assert!(build_with(std::slice::from_ref(&half), limits).is_ok());
    assert_eq!(limit(&[half.clone(), half], limits), LimitKind::ImageBytes);
    let whiteout = Layer::new().file(".wh.a", vec![0; 2 << 20]).finish();
    assert_eq!(limit(&[whiteout], limits), LimitKind::ImageBytes);
    let many = (0..20)
        .fold(Layer::new(), |layer, i| layer.file(&format!("{i}"), ""))
        .finish();
    assert_eq!(limit(&[many], limits), LimitKind::Entries);
    assert_eq!(
        limit(&[Layer::new().dir(&"d/".repeat(24), 0o755).finish()], limits),
        LimitKind::Entries
    );
    assert_eq!(limit(&vec![Vec::new(); 21], limits), LimitKind::Entries);
    assert_eq!(
        limit(&[Layer::new().file(&"n".repeat(51), "").finish()], limits),
        LimitKind::PathBytes
    );
    assert_eq!(
        limit(&[Layer::new().symlink("s", &"n".repeat(51)).finish()], limits),
        LimitKind::PathBytes
    );
    let meta = Meta {
        pax: vec![("SCHILY.xattr.user.a".into(), vec![0; 100])],
        ..mode(0o644)
    };
    let layer = Layer::new()
        .entry("x", EntryType::Regular, &meta, b"", "")
        .finish();
    assert_eq!(limit(&[layer], limits), LimitKind::XattrBytes);
    let mut trailing = Layer::new().file("f", "").finish();
    trailing.resize(66 << 20, 0);
    assert_eq!(limit(&[trailing], limits), LimitKind::TrailingBytes);
}

#[test]
fn metadata_counts_against_the_image_as_well() {
    let layer = (0..40).fold(Layer::new(), |layer, i| {
        layer.symlink(&format!("{i}"), &"t".repeat(4000))
    });
    let limits = Limits {
        max_image_bytes: 100 << 10,
        ..Limits::default()
    };
    assert_eq!(limit(&[layer.finish()], limits), LimitKind::ImageBytes);
}

#[test]
fn after_a_failure_every_further_call_fails() {
    let bad = Layer::new().file("f", "x").dir("f/d", 0o755).finish();
    let (bad, _) =
        caisson_erofs::convert_layer(bad.as_slice(), tempfile::tempfile().unwrap(), &Limits::default())
            .unwrap();
    let mut composer = Composer::new(Limits::default());
    let error = composer.layer(&bad).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Layer);
    assert!(matches!(composer.layer(&bad), Err(ErofsError::AlreadyFailed)));
    assert!(matches!(
        composer.finish(Vec::new()),
        Err(ErofsError::AlreadyFailed)
    ));
}

#[test]
fn deep_nesting_is_bounded_and_overflows_no_stack() {
    let deepest = "d/".repeat(2048);
    let found = support::files(&[Layer::new().dir(&deepest, 0o755).finish()]);
    assert_eq!(found.len(), 2049);
    let whited_out = support::files(&[
        Layer::new().dir(&deepest, 0o755).finish(),
        Layer::new().file(".wh.d", "").finish(),
    ]);
    assert_eq!(whited_out.len(), 1);
    let deeper = Layer::new()
        .dir(&deepest, 0o755)
        .symlink("s", &"d/".repeat(2000))
        .dir("s/x", 0o755);
    let deeper = deeper.dir(&format!("s/{}", "x/".repeat(100)), 0o755);
    assert_eq!(entry_problem(deeper), EntryProblem::TooDeep);
}

#[test]
fn many_opaque_markers_cost_no_more_than_the_entries_they_hide() {
    let mut lower = Layer::new();
    let mut upper = Layer::new();
    for i in 0..20_000 {
        lower = lower.file(&format!("d/{i}"), "");
        upper = upper
            .file(&format!("d/n{i}"), "")
            .file("d/.wh..wh..opq", "")
            .file(".wh.d", "");
    }
    let found = support::files(&[lower.finish(), upper.finish()]);
    assert_eq!(found.len(), 20_002);
}

#[test]
fn a_failing_reader_and_a_failing_host_are_told_from_a_bad_layer() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("connection reset"))
        }
    }
    let mut builder = ImageBuilder::new(Limits::default());
    let error = builder.layer(Broken).unwrap_err();
    assert_eq!((error.kind(), error.is_hostile()), (ErrorKind::Input, false));

    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let layer = Layer::new().file("a", vec![1; 3 << 20]).finish();
    let error = caisson_erofs::convert_layer(layer.as_slice(), full, &Limits::default()).unwrap_err();
    assert_eq!((error.kind(), error.is_hostile()), (ErrorKind::Host, false));

    let error = Composer::new(Limits::default())
        .layer(&tempfile::tempfile().unwrap())
        .unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Host,
        "an empty file is no converted layer"
    );
}
