//! Pulls that happen at the same time, and pulls that nobody waits for any more.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use caisson_image::Credentials;

use crate::{
    fake::{Answer, Fake},
    fixture::{TestImage, TestStore, until},
};

/// One thread: every caller is polled once before the pull makes any progress.
#[tokio::test]
async fn concurrent_pulls_of_one_reference_are_one() {
    let image = TestImage::small("joined");
    let served = image.clone();
    let fake = Fake::start(move |request| served.serve(request)).await;
    let test = TestStore::new().await;
    let reference = fake.reference("app:v1");
    let pull = |credentials| test.store.pull(&reference, credentials);
    let (first, second, third, other) = tokio::join!(
        pull(Credentials::Anonymous),
        pull(Credentials::Anonymous),
        pull(Credentials::Anonymous),
        pull(Credentials::Bearer("x".into()))
    );
    for pulled in [first, second, third, other] {
        assert_eq!(pulled.unwrap().id, image.id);
    }
    assert_eq!(
        fake.count("/manifests/"),
        2,
        "other credentials ask for themselves"
    );
    assert_eq!(fake.count(&image.layers[0]), 1, "the layer is fetched once");

    let broken = Fake::start(|_| Answer::status(404)).await;
    let reference = broken.reference("app:v1");
    let pull = || test.store.pull(&reference, Credentials::Anonymous);
    let (first, second) = tokio::join!(pull(), pull());
    assert_eq!(first.unwrap_err().kind(), second.unwrap_err().kind());
    assert_eq!(broken.requests().len(), 1, "a failure is shared as well");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_names_for_one_image_fetch_its_layers_once() {
    let image = TestImage::small("shared");
    let (served, layer) = (image.clone(), image.layers[0].clone());
    let fake = Fake::start(move |request| served.serve(request)).await;
    let test = TestStore::new().await;
    let (one, two) = (fake.reference("app:one"), fake.reference("other/app:two"));
    let (first, second) = tokio::join!(
        test.store.pull(&one, Credentials::Anonymous),
        test.store.pull(&two, Credentials::Bearer("x".into()))
    );
    assert_eq!(
        (first.unwrap().id, second.unwrap().id),
        (image.id.clone(), image.id.clone())
    );
    assert_eq!(fake.count(&layer), 1);
    let known = test.store.get(&image.id).await.unwrap().unwrap();
    assert_eq!(known.repo_tags, [one, two]);
    assert_eq!(known.repo_digests.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_ends_with_its_last_caller_and_leaves_nothing() {
    let image = TestImage::new(
        "cancelled",
        &[(
            crate::fixture::archive(&[("file", &[3; 100_000])]),
            crate::fixture::Packing::Plain,
        )],
    );
    let (served, layer) = (image.clone(), image.layers[0].clone());
    let hanging = Arc::new(AtomicBool::new(true));
    let hang = hanging.clone();
    let fake = Fake::start(move |request| {
        let answer = served.serve(request);
        let stuck = request.path.ends_with(&layer) && hang.load(Ordering::SeqCst);
        if stuck { answer.hang_after(50_000) } else { answer }
    })
    .await;
    let test = TestStore::new().await;
    let reference = fake.reference("app:v1");
    let caller = || {
        let (store, reference) = (test.store.clone(), reference.clone());
        tokio::spawn(async move { store.pull(&reference, Credentials::Anonymous).await })
    };
    let (first, second) = (caller(), caller());
    until("layer asked for", || fake.count("/blobs/") == 2).await;
    assert_eq!(test.names("tmp").len(), 1);
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    assert_eq!(test.names("tmp").len(), 1, "the second caller still waits");
    second.abort();
    until("temporary file gone", || test.names("tmp").is_empty()).await;
    test.assert_empty().await;
    hanging.store(false, Ordering::SeqCst);
    assert_eq!(caller().await.unwrap().unwrap().id, image.id);
}
