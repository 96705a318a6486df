//! Which images must be signed, and whether they are: the policy by name, and signatures as cosign makes them with a key.
//!
//! A signature of `sha256:D` lies in the image's own repository under the tag `sha256-D.sig`: a manifest whose layers are small documents
//! ("simple signing") that name D, each with a signature of its bytes in an annotation. Accepted is what one of the rule's keys has
//! signed and what names the digest that was asked for. Nothing here connects: documents are given. Everything that is not understood,
//! missing or wrong means no: a rule with keys fails closed.
//!
//! Cosign's transparency log, certificates (keyless) and the bundle format of its referrers are not read.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};
use rustls::pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
use serde::Deserialize;

use crate::{ImageError, digest::Digest};

/// Type of a layer that is a signature's document.
const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation with the signature, in base64.
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// What the document must say that it is.
const KIND: &str = "cosign container image signature";
/// Signatures of one image that are looked at.
const MAX_SIGNATURES: usize = 64;
/// Largest document that is signed.
pub(crate) const MAX_DOCUMENT_BYTES: u64 = 64 << 10;

/// The name that a rule for everything else has.
const ANY: &str = "*";

/// `SubjectPublicKeyInfo` of a P-256 key up to the point (RFC 5480), and of an Ed25519 key up to its bytes (RFC 8410).
const P256_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const P256_POINT_BYTES: usize = 65;
const ED25519_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
const ED25519_BYTES: usize = 32;

/// What is wanted of images of one registry or repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureRule {
    /// Nothing.
    Accept,
    /// They are never let in.
    Reject,
    /// A signature of one of these public keys (PEM files).
    Cosign(Vec<PathBuf>),
}

/// Rules by `registry`, `registry/repository` or the beginning of one up to a slash; `*` is for everything else. The longest name that
/// fits decides; without any, images are accepted.
pub type SignatureRules = BTreeMap<String, SignatureRule>;

/// Rules with their keys, ready for use.
pub(crate) struct Policy {
    rules: BTreeMap<String, Wanted>,
}

/// What a rule comes down to.
pub(crate) enum Wanted {
    Nothing,
    Never,
    SignedBy(Vec<Key>),
}

/// A public key.
pub(crate) struct Key {
    file: PathBuf,
    algorithm: &'static dyn VerificationAlgorithm,
    bytes: Vec<u8>,
}

/// A document that may be signed, and the signature that goes with it.
pub(crate) struct Candidate {
    pub(crate) document: Digest,
    pub(crate) size: u64,
    signature: String,
}

impl Policy {
    /// Reads the keys.
    pub(crate) fn new(rules: &SignatureRules) -> Result<Self, ImageError> {
        let mut ready = BTreeMap::new();
        for (name, rule) in rules {
            let wanted = match rule {
                SignatureRule::Accept => Wanted::Nothing,
                SignatureRule::Reject => Wanted::Never,
                SignatureRule::Cosign(files) if files.is_empty() => {
                    return Err(ImageError::Configuration(format!(
                        "the signature rule for {name:?} has no keys"
                    )));
                }
                SignatureRule::Cosign(files) => {
                    let keys = files
                        .iter()
                        .map(|file| Key::read(file))
                        .collect::<Result<_, _>>()?;
                    Wanted::SignedBy(keys)
                }
            };
            ready.insert(name.clone(), wanted);
        }
        Ok(Self { rules: ready })
    }

    /// What is wanted of images of this repository.
    pub(crate) fn wanted(&self, registry: &str, repository: &str) -> &Wanted {
        let name = format!("{registry}/{repository}");
        let fits = |rule: &str| {
            name.strip_prefix(rule.trim_end_matches('/'))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let best = self
            .rules
            .iter()
            .filter(|(rule, _)| fits(rule))
            .max_by_key(|(rule, _)| rule.len());
        best.map(|(_, wanted)| wanted)
            .or_else(|| self.rules.get(ANY))
            .unwrap_or(&Wanted::Nothing)
    }
}

impl Key {
    fn read(file: &Path) -> Result<Self, ImageError> {
        let refuse =
            |reason: String| ImageError::Configuration(format!("public key {}: {reason}", file.display()));
        let pem = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
        let info =
            SubjectPublicKeyInfoDer::from_pem_slice(&pem).map_err(|error| refuse(error.to_string()))?;
        let of = |prefix: &[u8], length: usize| {
            info.strip_prefix(prefix)
                .filter(|bytes| bytes.len() == length)
                .map(<[u8]>::to_vec)
        };
        let (algorithm, bytes): (&'static dyn VerificationAlgorithm, _) = match (
            of(&P256_PREFIX, P256_POINT_BYTES),
            of(&ED25519_PREFIX, ED25519_BYTES),
        ) {
            (Some(bytes), _) => (&ECDSA_P256_SHA256_ASN1, bytes),
            (None, Some(bytes)) => (&ED25519, bytes),
            (None, None) => {
                return Err(refuse(
                    "it is neither an ECDSA key on P-256 nor an Ed25519 key".into(),
                ));
            }
        };
        Ok(Self {
            file: file.to_owned(),
            algorithm,
            bytes,
        })
    }

    fn has_signed(&self, document: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.algorithm, &self.bytes)
            .verify(document, signature)
            .is_ok()
    }
}

/// The tag under which signatures of `digest` lie.
pub(crate) fn tag_of(digest: &Digest) -> String {
    format!("{}.sig", digest.to_string().replace(':', "-"))
}

/// Whether a tag is that of signatures, attestations or bills of material, as cosign names them.
pub(crate) fn is_signature_tag(tag: &str) -> bool {
    let digest = tag.strip_prefix("sha256-").and_then(|rest| rest.split_once('.'));
    digest.is_some_and(|(hex, kind)| {
        matches!(kind, "sig" | "att" | "sbom") && Digest::parse(&format!("sha256:{hex}")).is_some()
    })
}

#[derive(Deserialize)]
struct RawManifest {
    #[serde(default)]
    layers: Vec<RawLayer>,
}

#[derive(Deserialize)]
struct RawLayer {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    size: u64,
    annotations: Option<BTreeMap<String, String>>,
}

/// The signatures that a manifest under [`tag_of`] names.
pub(crate) fn candidates(manifest: &[u8]) -> Result<Vec<Candidate>, String> {
    let manifest: RawManifest = serde_json::from_slice(manifest)
        .map_err(|error| format!("the manifest of its signatures is not understood: {error}"))?;
    let candidates = manifest.layers.into_iter().filter_map(|layer| {
        let document = Digest::parse(&layer.digest)?;
        let signature = layer.annotations?.remove(SIGNATURE)?;
        let usable = layer.media_type == SIMPLE_SIGNING && layer.size <= MAX_DOCUMENT_BYTES;
        usable.then_some(Candidate {
            document,
            size: layer.size,
            signature,
        })
    });
    Ok(candidates.take(MAX_SIGNATURES).collect())
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: SignedImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct SignedImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

impl Candidate {
    /// Whether one of `keys` has signed this document, and it names `image`. Answers the key's file, or why not.
    pub(crate) fn check<'k>(
        &self,
        document: &[u8],
        image: &Digest,
        keys: &'k [Key],
    ) -> Result<&'k Path, String> {
        let signature = STANDARD
            .decode(self.signature.trim())
            .map_err(|_| "a signature is not base64".to_owned())?;
        // The signature first: what nobody known has signed is not even parsed.
        let key = keys
            .iter()
            .find(|key| key.has_signed(document, &signature))
            .ok_or("a signature is by none of the keys")?;
        let payload: Payload =
            serde_json::from_slice(document).map_err(|_| "a signed document is not understood")?;
        if payload.critical.kind != KIND {
            return Err(format!("a signed document is a {:?}", payload.critical.kind));
        }
        if payload.critical.image.digest != image.to_string() {
            return Err(format!("a signature is for {:?}", payload.critical.image.digest));
        }
        Ok(&key.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[(&str, SignatureRule)]) -> Policy {
        let rules = rules
            .iter()
            .map(|(name, rule)| ((*name).to_owned(), rule.clone()))
            .collect();
        Policy::new(&rules).unwrap()
    }

    #[test]
    fn the_longest_name_that_fits_decides() {
        use SignatureRule::{Accept, Reject};
        let rules = policy(&[
            ("*", Reject),
            ("r.example", Accept),
            ("r.example/team/", Reject),
            ("r.example/team/app", Accept),
        ]);
        for (repository, accepted) in [
            ("x", true),
            ("team", false),
            ("team/x", false),
            ("team/app", true),
            ("team/app/sub", true),
            ("team/app2", false),
            ("teams", true),
        ] {
            let wanted = rules.wanted("r.example", repository);
            assert_eq!(matches!(wanted, Wanted::Nothing), accepted, "{repository}");
        }
        assert!(matches!(rules.wanted("r.example:5000", "x"), Wanted::Never));
        assert!(matches!(policy(&[]).wanted("r", "x"), Wanted::Nothing));
    }

    #[test]
    fn a_rule_that_cannot_say_no_is_refused() {
        let rules =
            |files: Vec<PathBuf>| SignatureRules::from([("r".to_owned(), SignatureRule::Cosign(files))]);
        let error = Policy::new(&rules(Vec::new())).err().unwrap();
        assert!(error.to_string().contains("no keys"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("rsa.pub");
        for text in [
            "",
            "-----BEGIN PUBLIC KEY-----\nMAoGCCqGSM49AwEH\n-----END PUBLIC KEY-----\n",
        ] {
            std::fs::write(&file, text).unwrap();
            let error = Policy::new(&rules(vec![file.clone()])).err().unwrap();
            assert!(error.to_string().contains("rsa.pub"), "{error}");
        }
        assert!(Policy::new(&rules(vec!["/nonexistent.pub".into()])).is_err());
    }

    #[test]
    fn signatures_are_told_from_images_by_their_tag() {
        let digest = Digest::of(b"x");
        assert!(is_signature_tag(&tag_of(&digest)));
        assert!(is_signature_tag(&tag_of(&digest).replace(".sig", ".att")));
        for tag in ["latest", "sha256-abc.sig", "v1.sig"] {
            assert!(!is_signature_tag(tag), "{tag}");
        }
    }
}
