//! Against Debian's `docker-registry`.

use caisson_image::{Credentials, ErrorKind};

use crate::{
    fixture::{DOCKER_LIST, OCI_INDEX, Packing, TestImage, TestStore, archive, cause, digest, holds},
    server_process::{Options, RegistryProcess},
};

fn basic(password: &str) -> Credentials {
    Credentials::Basic {
        username: "user".into(),
        password: password.into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_by_tag_and_by_digest_whatever_its_layers_are_packed_with() {
    let Some(registry) = RegistryProcess::start(&Options::default()) else {
        return;
    };
    let image = TestImage::new(
        "packings",
        &[
            (archive(&[("plain", b"from the plain layer")]), Packing::Plain),
            (archive(&[("gzip", b"from the gzip layer")]), Packing::Gzip),
            (archive(&[("zstd", b"from the zstd layer")]), Packing::Zstd),
            (archive(&[]), Packing::Gzip),
        ],
    );
    registry.push("team/app", "v1", &image);
    let by_tag = registry.reference("team/app:v1");
    let by_digest = registry.reference(&format!("team/app@{}", image.digest()));

    let test = TestStore::new().await;
    let pulled = test.store.pull(&by_tag, Credentials::Anonymous).await.unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(pulled.repo_tags, [by_tag.as_str()]);
    assert_eq!(pulled.repo_digests, [by_digest.as_str()]);
    assert_eq!(pulled.config.entrypoint, ["/entry"]);
    assert_eq!(pulled.config.env, ["MARK=packings"]);
    assert_eq!(pulled.config.raw.as_bytes(), image.blobs[&image.id]);
    // One of its layers has no contents, and is no part of the disk.
    assert!(pulled.size_bytes > crate::fixture::content(&pulled.disk).len() as u64);
    for content in [
        "from the plain layer",
        "from the gzip layer",
        "from the zstd layer",
    ] {
        assert!(holds(&pulled.disk, content.as_bytes()), "{content}");
    }
    assert!(test.names("tmp").is_empty());

    let other = TestStore::new().await;
    let pulled = other
        .store
        .pull(&by_digest, Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(
        (pulled.repo_tags.len(), pulled.repo_digests),
        (0, vec![by_digest.clone()])
    );
    let tagged_and_digested = by_tag + "@" + &image.digest();
    assert_eq!(
        other
            .store
            .pull(&tagged_and_digested, Credentials::Anonymous)
            .await
            .unwrap()
            .id,
        image.id
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_the_image_for_this_platform() {
    let Some(registry) = RegistryProcess::start(&Options::default()) else {
        return;
    };
    for (media_type, docker) in [(OCI_INDEX, false), (DOCKER_LIST, true)] {
        let form = |image: TestImage| if docker { image.into_docker() } else { image };
        let (ours, theirs) = (form(TestImage::small("amd64")), form(TestImage::small("arm64")));
        for image in [&ours, &theirs] {
            registry.push("multi", &image.digest(), image);
        }
        let index = TestImage::index(media_type, &[("arm64", &theirs), ("amd64", &ours)]);
        registry.push_manifest("multi", "latest", media_type, &index);

        let test = TestStore::new().await;
        let pulled = test
            .store
            .pull(&registry.reference("multi"), Credentials::Anonymous)
            .await
            .unwrap();
        assert_eq!(pulled.id, ours.id);
        assert_eq!(pulled.repo_tags, [registry.reference("multi:latest")]);
        assert_eq!(
            pulled.repo_digests,
            [registry.reference(&format!("multi@{}", digest(&index)))]
        );
    }
    let test = TestStore::new().await;
    let other = TestImage::small("arm64");
    let index = TestImage::index(OCI_INDEX, &[("arm64", &other)]);
    registry.push("multi", &other.digest(), &other);
    registry.push_manifest("multi", "other", OCI_INDEX, &index);
    let error = test
        .store
        .pull(&registry.reference("multi:other"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.chain().contains("linux/arm64"), "{}", error.chain());
    test.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_decide() {
    let Some(registry) = RegistryProcess::start(&Options {
        password: true,
        tls: None,
    }) else {
        return;
    };
    registry.push("secret", "v1", &TestImage::small("secret"));
    let reference = registry.reference("secret:v1");
    let test = TestStore::new().await;
    for wrong in [
        Credentials::Anonymous,
        basic("guess"),
        Credentials::Bearer("token".into()),
    ] {
        let error = test.store.pull(&reference, wrong.clone()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{wrong:?}");
        let text = error.chain();
        assert!(
            text.contains("/v2/secret/manifests/v1") && text.contains("401"),
            "{text}"
        );
        assert!(!text.contains("guess"), "{text}");
        test.assert_empty().await;
    }
    test.store.pull(&reference, basic("secret")).await.unwrap();
    // That it is here now does not make it everybody's.
    let error = test
        .store
        .pull(&reference, Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_does_not_have_is_not_found() {
    let Some(registry) = RegistryProcess::start(&Options::default()) else {
        return;
    };
    registry.push("app", "v1", &TestImage::small("app"));
    let test = TestStore::new().await;
    for missing in ["app:v2", "other:v1", &format!("app@{}", digest(b"nothing"))] {
        let error = test
            .store
            .pull(&registry.reference(missing), Credentials::Anonymous)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{missing}");
        assert!(
            error.chain().contains("404") && error.chain().contains(&registry.address),
            "{}",
            error.chain()
        );
    }
    test.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn https_needs_an_authority_that_is_trusted() {
    let Some(registry) = RegistryProcess::start(&Options::default()) else {
        return;
    };
    let image = TestImage::small("tls");
    registry.push("app", "v1", &image);
    let directory = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (certificate, key) = (
        directory.path().join("cert.pem"),
        directory.path().join("key.pem"),
    );
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let registry = registry.restart(&Options {
        password: false,
        tls: Some((&certificate, &key)),
    });

    // Registries on loopback are plain HTTP unless the address says otherwise.
    let port = registry.address.rsplit_once(':').unwrap().1;
    let mirror = format!("https://localhost:{port}");
    // Nobody listens on port 9, so what arrives came over TLS.
    let upstream = "127.0.0.1:9";
    let mirrors = [(upstream.to_owned(), vec![mirror])];
    let reference = format!("{upstream}/app:v1");

    let stranger = TestStore::with(|config| config.mirrors = mirrors.clone().into()).await;
    let error = stranger
        .store
        .pull(&reference, Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("certificate"), "{}", error.chain());

    let trusting = TestStore::with(|config| {
        config.mirrors = mirrors.into();
        config.ca_files = vec![certificate.clone()];
    })
    .await;
    let pulled = trusting
        .store
        .pull(&reference, Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(pulled.repo_tags, [reference]);

    let error = caisson_image::ImageStore::open(caisson_image::ImageStoreConfig {
        root: directory.path().join("store"),
        ca_files: vec![key],
        ..trusting.config.clone()
    })
    .await
    .unwrap_err();
    assert!(cause(&error).to_string().contains("key.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves_and_the_old_image_keeps_its_digest() {
    let Some(registry) = RegistryProcess::start(&Options::default()) else {
        return;
    };
    let (old, new) = (TestImage::small("old"), TestImage::small("new"));
    let reference = registry.reference("app:stable");
    let test = TestStore::new().await;
    registry.push("app", "stable", &old);
    test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
    registry.push("app", "stable", &new);
    let moved = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
    assert_eq!((moved.id.as_str(), moved.repo_tags.len()), (new.id.as_str(), 1));

    let test = test.reopen().await;
    let left = test.store.get(&old.id).await.unwrap().unwrap();
    assert_eq!(left.repo_tags, [""; 0]);
    assert_eq!(
        left.repo_digests,
        [registry.reference(&format!("app@{}", old.digest()))]
    );
    assert_eq!(test.store.get(&reference).await.unwrap().unwrap().id, new.id);
    assert_eq!(test.store.list().await.unwrap().len(), 2);
}
