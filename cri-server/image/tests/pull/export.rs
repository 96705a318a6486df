//! Images that leave a store and come into another one.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
};

use caisson_image::{ExportError, Exported, Image, Wanted, export};
use serde_json::{Value, json};

use crate::fixture::{Packing, TestImage, TestStore, archive, content, digest};
use crate::import::{layout, tar};

const BUILDKIT: &[u8; 8] = b"0000644\0";
const DOCKER: &[u8; 8] = b"0100644\0";

/// A layer as BuildKit writes it, so that it comes out as it came in; with the mode that Docker's own store writes, too.
fn go_layer(files: &[(&str, &[u8])], mode: &[u8; 8]) -> Vec<u8> {
    let mut bytes = archive(files);
    for header in 0..bytes.len() / 512 {
        let block = &mut bytes[header * 512..][..512];
        if block[257..263] != *b"ustar " {
            continue;
        }
        // What a PAX header has where a GNU one has not.
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[100..108].copy_from_slice(mode);
        for field in [108, 116, 329, 337] {
            block[field..field + 8].copy_from_slice(b"0000000\0");
        }
        block[136..148].copy_from_slice(b"00000000000\0");
        block[156] = b'0';
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

async fn imported(test: &TestStore, image: &TestImage, name: &str) -> Image {
    let file = test.path().join("in.tar");
    let files = layout(&[(image, "io.containerd.image.name", name)]);
    fs::write(&file, tar(&files)).unwrap();
    test.store.import(&file, None, false).await.unwrap().remove(0)
}

fn wanted(reference: &str, image: &Image) -> Wanted {
    Wanted {
        reference: reference.into(),
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        config: image.config.raw.clone(),
    }
}

async fn exported(test: &TestStore, images: &[Wanted], file: &Path) -> Result<Vec<Exported>, ExportError> {
    export(&test.config, images, File::create(file).unwrap()).await
}

/// A member of an archive.
fn member(file: &Path, name: &str) -> Vec<u8> {
    let mut archive = ::tar::Archive::new(File::open(file).unwrap());
    let mut entries = archive.entries().unwrap().map(Result::unwrap);
    let mut entry = entries
        .find(|entry| entry.path_bytes() == name.as_bytes())
        .unwrap();
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_come_out_as_they_were_keep_the_image_to_the_byte() {
    let layers = [
        (go_layer(&[("base", b"of both")], BUILDKIT), Packing::Gzip),
        (
            go_layer(&[("dir/file", &[b'x'; 300_000])], BUILDKIT),
            Packing::Zstd,
        ),
        (go_layer(&[("dir/other", b"docker's")], DOCKER), Packing::Gzip),
    ];
    let image = TestImage::new("kept", &layers);
    let test = TestStore::new().await;
    let name = "r.example/kept:v1";
    let here = imported(&test, &image, name).await;
    let file = test.path().join("out.tar");
    let said = exported(&test, &[wanted(name, &here)], &file).await.unwrap();
    let expected = Exported {
        id: image.id.clone(),
        names: vec![name.into()],
        layers: 3,
        changed: 0,
    };
    assert_eq!(said, [expected]);
    let config = member(&file, &format!("blobs/{}", image.id.replace(':', "/")));
    assert_eq!(config, here.config.raw.as_bytes());

    let other = TestStore::new().await;
    let there = other.store.import(&file, None, false).await.unwrap();
    assert_eq!(there.len(), 1);
    assert_eq!((&there[0].id, &there[0].repo_tags), (&here.id, &here.repo_tags));
    assert_eq!(content(&there[0].disk), content(&here.disk));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_other_archives_becomes_another_with_the_same_files() {
    // GNU headers and a whiteout with a time.
    let layers = [
        (archive(&[("base", b"of all"), ("gone", b"soon")]), Packing::Gzip),
        (go_layer(&[("top", b"kept")], BUILDKIT), Packing::Plain),
        (archive(&[(".wh.gone", b"")]), Packing::Plain),
    ];
    let image = TestImage::new("changed", &layers);
    let test = TestStore::new().await;
    let name = "docker.io/library/changed:v1";
    let here = imported(&test, &image, name).await;
    let file = test.path().join("out.tar");
    // Twice under one name, once by its id: each layer and name is there once.
    let all = [wanted("changed:v1", &here), wanted(&here.id, &here)];
    let said = exported(&test, &all, &file).await.unwrap();
    assert_eq!(
        (said[0].layers, said[0].names.as_slice()),
        (3, [name.to_owned()].as_slice())
    );
    assert!(said[0].changed > 0 && said[0].id != image.id, "{said:?}");
    assert_eq!(said[0], said[1]);

    let config = member(&file, &format!("blobs/{}", said[0].id.replace(':', "/")));
    assert_eq!(digest(&config), said[0].id);
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    let mut known: Value = serde_json::from_str(&here.config.raw).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][1], known["rootfs"]["diff_ids"][1]);
    assert_ne!(config["rootfs"]["diff_ids"][0], known["rootfs"]["diff_ids"][0]);
    for config in [&mut config, &mut known] {
        config["rootfs"]["diff_ids"] = Value::Null;
    }
    assert_eq!(config, known, "only the digests of layers differ");
    let index: Value = serde_json::from_slice(&member(&file, "index.json")).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    assert_eq!(
        index["manifests"][0]["annotations"],
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "v1"})
    );

    let other = TestStore::new().await;
    let there = other.store.import(&file, None, false).await.unwrap().remove(0);
    assert_eq!((&there.id, &there.repo_tags), (&said[0].id, &here.repo_tags));
    assert_eq!(content(&there.disk), content(&here.disk));

    // What went out once goes out the same again, and Docker's list says what the index says.
    let again = other.path().join("again.tar");
    let said = exported(&other, &[wanted("changed:v1", &there)], &again)
        .await
        .unwrap();
    assert_eq!((said[0].changed, &said[0].id), (0, &there.id));
    let docker: Value = serde_json::from_slice(&member(&again, "manifest.json")).unwrap();
    let names = docker[0]["Layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap());
    let digests: Vec<_> = names.map(|name| digest(&member(&again, name))).collect();
    let config: Value = serde_json::from_str(&there.config.raw).unwrap();
    assert_eq!(json!(digests), config["rootfs"]["diff_ids"]);
    assert_eq!(docker[0]["RepoTags"], json!([name]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_layer_and_a_damaged_config_are_refused_by_name() {
    let image = TestImage::small("damaged");
    let test = TestStore::new().await;
    let here = imported(&test, &image, "r.example/damaged:v1").await;
    let file = test.path().join("out.tar");
    let mut other = wanted("damaged", &here);
    other.config.push(' ');
    let error = exported(&test, &[other], &file).await.unwrap_err();
    assert!(
        matches!(&error, ExportError::Image { image, .. } if image == "damaged"),
        "{error}"
    );

    let layer = &here.disk[1];
    let damaged = File::options().read(true).write(true).open(layer).unwrap();
    damaged.write_all_at(b"C", 0).unwrap();
    let error = exported(&test, &[wanted("damaged", &here)], &file)
        .await
        .unwrap_err();
    let named = image.layers[0].clone();
    assert!(
        matches!(&error, ExportError::Damaged { layer, .. } if *layer == named),
        "{error}"
    );
    assert!(error.to_string().contains("fs-verity"), "{error}");

    damaged.set_len(0).unwrap();
    let error = exported(&test, &[wanted("damaged", &here)], &file)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("0 bytes instead of"), "{error}");
    fs::remove_file(layer).unwrap();
    let error = exported(&test, &[wanted("damaged", &here)], &file)
        .await
        .unwrap_err();
    assert!(error.to_string().contains(&named), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_the_cause_that_is_told() {
    let image = TestImage::small("full");
    let test = TestStore::new().await;
    let here = imported(&test, &image, "r.example/full:v1").await;
    let output = File::options().write(true).open("/dev/full").unwrap();
    let error = export(&test.config, &[wanted("full", &here)], output)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, ExportError::Output(source) if source.kind() == std::io::ErrorKind::StorageFull),
        "{error:?}"
    );
}
