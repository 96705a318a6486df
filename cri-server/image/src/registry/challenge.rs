//! What a registry wants to see: parsing `WWW-Authenticate` (RFC 9110, section 11.6.1).

/// One challenge.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with every request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// Address that gives tokens.
        realm: String,
        /// For which service, when the registry says so.
        service: Option<String>,
    },
}

/// The strongest challenge understood in the values of the header: a token before a password.
pub(super) fn strongest<'a>(values: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for value in values {
        for (scheme, parameters) in split(value) {
            let parameter = |name: &str| {
                parameters
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = parameter("realm") {
                    return Some(Challenge::Bearer {
                        realm,
                        service: parameter("service"),
                    });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

type Parameters = Vec<(String, String)>;

/// `Scheme a=b, c="d", Other e=f` into schemes with their parameters.
fn split(value: &str) -> Vec<(String, Parameters)> {
    let mut challenges: Vec<(String, Parameters)> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return challenges;
        }
        match (after.strip_prefix('='), challenges.last_mut()) {
            (Some(after), Some((_, parameters))) => {
                let (text, after) = parameter_value(after);
                parameters.push((word.to_owned(), text));
                rest = after;
            }
            (Some(_), None) => return challenges,
            (None, _) => {
                challenges.push((word.to_owned(), Vec::new()));
                rest = after;
            }
        }
    }
}

fn parameter_value(input: &str) -> (String, &str) {
    let Some(quoted) = input.strip_prefix('"') else {
        let end = input.find([',', ' ', '\t']).unwrap_or(input.len());
        let (value, rest) = input.split_at(end);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
        })
    }

    #[test]
    fn a_token_is_preferred_to_a_password() {
        let values = ["Basic realm=\"x\", Bearer realm=\"https://a/t?x=1,2\",service=\"s\",scope=\"p:q\""];
        assert_eq!(
            strongest(values.into_iter()),
            bearer("https://a/t?x=1,2", Some("s"))
        );
        assert_eq!(
            strongest(["Basic realm=x", "bearer Realm=https://b/"].into_iter()),
            bearer("https://b/", None)
        );
        assert_eq!(
            strongest(["Basic realm=\"Registry\""].into_iter()),
            Some(Challenge::Basic)
        );
    }

    #[test]
    fn quoting_is_undone() {
        let value = r#"Bearer realm="https://a/\"b\\c""#;
        assert_eq!(strongest([value].into_iter()), bearer(r#"https://a/"b\c"#, None));
    }

    #[test]
    fn garbage_is_no_challenge() {
        for value in [
            "",
            ",,",
            "=",
            "Bearer",
            "Bearer realm",
            "realm=\"x\"",
            "Negotiate abc==",
            "Bearer service=\"",
            "\"\\",
        ] {
            assert_eq!(strongest([value].into_iter()), None, "{value}");
        }
    }
}
