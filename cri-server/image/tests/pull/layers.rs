//! Layers that are not an ordinary gzip archive from the registry: foreign, empty, chunked.

use caisson_image::{Credentials, ErrorKind};
use serde_json::json;

use crate::{
    fake::{Answer, Fake},
    fixture::{OCI_MANIFEST, Packing, TestImage, TestStore, archive, digest, holds},
};

/// An image of these layers, each with its media type, packed already.
fn image_of(layers: &[(&str, Vec<u8>, &[u8])]) -> TestImage {
    let mut image = TestImage::small("layers");
    let diff_ids: Vec<_> = layers.iter().map(|(_, _, plain)| digest(plain)).collect();
    let config = json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    .to_string()
    .into_bytes();
    image.id = digest(&config);
    image.layers = layers.iter().map(|(_, packed, _)| digest(packed)).collect();
    let descriptors: Vec<_> = layers
        .iter()
        .map(|(kind, packed, _)| json!({"mediaType": kind, "digest": digest(packed), "size": packed.len()}))
        .collect();
    image.manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": image.id, "size": config.len()},
        "layers": descriptors})
    .to_string()
    .into_bytes();
    image.blobs = layers
        .iter()
        .map(|(_, packed, _)| (digest(packed), packed.clone()))
        .chain([(image.id.clone(), config)])
        .collect();
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_layer_and_an_image_without_any_are_images() {
    let empty = vec![0; 1024];
    let full = archive(&[("file", b"beside the empty one")]);
    let kind = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    let some = image_of(&[
        (kind, Packing::Gzip.pack(&empty), &empty),
        (kind, Packing::Gzip.pack(&full), &full),
        (kind, Packing::Gzip.pack(&empty), &empty),
    ]);
    let none = image_of(&[]);
    let test = TestStore::new().await;
    for image in [some, none] {
        let served = image.clone();
        let fake = Fake::start(move |request| served.serve(request)).await;
        let pulled = test
            .store
            .pull(&fake.reference("app:v1"), Credentials::Anonymous)
            .await
            .unwrap();
        assert_eq!(pulled.id, image.id);
        assert!(pulled.size_bytes > 0);
    }
}

/// zstd:chunked is a zstd stream of many frames with skippable ones behind them, which hold the table of contents.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunked_zstd_layer_is_a_zstd_layer() {
    let plain = archive(&[
        ("first", b"first of the chunks".as_slice()),
        ("second", b"second of the chunks".as_slice()),
    ]);
    let mut packed = Vec::new();
    for chunk in plain.chunks(700) {
        packed.extend(zstd::encode_all(chunk, 3).unwrap());
    }
    for content in [&b"table of contents"[..], b"footer GNUlInUx"] {
        packed.extend(0x184d_2a50_u32.to_le_bytes());
        packed.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
        packed.extend(content);
    }
    let image = image_of(&[("application/vnd.oci.image.layer.v1.tar+zstd", packed, &plain)]);
    let served = image.clone();
    let fake = Fake::start(move |request| served.serve(request)).await;
    let test = TestStore::new().await;
    let pulled = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    assert!(holds(&pulled.disk, b"second of the chunks"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_layer_is_had_from_the_registry_or_refused_where_it_is() {
    let plain = archive(&[("file", b"not to be distributed")]);
    let packed = Packing::Gzip.pack(&plain);
    let kind = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    let image = image_of(&[(kind, packed, &plain)]);
    let elsewhere = Fake::start(|_| Answer::status(200)).await;
    let address = format!("http://{}/layer", elsewhere.address);
    let mut foreign = image.clone();
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["layers"][0]["urls"] = json!([address, "https://localhost:9/layer"]);
    foreign.manifest = manifest.to_string().into_bytes();
    foreign.blobs.remove(&image.layers[0]);

    let test = TestStore::new().await;
    let served = foreign.clone();
    let fake = Fake::start(move |request| served.serve(request)).await;
    let error = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", error.chain());
    for word in ["only https", "localhost:9", "404"] {
        assert!(error.chain().contains(word), "{word}: {}", error.chain());
    }
    assert_eq!(elsewhere.requests().len(), 0, "plain HTTP is not followed");
    test.assert_empty().await;

    let served = image.clone();
    let fake = Fake::start(move |request| served.serve(request)).await;
    let pulled = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    assert!(holds(&pulled.disk, b"not to be distributed"));
}
