//! Credentials that the host has, in files and from helper programs.

use std::{os::unix::fs::PermissionsExt, path::Path};

use caisson_image::{Credentials, ErrorKind};

use crate::{
    fake::{Answer, Fake},
    fixture::{TestImage, TestStore},
};

/// `user:secret`
const BASIC: &str = "Basic dXNlcjpzZWNyZXQ=";

/// A registry that serves who shows the password of `user`.
async fn private(image: &TestImage) -> Fake {
    let image = image.clone();
    Fake::start(move |request| match request.header("authorization") {
        BASIC => image.serve(request),
        _ => Answer::new(401, &[("WWW-Authenticate", "Basic realm=x")], b""),
    })
    .await
}

fn program(path: &Path, script: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_without_credentials_takes_those_of_the_file_and_sees_it_change() {
    let image = TestImage::small("filed");
    let registry = private(&image).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.json");
    let test = TestStore::with(|config| config.auth_files = vec![file.clone()]).await;
    let reference = registry.reference("team/app:v1");
    let pull = |credentials| test.store.pull(&reference, credentials);

    let refused = pull(Credentials::Anonymous).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unauthorized);
    let auths = format!(
        r#"{{"auths": {{"{}": {{"auth": "dXNlcjpzZWNyZXQ="}}}}}}"#,
        registry.address
    );
    std::fs::write(&file, auths).unwrap();
    assert_eq!(pull(Credentials::Anonymous).await.unwrap().id, image.id);

    // What a pull brings is not replaced by what the host has.
    let wrong = Credentials::Basic {
        username: "user".into(),
        password: "wrong".into(),
    };
    assert_eq!(pull(wrong).await.unwrap_err().kind(), ErrorKind::Unauthorized);

    std::fs::write(&file, "{").unwrap();
    let broken = pull(Credentials::Anonymous).await.unwrap_err();
    assert!(broken.chain().contains("config.json"), "{}", broken.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_gets_its_own_credentials_and_never_those_of_the_registry() {
    let image = TestImage::small("mirror-auth");
    let mirror = private(&image).await;
    let registry = Fake::start(|_| Answer::status(404)).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("auth.json");
    let auths = format!(
        r#"{{"auths": {{"{}": {{"auth": "dXNlcjpzZWNyZXQ="}}, "{}": {{"username": "for", "password": "registry"}}}}}}"#,
        mirror.address, registry.address
    );
    std::fs::write(&file, auths).unwrap();
    let mirrors = [(registry.address.clone(), vec![mirror.address.clone()])];
    let test = TestStore::with(|config| {
        config.auth_files = vec![file];
        config.mirrors = mirrors.into();
    })
    .await;
    let pulled = test
        .store
        .pull(&registry.reference("team/app:v1"), Credentials::Anonymous)
        .await
        .unwrap();
    assert_eq!(pulled.id, image.id);
    let shown = mirror
        .requests()
        .iter()
        .all(|request| matches!(request.header("authorization"), "" | BASIC));
    assert!(shown);
}

/// The helper is looked up in PATH, which only a process of its own can have changed: this test is run again in one.
#[tokio::test(flavor = "multi_thread")]
async fn helpers_are_asked_and_their_failures_are_told() {
    const CHILD: &str = "CAISSON_TEST_HELPER_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let directory = tempfile::tempdir().unwrap();
        let helper = |name: &str, script: &str| {
            program(
                &directory.path().join(format!("docker-credential-{name}")),
                script,
            );
        };
        helper(
            "good",
            "read server; echo \"$server\" > \"${0%/*}/asked\"; echo '{\"Username\":\"user\",\"Secret\":\"secret\"}'",
        );
        helper(
            "stranger",
            "echo 'credentials not found in native keychain'; exit 1",
        );
        helper("broken", "echo 'the keychain is locked'; exit 1");
        helper("garbage", "echo '{'");
        let path = format!("{}:/usr/bin:/bin", directory.path().display());
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "credentials::helpers_are_asked_and_their_failures_are_told",
            ])
            .env("PATH", path)
            .env(CHILD, directory.path())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let directory = std::path::PathBuf::from(std::env::var_os(CHILD).unwrap());
    let image = TestImage::small("helper");
    let registry = private(&image).await;
    let file = directory.join("config.json");
    let test = TestStore::with(|config| config.auth_files = vec![file.clone()]).await;
    let pull = |helper: &str| {
        let config = format!(
            r#"{{"credHelpers": {{"{}": "{helper}"}}, "auths": {{"{}": {{}}}}}}"#,
            registry.address, registry.address
        );
        std::fs::write(&file, config).unwrap();
        let (store, reference) = (test.store.clone(), registry.reference("app:v1"));
        async move { store.pull(&reference, Credentials::Anonymous).await }
    };
    assert_eq!(pull("good").await.unwrap().id, image.id);
    let asked = std::fs::read_to_string(directory.join("asked")).unwrap();
    assert_eq!(asked.trim(), registry.address);
    for (helper, word) in [
        ("stranger", "401"),
        ("broken", "the keychain is locked"),
        ("garbage", "not understood"),
        ("absent", "cannot be run"),
    ] {
        let error = pull(helper).await.unwrap_err();
        assert!(error.chain().contains(word), "{helper}: {}", error.chain());
    }
}
