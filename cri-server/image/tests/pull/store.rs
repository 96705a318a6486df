//! What is kept, found, removed and collected.

use std::{os::unix::fs::MetadataExt, path::PathBuf, process::Command};

use caisson_image::{Credentials, ErrorKind, ImageStore};

use crate::{
    fake::Fake,
    fixture::{Packing, TestImage, TestStore, archive, content},
};

async fn serving(image: &TestImage) -> Fake {
    let image = image.clone();
    Fake::start(move |request| image.serve(request)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_survive_a_restart_whole() {
    let image = TestImage::small("kept");
    let fake = serving(&image).await;
    let test = TestStore::new().await;
    let pulled = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    std::fs::write(test.config.root.join("tmp/half"), b"converted").unwrap();
    let test = test.reopen().await;
    let mut listed = test.store.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    let mut kept = listed.remove(0);
    assert!(
        kept.pulled_at
            .duration_since(pulled.pulled_at)
            .unwrap_or_default()
            .is_zero()
    );
    kept.pulled_at = pulled.pulled_at;
    assert_eq!(kept, pulled);
    assert!(test.names("tmp").is_empty(), "what was half done is swept");

    let requests = fake.count("/blobs/");
    test.store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(fake.count("/blobs/"), requests, "nothing is fetched again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_which_a_file_is_gone_or_cut_is_forgotten_and_a_pull_repairs_it() {
    let image = TestImage::small("lost");
    let fake = serving(&image).await;
    let mut test = TestStore::new().await;
    let reference = fake.reference("app:v1");
    let cut = |file: &PathBuf| {
        let file = std::fs::File::options().write(true).open(file).unwrap();
        file.set_len(100).unwrap();
    };
    let remove = |file: &PathBuf| std::fs::remove_file(file).unwrap();
    let damages: [&dyn Fn(&PathBuf); 2] = [&remove, &cut];
    for damage in damages {
        for part in [0, 1] {
            let pulled = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
            assert_eq!(pulled.disk.len(), 2);
            let whole = content(&pulled.disk);
            // Seen when it is asked for...
            damage(&pulled.disk[part]);
            assert_eq!(test.store.get(&reference).await.unwrap(), None);
            let again = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
            assert_eq!(content(&again.disk), whole);
            // ... when it is pulled again...
            damage(&again.disk[part]);
            let again = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
            assert_eq!(content(&again.disk), whole);
            // ... and when the store is opened.
            damage(&again.disk[part]);
            test = test.reopen().await;
            assert_eq!(test.store.list().await.unwrap(), []);
            test.store.collect(&[]).await.unwrap();
            test.assert_empty().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_shared_by_images_and_go_with_the_last_of_them() {
    let base = (archive(&[("base", b"of both")]), Packing::Gzip);
    let nothing = (archive(&[(".wh.base", b"")]), Packing::Plain);
    let (one, two) = (
        TestImage::new("one", &[base.clone(), (archive(&[("one", b"1")]), Packing::Zstd)]),
        TestImage::new(
            "two",
            &[base, (archive(&[("two", b"2")]), Packing::Plain), nothing],
        ),
    );
    let (first, second) = (serving(&one).await, serving(&two).await);
    let test = TestStore::new().await;
    let one_pulled = test
        .store
        .pull(&first.reference("one"), Credentials::Anonymous)
        .await
        .unwrap();
    let two_pulled = test
        .store
        .pull(&second.reference("two"), Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(one_pulled.disk[1], two_pulled.disk[1], "one file");
    assert_eq!(
        (one_pulled.disk.len(), two_pulled.disk.len()),
        (3, 3),
        "a layer without contents is no part of a disk"
    );
    assert_eq!(second.count(&two.layers[0]), 0, "it was here");
    assert_eq!(test.names("layers").len(), 2 * 4);
    let shared = content(&one_pulled.disk[1..2]);

    let test = test.reopen().await;
    test.store.remove(&one.id, &[]).await.unwrap();
    assert!(!one_pulled.disk[2].exists());
    assert_eq!(content(&two_pulled.disk[1..2]), shared);
    // In use, not listed any more.
    let in_use = [two.id.clone()];
    test.store.remove(&two.id, &in_use).await.unwrap();
    assert!(two_pulled.disk.iter().all(|file| file.is_file()));
    test.store.collect(&[]).await.unwrap();
    test.assert_empty().await;

    let again = test
        .store
        .pull(&first.reference("one"), Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(
        content(&again.disk[1..2]),
        shared,
        "equal layers give equal bytes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_image_with_one_bad_layer_no_layer_stays_unless_another_image_has_it() {
    let good = (archive(&[("good", b"1")]), Packing::Gzip);
    let shared = (archive(&[("shared", b"2")]), Packing::Gzip);
    let bad = (archive(&[("../bad", b"3")]), Packing::Gzip);
    let sound = TestImage::new("sound", std::slice::from_ref(&shared));
    let spoiled = TestImage::new("spoiled", &[shared, good, bad]);
    let (first, second) = (serving(&sound).await, serving(&spoiled).await);
    let test = TestStore::new().await;
    let kept = test
        .store
        .pull(&first.reference("app"), Credentials::Anonymous)
        .await
        .unwrap();
    let error = test
        .store
        .pull(&second.reference("app"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{}", error.chain());
    assert_eq!(test.names("layers").len(), 2, "{:?}", test.names("layers"));
    assert!(kept.disk.iter().all(|file| file.is_file()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_examination_finds_a_changed_byte_and_a_pull_repairs_it() {
    use std::os::unix::fs::FileExt;
    let image = TestImage::small("changed");
    let fake = serving(&image).await;
    let test = TestStore::new().await;
    let reference = fake.reference("app:v1");
    let pulled = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
    let whole = content(&pulled.disk);
    let sound = caisson_image::examine(&test.config.root, false).unwrap();
    assert_eq!((sound.files, sound.bytes), (2, whole.len() as u64));
    assert_eq!(sound.damages, []);
    for (part, offset) in [(0, 2000), (1, 3)] {
        let file = std::fs::File::options()
            .write(true)
            .open(&pulled.disk[part])
            .unwrap();
        file.write_all_at(b"\xa5", offset).unwrap();
        let found = caisson_image::examine(&test.config.root, true).unwrap();
        let [damage] = found.damages.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(damage.file, pulled.disk[part]);
        assert!(damage.reason.contains("fs-verity digest"), "{}", damage.reason);
        // The daemon that has the store open notices.
        assert_eq!(test.store.get(&reference).await.unwrap(), None);
        let again = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
        assert_eq!(content(&again.disk), whole);
        assert_eq!(
            caisson_image::examine(&test.config.root, false).unwrap().damages,
            []
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_older_versions_left_is_swept() {
    let test = TestStore::new().await;
    let name = format!("images/{}.erofs", "a".repeat(64));
    std::fs::write(test.config.root.join(name), b"whole image").unwrap();
    let halves = [
        format!("images/{}.metadata", "b".repeat(64)),
        format!("layers/{}.layer", "c".repeat(64)),
        format!("layers/{}.json", "d".repeat(64)),
    ];
    for half in halves {
        std::fs::write(test.config.root.join(half), b"half").unwrap();
    }
    test.reopen().await.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_kept_out() {
    let test = TestStore::new().await;
    let error = ImageStore::open(test.config.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(
        error.chain().contains("another process has it open"),
        "{}",
        error.chain()
    );
    assert!(error.chain().contains("index.redb"), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_found_by_every_name_it_has() {
    let image = TestImage::small("found");
    let fake = serving(&image).await;
    let test = TestStore::new().await;
    test.store
        .pull(&fake.reference("app"), Credentials::Anonymous)
        .await
        .unwrap();
    let hex = image.id.strip_prefix("sha256:").unwrap();
    let digest = fake.reference(&format!("app@{}", image.digest()));
    let with_tag = fake.reference(&format!("app:any@{}", image.digest()));
    for name in [
        &image.id,
        hex,
        &hex[..12],
        &image.id[..19],
        &fake.reference("app"),
        &fake.reference("app:latest"),
        &digest,
        &with_tag,
    ] {
        let found = test.store.get(name).await.unwrap();
        assert_eq!(found.map(|found| found.id), Some(image.id.clone()), "{name}");
    }
    let unknown_id = format!("sha256:{}", "0".repeat(64));
    for name in ["busybox", &fake.reference("app:v2"), &unknown_id, "0000"] {
        assert_eq!(test.store.get(name).await.unwrap(), None, "{name}");
    }
    for malformed in ["", "Not A Name", "a//b"] {
        assert_eq!(
            test.store.get(malformed).await.unwrap_err().kind(),
            ErrorKind::Invalid,
            "{malformed}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_by_any_name_removes_the_image() {
    let image = TestImage::small("removed");
    let fake = serving(&image).await;
    let test = TestStore::new().await;
    let names = [
        image.id.clone(),
        fake.reference("app:v1"),
        fake.reference("app:v2"),
        fake.reference(&format!("app@{}", image.digest())),
    ];
    for name in names {
        for tag in ["app:v1", "app:v2"] {
            test.store
                .pull(&fake.reference(tag), Credentials::Anonymous)
                .await
                .unwrap();
        }
        test.store.remove(&name, &[]).await.unwrap();
        test.assert_empty().await;
        test.store.remove(&name, &[]).await.unwrap();
    }
    test.reopen().await.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_of_an_image_in_use_stays_until_it_is_collected() {
    let image = TestImage::small("used");
    let fake = serving(&image).await;
    let test = TestStore::new().await;
    let reference = fake.reference("app:v1");
    let in_use = [image.id.clone()];
    let disk = test
        .store
        .pull(&reference, Credentials::Anonymous)
        .await
        .unwrap()
        .disk;
    test.store.remove(&reference, &in_use).await.unwrap();
    assert_eq!(test.store.get(&reference).await.unwrap(), None);
    let test = test.reopen().await;
    test.store.collect(&in_use).await.unwrap();
    assert!(disk.iter().all(|file| file.is_file()));

    let layers = fake.count(&image.layers[0]);
    let again = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
    assert_eq!((again.disk, again.repo_tags.len()), (disk.clone(), 1));
    assert_eq!(fake.count(&image.layers[0]), layers, "its content was still here");
    test.store.remove(&reference, &in_use).await.unwrap();

    let stranger = test.config.root.join("images/readme");
    std::fs::write(&stranger, b"not ours").unwrap();
    test.store.collect(&[]).await.unwrap();
    assert!(!disk.iter().any(|file| file.exists()));
    assert!(stranger.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_counts_blocks_and_inodes() {
    let test = TestStore::new().await;
    let before = test.store.usage().await.unwrap();
    let content: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    let image = TestImage::new("big", &[(archive(&[("file", &content)]), Packing::Zstd)]);
    let fake = serving(&image).await;
    let pulled = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    let after = test.store.usage().await.unwrap();
    assert_eq!(
        after.inodes_used,
        before.inodes_used + 4,
        "two files, and what is known of them"
    );
    let file = std::fs::metadata(&pulled.disk[1]).unwrap();
    assert!(file.len() >= 1 << 20);
    assert!(pulled.size_bytes >= file.len());
    assert!(after.used_bytes >= before.used_bytes + file.blocks() * 512);
}

/// A file system of its own, unmounted when dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(at: &std::path::Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", size, "tmpfs"])
            .arg(at)
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            eprintln!("skipped: mounting a tmpfs is not allowed here");
            return None;
        }
        Some(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_reported_and_the_store_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("small");
    let Some(_mounted) = Mounted::new(&root, "size=12m") else {
        return;
    };
    let test = TestStore::with(|config| config.root = root.clone()).await;
    assert!(test.path() != root);
    let content: Vec<u8> = (0..5u32 << 20)
        .flat_map(|number| number.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    let big = TestImage::new("big", &[(archive(&[("file", &content)]), Packing::Plain)]);
    let fake = serving(&big).await;
    let error = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{}", error.chain());
    assert!(error.chain().contains("small"), "{}", error.chain());
    test.assert_empty().await;

    let small = TestImage::small("fits");
    let fake = serving(&small).await;
    test.store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();

    // Not a byte left: the index cannot grow either, and works again afterwards.
    let filler = root.join("filler");
    let mut zeros = std::io::repeat(1);
    let full = std::io::copy(&mut zeros, &mut std::fs::File::create(&filler).unwrap());
    assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    let other = TestImage::small("fits as well");
    let fake_other = serving(&other).await;
    let error = test
        .store
        .pull(&fake_other.reference("other:v1"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{}", error.chain());
    assert!(test.names("tmp").is_empty());
    std::fs::remove_file(filler).unwrap();
    test.store
        .pull(&fake_other.reference("other:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(test.reopen().await.store.list().await.unwrap().len(), 2);
}
