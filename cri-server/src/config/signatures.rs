//! `[images.signatures]`: a table for each registry or repository, with what is wanted of its images.

use caisson_image::{SignatureRule, SignatureRules};

use super::reader::Section;

#[derive(Clone, Copy)]
enum Word {
    Accept,
    Reject,
    Cosign,
}

pub(super) fn read(images: &mut Section) -> SignatureRules {
    images.section("signatures", |signatures| {
        let mut rules = SignatureRules::new();
        for name in signatures.names() {
            if let Some(rule) = signatures.section(&name, rule) {
                rules.insert(name, rule);
            }
        }
        rules
    })
}

/// Nothing when it was refused, with a word about it: the configuration as a whole is refused then.
fn rule(section: &mut Section) -> Option<SignatureRule> {
    if !section.names().iter().any(|key| key == "policy") {
        section.problem("policy", "is missing: \"accept\", \"reject\" or \"cosign\"");
    }
    let words = [
        ("reject", Word::Reject),
        ("accept", Word::Accept),
        ("cosign", Word::Cosign),
    ];
    let policy = section.choice("policy", &words);
    let keys = section.absolutes("keys", &[]);
    match policy {
        Word::Cosign if keys.is_empty() => {
            section.problem("keys", "a rule with cosign needs public keys");
            None
        }
        Word::Cosign => Some(SignatureRule::Cosign(keys)),
        _ if !keys.is_empty() => {
            section.problem("keys", "has an effect with policy = \"cosign\" only");
            None
        }
        Word::Accept => Some(SignatureRule::Accept),
        Word::Reject => Some(SignatureRule::Reject),
    }
}
