//! `hosts.toml` as containerd reads it: who is asked, in which order, and with what.

use std::{fs, sync::Arc};

use caisson_image::{Credentials, ErrorKind};
use tokio_rustls::{TlsAcceptor, rustls};

use crate::{
    fake::{Answer, Fake},
    fixture::{TestImage, TestStore},
};

/// A directory with a `hosts.toml` for a registry, and a store that reads it.
async fn store_with(registry: &str, hosts: &str) -> (TestStore, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let own = directory.path().join(registry);
    fs::create_dir(&own).unwrap();
    fs::write(own.join("hosts.toml"), hosts).unwrap();
    let roots = vec![directory.path().to_owned()];
    (
        TestStore::with(|config| config.hosts_dirs = roots).await,
        directory,
    )
}

fn user() -> Credentials {
    Credentials::Basic {
        username: "user".into(),
        password: "secret".into(),
    }
}

/// A certificate for 127.0.0.1 with its key, as PEM, and a server that shows it; with `client`, it wants one of that authority.
fn tls(client: Option<&rcgen::Certificate>) -> (String, TlsAcceptor) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match client {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(authority.der().clone()).unwrap();
            let verifier =
                rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .unwrap();
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (made.cert.pem(), TlsAcceptor::from(Arc::new(config)))
}

#[tokio::test(flavor = "multi_thread")]
async fn places_are_asked_in_order_for_what_they_may_give() {
    let image = TestImage::small("ordered");
    let (first, second, up) = (image.clone(), image.clone(), image.clone());
    let only_pulls = Fake::start(move |request| first.serve(request)).await;
    let only_resolves = Fake::start(move |request| second.serve(request)).await;
    let registry = Fake::start(move |request| up.serve(request)).await;
    let hosts = format!(
        "[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n[host.\"http://{}/prefix\"]\ncapabilities = [\"resolve\"]\n",
        only_pulls.address, only_resolves.address
    );
    let name = format!("{}_", registry.address.replace(':', "_"));
    let (test, _directory) = store_with(&name, &hosts).await;
    test.store
        .pull(&registry.reference("app:v1"), user())
        .await
        .unwrap();
    let resolved = only_resolves.requests();
    assert_eq!(resolved.len(), 1);
    assert_eq!(resolved[0].path, "/prefix/v2/app/manifests/v1");
    assert_eq!(
        resolved[0].query,
        format!("ns={}", registry.address.replace(':', "%3A"))
    );
    assert_eq!(only_pulls.count("/manifests/"), 0);
    assert_eq!(only_pulls.count("/blobs/"), 2, "config and layer");
    assert_eq!(registry.requests().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_name_is_the_registry_and_gets_its_credentials() {
    let image = TestImage::small("renamed");
    let served = image.clone();
    let server = Fake::start(move |request| match request.header("authorization") {
        "Basic dXNlcjpzZWNyZXQ=" if request.path.starts_with("/whole/path/app/") => served.serve(request),
        _ => Answer::new(401, &[("WWW-Authenticate", "Basic realm=x")], b""),
    })
    .await;
    let hosts = format!(
        "server = \"http://{}/whole/path\"\noverride_path = true\n",
        server.address
    );
    let (test, _directory) = store_with("_default", &hosts).await;
    let pulled = test.store.pull("r.example/app:v1", user()).await.unwrap();
    assert_eq!(pulled.repo_tags, ["r.example/app:v1"]);
    assert_eq!(pulled.id, image.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_as_the_file_says_and_a_renewed_file_counts_at_once() {
    let image = TestImage::small("own-tls");
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    let client = rcgen::generate_simple_self_signed(vec!["node".to_owned()]).unwrap();
    let (certificate, acceptor) = tls(Some(&client.cert));
    let (served, server) = (image.clone(), "r.example");
    let fake = Fake::start_tls(acceptor, move |request| served.serve(request)).await;
    let own = directory.path().join(server);
    fs::create_dir(&own).unwrap();
    let hosts = |settings: &str| {
        let text = format!("server = \"https://{}\"\n{settings}", fake.address);
        fs::write(own.join("hosts.toml"), text).unwrap();
    };
    let roots = vec![directory.path().to_owned()];
    let test = TestStore::with(|config| config.hosts_dirs = roots).await;
    let pull = || test.store.pull("r.example/app:v1", Credentials::Anonymous);

    hosts("");
    let error = pull().await.unwrap_err();
    assert!(error.chain().contains("certificate"), "{}", error.chain());
    hosts("skip_verify = true");
    let error = pull().await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Unavailable,
        "a client certificate is wanted"
    );

    write("node.key", &client.signing_key.serialize_pem());
    write("node.cert", &client.cert.pem());
    write("ca.crt", &certificate);
    let pair = "client = [[\"../node.cert\", \"../node.key\"]]\n";
    hosts(&format!("skip_verify = true\n{pair}"));
    assert_eq!(pull().await.unwrap().id, image.id);
    hosts(&format!("ca = \"../ca.crt\"\n{pair}"));
    assert_eq!(pull().await.unwrap().id, image.id);
    write(
        "ca.crt",
        &rcgen::generate_simple_self_signed(vec!["other".to_owned()])
            .unwrap()
            .cert
            .pem(),
    );
    let error = pull().await.unwrap_err();
    assert!(error.chain().contains("certificate"), "{}", error.chain());
    hosts("ca = \"../absent.crt\"");
    let error = pull().await.unwrap_err();
    assert!(error.chain().contains("absent.crt"), "{}", error.chain());
    hosts("colour = \"blue\"");
    let error = pull().await.unwrap_err();
    assert!(
        error.chain().contains("hosts.toml") && error.chain().contains("colour"),
        "{}",
        error.chain()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_go_to_their_place_and_not_where_it_redirects() {
    let image = TestImage::small("headers");
    let storage_image = image.clone();
    let storage = Fake::start(move |request| storage_image.serve(request)).await;
    let (served, elsewhere) = (image.clone(), storage.address.clone());
    let mirror = Fake::start(move |request| {
        if request.header("x-key") != "open" {
            Answer::status(403)
        } else if request.path.contains("/blobs/") {
            let location = format!("http://{elsewhere}{}", request.path);
            Answer::new(307, &[("Location", &location)], b"")
        } else if request.path.ends_with("/v1") {
            Answer::new(302, &[("Location", "/v2/app/manifests/moved")], b"")
        } else {
            served.serve(request)
        }
    })
    .await;
    let hosts = format!(
        "[host.\"http://{}\"]\n[host.\"http://{}\".header]\nX-Key = \"open\"\n",
        mirror.address, mirror.address
    );
    let (test, _directory) = store_with("127.0.0.1:9", &hosts).await;
    let pulled = test.store.pull("127.0.0.1:9/app:v1", user()).await.unwrap();
    assert_eq!(pulled.id, image.id);
    assert_eq!(storage.count("/blobs/"), 2);
    let clean = |request: &crate::fake::Request| {
        request.header("x-key").is_empty() && request.header("authorization").is_empty()
    };
    assert!(storage.requests().iter().all(clean));
}

/// The proxy is in the environment, which only a process of its own can have changed: this test is run again in one.
#[tokio::test(flavor = "multi_thread")]
async fn proxies_of_the_environment_are_used_except_for_this_machine() {
    const CHILD: &str = "CAISSON_TEST_PROXY_CHILD";
    let image = TestImage::small("proxied");
    if std::env::var_os(CHILD).is_none() {
        let served = image.clone();
        let proxy = Fake::start(move |request| {
            let path = request.path.replace("http://r.example:81", "");
            let inner = crate::fake::Request {
                path,
                ..request.clone()
            };
            served.serve(&inner)
        })
        .await;
        let child = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "hosts::proxies_of_the_environment_are_used_except_for_this_machine",
            ])
            .env(CHILD, "1")
            .env("HTTP_PROXY", format!("http://{}", proxy.address))
            .env("NO_PROXY", "direct.invalid")
            .status();
        assert!(child.await.unwrap().success());
        let seen = proxy.requests();
        assert!(!seen.is_empty());
        assert!(
            seen.iter()
                .all(|request| request.path.starts_with("http://r.example:81/v2/")),
            "{seen:?}"
        );
        return;
    }
    let served = image.clone();
    let local = Fake::start(move |request| served.serve(request)).await;
    let test = TestStore::with(|config| {
        config.insecure_registries = vec!["r.example:81".into(), "direct.invalid".into()];
    })
    .await;
    let pull = |reference: String| {
        let store = test.store.clone();
        async move { store.pull(&reference, Credentials::Anonymous).await }
    };
    assert_eq!(pull("r.example:81/app:v1".into()).await.unwrap().id, image.id);
    assert_eq!(pull(local.reference("app:v1")).await.unwrap().id, image.id);
    let error = pull("direct.invalid/app:v1".into()).await.unwrap_err();
    assert!(error.chain().contains("cannot connect"), "{}", error.chain());
}
