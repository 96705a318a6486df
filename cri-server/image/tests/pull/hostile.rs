//! Registries that lie, break and hang, and images that attack. What is refused leaves nothing.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use caisson_image::{Credentials, ErrorKind, ImageError};
use serde_json::json;

use crate::{
    fake::{Answer, Fake, Request},
    fixture::{OCI_MANIFEST, Packing, TestImage, TestStore, archive, cause, digest, holds},
};

/// Pulls from a registry with that handler into a store of its own, which must be empty afterwards; answers the error.
async fn refused(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> (ImageError, Fake) {
    refused_within(Duration::from_secs(60), handler).await
}

async fn refused_within(
    stall_deadline: Duration,
    handler: impl Fn(&Request) -> Answer + Send + Sync + 'static,
) -> (ImageError, Fake) {
    let fake = Fake::start(handler).await;
    let test = TestStore::with(|config| {
        config.max_image_bytes = 8 << 20;
        config.stall_deadline = stall_deadline;
    })
    .await;
    let error = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap_err();
    test.assert_empty().await;
    // Others are not harmed: the next pull works.
    let honest = TestImage::small("honest");
    let fake_honest = Fake::start(move |request| honest.serve(request)).await;
    test.store
        .pull(&fake_honest.reference("app"), Credentials::Anonymous)
        .await
        .unwrap();
    (error, fake)
}

fn assert_error(error: &ImageError, kind: ErrorKind, words: &[&str]) {
    let text = error.chain();
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} in {text}");
    }
}

/// An image of one gzip layer.
fn image_of(files: &[(&str, &[u8])]) -> TestImage {
    TestImage::new("hostile", &[(archive(files), Packing::Gzip)])
}

/// Serves the image, but its layer as `answer` makes it.
fn with_layer(
    image: TestImage,
    answer: impl Fn(&Request, &[u8]) -> Answer + Send + Sync + 'static,
) -> impl Fn(&Request) -> Answer + Send + Sync + 'static {
    let name = image.layers[0].clone();
    move |request| {
        if request.path.ends_with(&name) {
            answer(request, &image.blobs[&name])
        } else {
            image.serve(request)
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_another_digest_is_refused() {
    let image = image_of(&[("file", &[7; 4000])]);
    let layer = image.layers[0].clone();
    let (error, _) = refused(with_layer(image, |_, blob| {
        let mut other = blob.to_vec();
        let middle = other.len() / 2;
        other[middle] ^= 1;
        Answer::ok("application/octet-stream", &other)
    }))
    .await;
    assert_error(&error, ErrorKind::Refused, &["has the digest sha256:", &layer]);

    // One that is a good archive, so that only the digest tells.
    let image = TestImage::new("plain", &[(archive(&[("file", b"good")]), Packing::Plain)]);
    let evil = archive(&[("file", b"evil")]);
    let (error, _) = refused(with_layer(image, move |_, _| Answer::ok("", &evil))).await;
    assert_error(&error, ErrorKind::Refused, &["has the digest"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_what_the_config_says_is_refused() {
    let layers = [(archive(&[("file", b"x")]), Packing::Gzip)];
    let config = json!({"os": "linux", "rootfs": {"diff_ids": [digest(b"something else")]}});
    let image = TestImage::with_config(&config, &layers);
    let (error, _) = refused(move |request| image.serve(request)).await;
    assert_error(&error, ErrorKind::Refused, &["diff id"]);

    let config = json!({"os": "linux", "rootfs": {"diff_ids": []}});
    let image = TestImage::with_config(&config, &layers);
    let (error, fake) = refused(move |request| image.serve(request)).await;
    assert_error(&error, ErrorKind::Refused, &["0 layers"]);
    assert_eq!(fake.count("/blobs/"), 1, "no layer is fetched for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_or_config_with_another_digest_is_refused() {
    let image = TestImage::small("digest");
    let fake = Fake::start(move |request| image.serve(request)).await;
    let lying = Fake::start({
        let image = TestImage::small("other");
        move |_| Answer::ok(OCI_MANIFEST, &image.manifest)
    })
    .await;
    let test = TestStore::new().await;
    let wanted = TestImage::small("digest").digest();
    let error = test
        .store
        .pull(&lying.reference(&format!("app@{wanted}")), Credentials::Anonymous)
        .await;
    assert_error(
        &error.unwrap_err(),
        ErrorKind::Refused,
        &["the content has digest"],
    );
    test.store
        .pull(&fake.reference(&format!("app@{wanted}")), Credentials::Anonymous)
        .await
        .unwrap();

    let image = TestImage::small("config");
    let (error, _) = refused(move |request| match request.path.ends_with(&image.id) {
        true => Answer::ok("", b"{}"),
        false => image.serve(request),
    })
    .await;
    assert_error(&error, ErrorKind::Refused, &["the content has digest"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bomb_is_stopped_at_the_limit() {
    let zeros = archive(&[("zeros", &vec![0; 64 << 20])]);
    for packing in [Packing::Gzip, Packing::Zstd] {
        let image = TestImage::new("bomb", &[(zeros.clone(), packing)]);
        let (error, _) = refused(move |request| image.serve(request)).await;
        assert_error(&error, ErrorKind::Refused, &["8388608"]);
    }
    // One whose compressed size is over the limit already is not even fetched.
    let mut image = image_of(&[("file", b"x")]);
    let size = image.blobs[&image.layers[0]].len();
    let text = String::from_utf8(image.manifest.clone()).unwrap();
    image.manifest = text
        .replace(&format!("\"size\":{size}"), &format!("\"size\":{}", u64::MAX))
        .into_bytes();
    let (error, fake) = refused(move |request| image.serve(request)).await;
    assert_error(&error, ErrorKind::Refused, &["larger than"]);
    assert_eq!(fake.count("/blobs/"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_leave_the_tree_are_refused() {
    for name in ["../evil", "a/../../evil", "/../evil"] {
        let image = image_of(&[(name, b"x")]);
        let layer = image.layers[0].clone();
        let (error, _) = refused(move |request| image.serve(request)).await;
        assert_error(&error, ErrorKind::Refused, &[&layer, "parent directory"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_none_is_refused() {
    let garbage = vec![0xa5; 4096];
    let image = TestImage::new("garbage", &[(garbage, Packing::Zstd)]);
    let (error, _) = refused(move |request| image.serve(request)).await;
    assert_error(&error, ErrorKind::Refused, &["layer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_instead_of_a_manifest_is_an_unavailable_registry() {
    for garbage in [
        "",
        "<html>login</html>",
        "{}",
        "{\"schemaVersion\":2}",
        "[[[[",
        "null",
    ] {
        let (error, _) = refused(move |_| Answer::ok("text/html", garbage.as_bytes())).await;
        assert_error(&error, ErrorKind::Unavailable, &["manifest v1"]);
    }
    let (error, _) = refused(|_| Answer::raw(b"\x00\x01 this is no http\r\n\r\n")).await;
    assert_error(&error, ErrorKind::Unavailable, &["/v2/app/manifests/v1"]);
    let old = json!({"schemaVersion": 1, "name": "app", "fsLayers": []}).to_string();
    let (error, _) = refused(move |_| Answer::ok("application/json", old.as_bytes())).await;
    assert_error(&error, ErrorKind::Refused, &["schema 1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_answers_end() {
    let (error, _) = refused(|_| Answer::endless(b' ')).await;
    assert_error(&error, ErrorKind::Refused, &["larger than 4194304 bytes"]);
    let image = image_of(&[("file", &[7; 4000])]);
    let (error, _) = refused(with_layer(image, |_, _| Answer::endless(0))).await;
    assert_error(&error, ErrorKind::Refused, &["has more than"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_resumed_where_it_broke() {
    let content: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let image = TestImage::new("resume", &[(archive(&[("file", &content)]), Packing::Plain)]);
    let size = image.blobs[&image.layers[0]].len();
    let served = image.clone();
    let fake = Fake::start(with_layer(image, move |request, blob| {
        match request.range_start() {
            None => Answer::ok("", blob).cut_after(size / 3),
            Some(start) if start < size / 2 => Answer::partial(blob, start).cut_after(size / 3),
            Some(start) => Answer::partial(blob, start),
        }
    }))
    .await;
    let test = TestStore::new().await;
    let pulled = test
        .store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    assert!(holds(&pulled.disk, &content[..100_000]));
    assert_eq!(fake.count(&served.layers[0]), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_is_read_again_from_the_start() {
    let image = TestImage::new("again", &[(archive(&[("file", &[9; 50_000])]), Packing::Plain)]);
    let asked = AtomicUsize::new(0);
    let fake = Fake::start(with_layer(image, move |_, blob| {
        let answer = Answer::ok("", blob);
        if asked.fetch_add(1, Ordering::SeqCst) == 0 {
            answer.cut_after(30_000)
        } else {
            answer
        }
    }))
    .await;
    let test = TestStore::new().await;
    test.store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_always_breaks_is_given_up() {
    let image = image_of(&[("file", &[7; 4000])]);
    let layer = image.layers[0].clone();
    let (error, fake) = refused(with_layer(image, |request, blob| match request.range_start() {
        None => Answer::ok("", blob).cut_after(10),
        Some(_) => Answer::raw(b""),
    }))
    .await;
    assert_error(&error, ErrorKind::Unavailable, &[&layer, &fake.address]);
    assert!(fake.count(&layer) >= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_meets_the_deadline() {
    let short = Duration::from_millis(1500);
    let (error, fake) = refused_within(short, |_| Answer::raw(b"").hang_after(0)).await;
    assert_error(
        &error,
        ErrorKind::Deadline,
        &["no progress for 1.5 s", &fake.address, "manifests/v1"],
    );
    let image = image_of(&[("file", &[7; 4000])]);
    let layer = image.layers[0].clone();
    let (error, _) = refused_within(
        short,
        with_layer(image, |_, blob| Answer::ok("", blob).hang_after(20)),
    )
    .await;
    assert_error(&error, ErrorKind::Deadline, &["no progress", &layer]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_size_that_is_not_the_manifests_is_refused() {
    let image = image_of(&[("file", &[7; 4000])]);
    let (error, _) = refused(with_layer(image, |_, blob| {
        Answer::ok("", &[blob, b"more"].concat())
    }))
    .await;
    assert_error(&error, ErrorKind::Refused, &["its manifest says"]);
    let image = image_of(&[("file", &[7; 4000])]);
    let (error, _) = refused(with_layer(image, |_, blob| Answer::ok("", &blob[1..]))).await;
    assert_error(&error, ErrorKind::Refused, &["its manifest says"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_errors_are_tried_again_and_then_reported() {
    let (error, fake) = refused(|_| {
        Answer::new(
            500,
            &[],
            b"{\"errors\":[{\"code\":\"UNKNOWN\",\"message\":\"oops\"}]}",
        )
    })
    .await;
    assert_error(
        &error,
        ErrorKind::Unavailable,
        &["500", "UNKNOWN: oops", "/v2/app/manifests/v1"],
    );
    assert_eq!(fake.count("/manifests/"), 4);

    let image = TestImage::small("recovers");
    let asked = AtomicUsize::new(0);
    let fake = Fake::start(move |request| match asked.fetch_add(1, Ordering::SeqCst) % 2 {
        0 => Answer::status(503),
        _ => image.serve(request),
    })
    .await;
    let test = TestStore::new().await;
    test.store
        .pull(&fake.reference("app:v1"), Credentials::Anonymous)
        .await
        .unwrap();

    let (error, fake) = refused(|_| Answer::status(403)).await;
    assert_error(&error, ErrorKind::Unauthorized, &["403"]);
    assert_eq!(fake.requests().len(), 1, "a refusal is not tried again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_connection_says_where() {
    // Bound and not listening is not possible here; nobody listens on the discard port.
    let test = TestStore::new().await;
    let error = test
        .store
        .pull("127.0.0.1:9/app:v1", Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::Unavailable,
        &["http://127.0.0.1:9/v2/app/manifests/v1", "cannot connect"],
    );
    assert!(matches!(cause(&error), ImageError::Registry { .. }));
    let error = test
        .store
        .pull("no-such-host.invalid/app", Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_error(
        &error,
        ErrorKind::Unavailable,
        &["https://no-such-host.invalid/v2/app/manifests/latest"],
    );
    let error = test
        .store
        .pull("Not A Reference", Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_error(&error, ErrorKind::Invalid, &["Not A Reference"]);
    test.assert_empty().await;
}
