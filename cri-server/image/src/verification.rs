//! The signature policy applied to what a reference turned out to be, before any of its content is fetched.

use std::path::Path;

use crate::{
    ErrorKind, ImageError,
    digest::Digest,
    reference::Reference,
    registry::{Fetched, Sources},
    signature::{self, Key, MAX_DOCUMENT_BYTES, Policy, Wanted},
};

/// Refuses names that are never let in, before anybody is asked about them.
pub(crate) fn admit(policy: &Policy, reference: &Reference) -> Result<(), ImageError> {
    match policy.wanted(reference.registry(), reference.repository()) {
        Wanted::Never => Err(refused(reference, "the policy rejects this name".into())),
        Wanted::Nothing | Wanted::SignedBy(_) => Ok(()),
    }
}

/// Refuses what is not signed as the policy for its name wants it.
pub(crate) async fn verify(
    policy: &Policy,
    sources: &Sources,
    reference: &Reference,
    digest: &Digest,
) -> Result<(), ImageError> {
    let keys = match policy.wanted(reference.registry(), reference.repository()) {
        Wanted::Nothing => return Ok(()),
        Wanted::Never => return admit(policy, reference),
        Wanted::SignedBy(keys) => keys,
    };
    let key = signed_by(sources, reference, digest, keys).await?;
    tracing::info!(reference = %reference, %digest, key = %key.display(), "image.signature_accepted");
    Ok(())
}

async fn signed_by<'k>(
    sources: &Sources,
    reference: &Reference,
    digest: &Digest,
    keys: &'k [Key],
) -> Result<&'k Path, ImageError> {
    let tag = signature::tag_of(digest);
    let manifest = match sources.other_manifest(&tag).await {
        Ok(Fetched { bytes, .. }) => bytes,
        Err(error) if error.kind == ErrorKind::NotFound => {
            return Err(refused(
                reference,
                format!("{digest} is not signed: there is no tag {tag}"),
            ));
        }
        Err(source) => {
            return Err(ImageError::Registry {
                image: format!("the signatures of {reference}"),
                source,
            });
        }
    };
    let candidates = signature::candidates(&manifest).map_err(|reason| refused(reference, reason))?;
    let mut reasons = Vec::new();
    for candidate in candidates {
        let document = sources.small_blob(&candidate.document, MAX_DOCUMENT_BYTES).await;
        let checked = match document {
            Ok(document) if document.len() as u64 == candidate.size => {
                candidate.check(&document, digest, keys)
            }
            Ok(_) => Err("a signed document has another size than its manifest says".to_owned()),
            Err(error) => Err(crate::error::describe(&error)),
        };
        match checked {
            Ok(key) => return Ok(key),
            Err(reason) if reasons.contains(&reason) => {}
            Err(reason) => reasons.push(reason),
        }
    }
    if reasons.is_empty() {
        reasons.push(format!("the tag {tag} holds no signature"));
    }
    Err(refused(reference, format!("{digest}: {}", reasons.join("; "))))
}

fn refused(reference: &Reference, reason: String) -> ImageError {
    ImageError::Signature {
        image: reference.to_string(),
        reason,
    }
}
