//! Credentials, tokens and mirrors.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering},
};

use caisson_image::{Credentials, ErrorKind};
use tokio_rustls::{TlsAcceptor, rustls};

use crate::{
    fake::{Answer, Fake, Request},
    fixture::{TestImage, TestStore},
};

/// `user:secret`
const BASIC: &str = "Basic dXNlcjpzZWNyZXQ=";

fn user() -> Credentials {
    Credentials::Basic {
        username: "user".into(),
        password: "secret".into(),
    }
}

/// A registry that wants a token, sold at its own `/token` for what `sells` accepts. A token is good for `uses` requests.
async fn token_registry(
    uses: usize,
    sells: impl Fn(&Request) -> bool + Send + Sync + 'static,
) -> (Fake, TestImage) {
    let image = TestImage::small("token");
    let served = image.clone();
    let address = Arc::new(OnceLock::<String>::new());
    let realm = address.clone();
    let requests = AtomicUsize::new(0);
    let fake = Fake::start(move |request| {
        if request.path == "/token" {
            let number = requests.load(Ordering::SeqCst) / uses;
            return if sells(request) {
                Answer::ok(
                    "application/json",
                    format!("{{\"access_token\":\"t{number}\"}}").as_bytes(),
                )
            } else {
                Answer::new(
                    401,
                    &[],
                    b"{\"errors\":[{\"code\":\"DENIED\",\"message\":\"who are you\"}]}",
                )
            };
        }
        let good = format!("Bearer t{}", requests.load(Ordering::SeqCst) / uses);
        if request.header("authorization") == good || request.header("authorization") == "Bearer given" {
            requests.fetch_add(1, Ordering::SeqCst);
            return served.serve(request);
        }
        let challenge = format!(
            "Bearer realm=\"http://{}/token\",service=\"reg\"",
            realm.get().unwrap()
        );
        Answer::new(401, &[("WWW-Authenticate", &challenge)], b"")
    })
    .await;
    address.set(fake.address.clone()).unwrap();
    (fake, image)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_bought_and_renewed_when_it_expires() {
    let (fake, image) = token_registry(1, |request| {
        request.header("authorization") == BASIC
            && request.query.contains("service=reg")
            && request.query.contains("scope=repository%3Ateam%2Fapp%3Apull")
    })
    .await;
    let test = TestStore::new().await;
    let pulled = test
        .store
        .pull(&fake.reference("team/app:v1"), user())
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(
        fake.count("/token"),
        3,
        "manifest, config and layer with a token that is good for one"
    );
    let registry_saw_password = fake
        .requests()
        .iter()
        .any(|request| request.path != "/token" && request.header("authorization") == BASIC);
    assert!(!registry_saw_password);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_exchanged_by_post() {
    let (fake, _) = token_registry(9, |request| {
        request.method == "POST"
            && [
                "grant_type=refresh_token",
                "refresh_token=id%26token",
                "service=reg",
            ]
            .iter()
            .all(|parameter| request.body.contains(parameter))
    })
    .await;
    let test = TestStore::new().await;
    let token = Credentials::IdentityToken("id&token".into());
    test.store
        .pull(&fake.reference("team/app:v1"), token)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_token_is_reported_with_the_services_words() {
    let (fake, _) = token_registry(9, |_| false).await;
    let test = TestStore::new().await;
    for credentials in [
        Credentials::Anonymous,
        user(),
        Credentials::IdentityToken("x".into()),
    ] {
        let error = test
            .store
            .pull(&fake.reference("app"), credentials)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized);
        assert!(
            error.chain().contains("token from 127.0.0.1"),
            "{}",
            error.chain()
        );
        assert!(error.chain().contains("who are you"), "{}", error.chain());
    }
    test.store
        .pull(&fake.reference("app"), Credentials::Bearer("given".into()))
        .await
        .unwrap();
    let error = test
        .store
        .pull(&fake.reference("app"), Credentials::Bearer("old".into()))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    test.store.remove(&fake.reference("app"), &[]).await.unwrap();
    test.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_breaks_headers_harms_nobody() {
    let address = Arc::new(OnceLock::<String>::new());
    let realm = address.clone();
    let fake = Fake::start(move |request| match request.path.as_str() {
        "/token" => Answer::ok("", b"{\"token\":\"a\\r\\nHost: evil\"}"),
        _ => {
            let challenge = format!("Bearer realm=\"http://{}/token\"", realm.get().unwrap());
            Answer::new(401, &[("WWW-Authenticate", &challenge)], b"")
        }
    })
    .await;
    address.set(fake.address.clone()).unwrap();
    let test = TestStore::new().await;
    let error = test
        .store
        .pull(&fake.reference("app"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_leave_a_tls_registry_only_over_tls() {
    let image = TestImage::small("downgrade");
    let listener = Fake::start(|_| Answer::ok("", b"{\"token\":\"t\"}")).await;
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let authority = directory.path().join("ca.pem");
    std::fs::write(&authority, made.cert.pem()).unwrap();

    let elsewhere = listener.address.clone();
    let fake = Fake::start_tls(TlsAcceptor::from(Arc::new(config)), move |request| {
        if request.path.contains("/realm/") {
            let challenge = format!("Bearer realm=\"http://{elsewhere}/token\"");
            Answer::new(401, &[("WWW-Authenticate", &challenge)], b"")
        } else if request.path.contains("/redirect/") {
            let location = format!("http://{elsewhere}/");
            Answer::new(307, &[("Location", &location)], b"")
        } else {
            image.serve(request)
        }
    })
    .await;
    let upstream = "127.0.0.1:9";
    let mirrors = [(upstream.to_owned(), vec![format!("https://{}", fake.address)])];
    let test = TestStore::with(|config| {
        config.ca_files = vec![authority];
        config.mirrors = mirrors.into();
    })
    .await;
    for (repository, word) in [("realm/app", "without TLS"), ("redirect/app", "https to http")] {
        let error = test
            .store
            .pull(&format!("{upstream}/{repository}"), user())
            .await
            .unwrap_err();
        assert!(error.chain().contains(word), "{}", error.chain());
    }
    assert_eq!(listener.requests().len(), 0);
    test.store.pull(&format!("{upstream}/app"), user()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_tried_first_and_never_see_credentials() {
    let image = TestImage::small("mirrored");
    let broken = Fake::start(|_| Answer::status(404)).await;
    // This one wants a password, as a mirror that fishes for one would; and it has the manifest but not the layers.
    let (layer, partial) = (image.layers[0].clone(), image.clone());
    let mirror = Fake::start(move |request| {
        if request.path.contains("/fishing/") {
            Answer::new(401, &[("WWW-Authenticate", "Basic realm=x")], b"")
        } else if request.path.ends_with(&layer) {
            Answer::status(404)
        } else {
            partial.serve(request)
        }
    })
    .await;
    let served = image.clone();
    let registry = Fake::start(move |request| match request.header("authorization") {
        BASIC => served.serve(request),
        _ => Answer::new(401, &[("WWW-Authenticate", "Basic realm=x")], b""),
    })
    .await;
    let mirrors = [(
        registry.address.clone(),
        vec![broken.address.clone(), mirror.address.clone()],
    )];
    let test = TestStore::with(|config| config.mirrors = mirrors.into()).await;

    let pulled = test
        .store
        .pull(&registry.reference("team/app:v1"), user())
        .await
        .unwrap();
    assert_eq!(
        pulled.repo_tags,
        [registry.reference("team/app:v1")],
        "named after the registry"
    );
    assert_eq!(registry.count("/manifests/"), 0, "the mirror had it");
    assert_eq!(
        mirror.requests()[0].query,
        format!("ns={}", registry.address.replace(':', "%3A"))
    );
    assert_eq!(registry.count(&image.layers[0]), 2, "challenged, then served");
    test.store
        .pull(&registry.reference("fishing/app:v1"), user())
        .await
        .unwrap();
    for place in [&broken, &mirror] {
        assert!(
            place
                .requests()
                .iter()
                .all(|request| request.header("authorization").is_empty())
        );
    }

    let error = test
        .store
        .pull(&registry.reference("fishing/app:v1"), Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    for place in [&broken, &mirror, &registry] {
        assert!(error.chain().contains(&place.address), "{}", error.chain());
    }
}
