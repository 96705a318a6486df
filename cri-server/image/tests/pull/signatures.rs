//! The signature policy: what is signed by the right key is let in, and nothing else.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use caisson_image::{Credentials, ErrorKind, SignatureRule};
use serde_json::json;

use crate::{
    fake::{Answer, Fake},
    fixture::{OCI_INDEX, OCI_MANIFEST, TestImage, TestStore, digest},
};

const KIND: &str = "cosign container image signature";

/// A pair of keys as `cosign generate-key-pair` makes them.
struct Signer {
    pair: rcgen::KeyPair,
    public: PathBuf,
}

impl Signer {
    fn new(directory: &Path, name: &str, algorithm: &'static rcgen::SignatureAlgorithm) -> Self {
        let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let public = directory.join(name);
        std::fs::write(&public, pair.public_key_pem()).unwrap();
        Self { pair, public }
    }

    fn sign(&self, document: &[u8]) -> Vec<u8> {
        rcgen::SigningKey::sign(&self.pair, document).unwrap()
    }
}

/// What cosign signs: the "simple signing" document.
fn document(image: &str, kind: &str) -> Vec<u8> {
    json!({"critical": {"identity": {"docker-reference": "r.example/app"},
        "image": {"docker-manifest-digest": image}, "type": kind}, "optional": null})
    .to_string()
    .into_bytes()
}

/// Manifests and blobs that a registry has beside an image.
#[derive(Default)]
struct Extra {
    /// By tag.
    manifests: BTreeMap<String, Vec<u8>>,
    blobs: BTreeMap<String, Vec<u8>>,
}

impl Extra {
    /// Puts signatures under the tag of `image`: documents, each with its signature.
    fn attach(&mut self, image: &str, signed: &[(Vec<u8>, Vec<u8>)]) {
        let config = b"{}".to_vec();
        let layers: Vec<_> = signed
            .iter()
            .map(|(document, signature)| {
                json!({"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
                    "digest": digest(document), "size": document.len(),
                    "annotations": {"dev.cosignproject.cosign/signature": STANDARD.encode(signature)}})
            })
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": 2},
            "layers": layers});
        self.blobs.insert(digest(&config), config);
        for (document, _) in signed {
            self.blobs.insert(digest(document), document.clone());
        }
        let tag = format!("{}.sig", image.replace(':', "-"));
        self.manifests.insert(tag, manifest.to_string().into_bytes());
    }
}

struct Signed {
    registry: Fake,
    image: TestImage,
    extra: Arc<Mutex<Extra>>,
    keys: tempfile::TempDir,
}

impl Signed {
    async fn new() -> Self {
        let image = TestImage::small("signed");
        let extra = Arc::new(Mutex::new(Extra::default()));
        let (served, beside) = (image.clone(), extra.clone());
        let registry = Fake::start(move |request| {
            let beside = beside.lock().unwrap();
            let name = request.path.rsplit_once('/').unwrap().1;
            if let Some(manifest) = beside.manifests.get(name) {
                return Answer::ok(OCI_MANIFEST, manifest);
            }
            if let Some(blob) = beside.blobs.get(name) {
                return Answer::ok("application/octet-stream", blob);
            }
            if name.ends_with(".sig") {
                return Answer::status(404);
            }
            served.serve(request)
        })
        .await;
        Self {
            registry,
            image,
            extra,
            keys: tempfile::tempdir().unwrap(),
        }
    }

    async fn store(&self, keys: &[&Signer]) -> TestStore {
        let files = keys.iter().map(|signer| signer.public.clone()).collect();
        let name = format!("{}/team", self.registry.address);
        let rules = [(name, SignatureRule::Cosign(files))];
        TestStore::with(|config| config.signatures = rules.into()).await
    }

    fn attach(&self, signed: &[(Vec<u8>, Vec<u8>)]) {
        let mut extra = self.extra.lock().unwrap();
        extra.attach(&self.image.digest(), signed);
    }

    async fn refused(&self, test: &TestStore, word: &str) {
        let reference = self.registry.reference("team/app:v1");
        let error = test
            .store
            .pull(&reference, Credentials::Anonymous)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsigned, "{}", error.chain());
        assert!(error.chain().contains(word), "{word}: {}", error.chain());
        test.assert_empty().await;
        let layer = &self.image.layers[0];
        assert_eq!(self.registry.count(layer), 0, "nothing of the content is fetched");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_the_right_key_has_signed_for_this_digest_is_let_in() {
    let signed = Signed::new().await;
    let directory = signed.keys.path();
    let right = Signer::new(directory, "right.pub", &rcgen::PKCS_ECDSA_P256_SHA256);
    let wrong = Signer::new(directory, "wrong.pub", &rcgen::PKCS_ECDSA_P256_SHA256);
    let test = signed.store(&[&right]).await;
    let good = document(&signed.image.digest(), KIND);

    signed.refused(&test, "is not signed").await;
    signed.attach(&[]);
    signed.refused(&test, "holds no signature").await;
    signed.attach(&[(good.clone(), wrong.sign(&good))]);
    signed.refused(&test, "none of the keys").await;
    let other = document(&digest(b"another image"), KIND);
    signed.attach(&[(other.clone(), right.sign(&other))]);
    signed.refused(&test, &digest(b"another image")).await;
    let kind = document(&signed.image.digest(), "something else");
    signed.attach(&[(kind.clone(), right.sign(&kind))]);
    signed.refused(&test, "something else").await;
    signed.attach(&[(good.clone(), right.sign(&other))]);
    signed.refused(&test, "none of the keys").await;
    signed.attach(&[(good.clone(), b"no signature".to_vec())]);
    signed.refused(&test, "none of the keys").await;
    let garbage = b"not json".to_vec();
    signed.attach(&[(garbage.clone(), right.sign(&garbage))]);
    signed.refused(&test, "not understood").await;
    // The document's bytes are not those that its digest promises.
    signed.attach(&[(good.clone(), right.sign(&good))]);
    let swapped = signed
        .extra
        .lock()
        .unwrap()
        .blobs
        .insert(digest(&good), other.clone());
    signed.refused(&test, "has digest").await;
    signed
        .extra
        .lock()
        .unwrap()
        .blobs
        .insert(digest(&good), swapped.unwrap());

    signed.attach(&[
        (other.clone(), right.sign(&other)),
        (good.clone(), right.sign(&good)),
    ]);
    let reference = signed.registry.reference("team/app:v1");
    let pulled = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
    assert_eq!(pulled.id, signed.image.id);

    // What is here already is not let in under a name that it is not signed for.
    signed.extra.lock().unwrap().manifests.clear();
    let error = test
        .store
        .pull(
            &signed.registry.reference("team/other:v1"),
            Credentials::Anonymous,
        )
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsigned);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_of_the_keys_will_do_and_an_index_is_signed_as_a_whole() {
    let signed = Signed::new().await;
    let directory = signed.keys.path();
    let unused = Signer::new(directory, "unused.pub", &rcgen::PKCS_ECDSA_P256_SHA256);
    let edwards = Signer::new(directory, "edwards.pub", &rcgen::PKCS_ED25519);
    let test = signed.store(&[&unused, &edwards]).await;
    let index = TestImage::index(OCI_INDEX, &[("amd64", &signed.image)]);
    let good = document(&digest(&index), KIND);
    {
        let mut extra = signed.extra.lock().unwrap();
        extra.attach(&digest(&index), &[(good.clone(), edwards.sign(&good))]);
        extra.manifests.insert("multi".into(), index);
    }
    let reference = signed.registry.reference("team/app:multi");
    let pulled = test.store.pull(&reference, Credentials::Anonymous).await.unwrap();
    assert_eq!(pulled.id, signed.image.id);
    // The same image without the index is not what was signed.
    let alone = signed.registry.reference("team/app:v1");
    let error = test.store.pull(&alone, Credentials::Anonymous).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsigned);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_are_by_name_and_a_rejected_name_is_not_even_asked_for() {
    let signed = Signed::new().await;
    let rules = [
        ("*".to_owned(), SignatureRule::Reject),
        (format!("{}/free", signed.registry.address), SignatureRule::Accept),
    ];
    let test = TestStore::with(|config| config.signatures = rules.into()).await;
    let free = signed.registry.reference("free/app:v1");
    test.store.pull(&free, Credentials::Anonymous).await.unwrap();
    let before = signed.registry.requests().len();
    let rejected = signed.registry.reference("app:v1");
    let error = test
        .store
        .pull(&rejected, Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsigned);
    assert!(error.chain().contains("rejects"), "{}", error.chain());
    assert_eq!(signed.registry.requests().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_answer_for_its_signatures_lets_nothing_in() {
    let image = TestImage::small("unanswered");
    let served = image.clone();
    let registry = Fake::start(move |request| match request.path.ends_with(".sig") {
        true => Answer::status(403),
        false => served.serve(request),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let key = Signer::new(directory.path(), "key.pub", &rcgen::PKCS_ECDSA_P256_SHA256);
    let rules = [("*".to_owned(), SignatureRule::Cosign(vec![key.public]))];
    let test = TestStore::with(|config| config.signatures = rules.into()).await;
    let reference = registry.reference("app:v1");
    let error = test
        .store
        .pull(&reference, Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unauthorized);
    assert!(error.chain().contains("signatures of"), "{}", error.chain());
    test.assert_empty().await;
}
