//! Images that come from this host: layouts and archives, through the same checks as a pull.

use std::{fs, io::Write, path::Path};

use caisson_image::{ErrorKind, SignatureRule};
use serde_json::json;

use crate::fixture::{OCI_INDEX, Packing, TestImage, TestStore, archive, digest, holds};

/// Names and contents.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

/// An image layout as a list of files.
pub(crate) fn layout(images: &[(&TestImage, &str, &str)]) -> Files {
    let mut files = vec![(
        "oci-layout".to_owned(),
        br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
    )];
    let mut entries = Vec::new();
    for (image, key, name) in images {
        entries.push(json!({"mediaType": image.media_type, "digest": image.digest(),
            "size": image.manifest.len(), "annotations": {*key: *name}}));
        let blobs = image
            .blobs
            .iter()
            .map(|(name, blob)| (name.clone(), blob.clone()));
        for (name, blob) in blobs.chain([(image.digest(), image.manifest.clone())]) {
            files.push((format!("blobs/{}", name.replace(':', "/")), blob));
        }
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    files.push(("index.json".into(), index.to_string().into_bytes()));
    files
}

fn write_directory(root: &Path, files: &[(String, Vec<u8>)]) {
    for (name, content) in files {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

pub(crate) fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let files: Vec<_> = files
        .iter()
        .map(|(name, content)| (name.as_str(), content.as_slice()))
        .collect();
    archive(&files)
}

/// An archive of `docker save`; the second layer is a link to the first, as it was with equal layers once.
fn saved(mark: &str, tags: &serde_json::Value) -> (Vec<u8>, String, Vec<u8>) {
    let content = format!("content of {mark}").into_bytes();
    let layer = archive(&[("file", &content)]);
    let config = json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer), digest(&layer)]}})
    .to_string()
    .into_bytes();
    let manifest = json!([{"Config": "config.json", "RepoTags": tags,
        "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let files = [
        ("a/layer.tar".to_owned(), layer),
        ("config.json".to_owned(), config.clone()),
        ("manifest.json".to_owned(), manifest.to_string().into_bytes()),
    ];
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in &files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder
        .append_link(&mut link, "b/layer.tar", "../a/layer.tar")
        .unwrap();
    (builder.into_inner().unwrap(), digest(&config), content)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_is_imported_from_a_directory_or_an_archive_under_its_names() {
    let (one, two) = (TestImage::small("one"), TestImage::small("two"));
    let files = layout(&[
        (&one, "io.containerd.image.name", "r.example/one:v1"),
        (&two, "org.opencontainers.image.ref.name", "two:v2"),
    ]);
    let test = TestStore::new().await;
    let directory = test.path().join("layout");
    write_directory(&directory, &files);
    let packed = test.path().join("layout.tar.gz");
    fs::write(&packed, Packing::Gzip.pack(&tar(&files))).unwrap();
    let plain = test.path().join("layout.tar");
    fs::write(&plain, tar(&files)).unwrap();
    for source in [directory, packed, plain] {
        let imported = test.store.import(&source, None, true).await.unwrap();
        assert_eq!(imported.len(), 2);
        assert_eq!(imported[0].id, one.id);
        assert_eq!(imported[0].repo_tags, ["r.example/one:v1"]);
        assert_eq!(imported[1].repo_tags, ["docker.io/library/two:v2"]);
        assert!(imported.iter().all(|image| image.pinned));
        assert!(holds(&imported[1].disk, b"content of two"));
        for image in imported {
            test.store.remove(&image.id, &[]).await.unwrap();
        }
        test.assert_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_of_docker_save_is_imported_and_can_be_given_a_name() {
    let test = TestStore::new().await;
    let file = test.path().join("saved.tar");
    let (bytes, id, content) = saved("docker", &json!(["app:v1", "r.example/app:v1"]));
    fs::write(&file, bytes).unwrap();
    let imported = test.store.import(&file, None, false).await.unwrap();
    assert_eq!(imported.len(), 2);
    assert_eq!((&imported[0].id, imported[1].pinned), (&id, false));
    assert_eq!(
        imported[1].repo_tags,
        ["docker.io/library/app:v1", "r.example/app:v1"]
    );
    assert!(holds(&imported[0].disk, &content));

    let named = test
        .store
        .import(&file, Some("other.example/app:new"), false)
        .await
        .unwrap();
    assert!(named[0].repo_tags.contains(&"other.example/app:new".to_owned()));

    let (bytes, ..) = saved("nameless", &json!(null));
    fs::write(&file, bytes).unwrap();
    let error = test.store.import(&file, None, false).await.unwrap_err();
    assert!(error.chain().contains("give a name"), "{}", error.chain());
    test.store.import(&file, Some("now:named"), false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_outlives_a_restart_and_another_import_and_can_be_taken_off() {
    let image = TestImage::small("pinned");
    let test = TestStore::new().await;
    let file = test.path().join("layout.tar");
    let name = "r.example/pinned:v1";
    fs::write(&file, tar(&layout(&[(&image, "io.containerd.image.name", name)]))).unwrap();
    test.store.import(&file, None, true).await.unwrap();
    let test = test.reopen().await;
    let again = test.store.import(&file, None, false).await.unwrap();
    assert!(again[0].pinned, "an import does not take a pin off");
    assert!(!test.store.pin(name, false).await.unwrap().unwrap().pinned);
    assert!(!test.store.get(name).await.unwrap().unwrap().pinned);
    assert!(test.store.pin("r.example/unknown", true).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_is_refused_like_a_registry_that_lies() {
    let image = TestImage::small("lie");
    let name = ("io.containerd.image.name", "r.example/lie:v1");
    let good = layout(&[(&image, name.0, name.1)]);
    let layer = format!("blobs/{}", image.layers[0].replace(':', "/"));
    let changed = |change: &dyn Fn(&mut Files)| {
        let mut files = good.clone();
        change(&mut files);
        tar(&files)
    };
    let cases = [
        (
            changed(&|files| {
                let other = Packing::Gzip.pack(&archive(&[("file", b"another content")]));
                for file in files.iter_mut().filter(|file| file.0 == layer) {
                    file.1.clone_from(&other);
                }
            }),
            "has the digest",
        ),
        (
            changed(&|files| files.retain(|file| file.0 != layer)),
            "not there",
        ),
        (
            changed(&|files| files.retain(|file| file.0 != "index.json")),
            "neither index.json",
        ),
        (b"no archive at all".repeat(100), "checksum"),
        (Vec::new(), "neither index.json"),
    ];
    let test = TestStore::new().await;
    let file = test.path().join("archive.tar");
    for (bytes, word) in cases {
        fs::write(&file, bytes).unwrap();
        let error = test.store.import(&file, None, false).await.unwrap_err();
        assert!(error.chain().contains(word), "{word}: {}", error.chain());
        test.assert_empty().await;
    }
    let error = test
        .store
        .import(Path::new("/dev/null"), None, false)
        .await
        .unwrap_err();
    assert!(error.chain().contains("neither a file"), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_archive_names_only_what_is_in_it() {
    let test = TestStore::new().await;
    let secret = test.path().join("secret");
    fs::write(&secret, "{}").unwrap();
    let names = [
        secret.display().to_string(),
        "../secret".to_owned(),
        "link".to_owned(),
    ];
    for name in names {
        let manifest = json!([{"Config": name, "RepoTags": ["app:v1"], "Layers": []}]).to_string();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(manifest.len() as u64);
        builder
            .append_data(&mut header, "manifest.json", manifest.as_bytes())
            .unwrap();
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        builder.append_link(&mut link, "link", &secret).unwrap();
        let file = test.path().join("saved.tar");
        fs::File::create(&file)
            .unwrap()
            .write_all(&builder.into_inner().unwrap())
            .unwrap();
        let error = test.store.import(&file, None, false).await.unwrap_err();
        assert!(error.chain().contains("not there"), "{name}: {}", error.chain());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_is_not_a_way_around_the_signature_policy() {
    let image = TestImage::small("unsigned");
    let rules = [("r.example".to_owned(), SignatureRule::Reject)];
    let test = TestStore::with(|config| config.signatures = rules.into()).await;
    let file = test.path().join("layout.tar");
    let files = layout(&[(&image, "io.containerd.image.name", "r.example/app:v1")]);
    fs::write(&file, tar(&files)).unwrap();
    let error = test.store.import(&file, None, false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsigned);
    test.assert_empty().await;
}
