//! `AuthConfig` of a pull to the registry client's credentials.

use base64::Engine;
use caisson_cri_api::v1;
use caisson_image::Credentials;

use super::Refusals;

/// The registry that a name without one belongs to.
const DEFAULT_REGISTRY: &str = "docker.io";

/// Credentials for a pull of `reference`. Those that name another registry are not sent to this one.
pub fn credentials(auth: Option<&v1::AuthConfig>, reference: &str) -> Result<Credentials, Refusals> {
    let Some(auth) = auth else {
        return Ok(Credentials::Anonymous);
    };
    if !auth.server_address.is_empty() && server(&auth.server_address) != registry(reference) {
        return Ok(Credentials::Anonymous);
    }
    if !auth.identity_token.is_empty() {
        return Ok(Credentials::IdentityToken(auth.identity_token.clone()));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Credentials::Bearer(auth.registry_token.clone()));
    }
    if !auth.username.is_empty() {
        return Ok(Credentials::Basic {
            username: auth.username.clone(),
            password: auth.password.clone(),
        });
    }
    if auth.auth.is_empty() {
        return Ok(Credentials::Anonymous);
    }
    decode(&auth.auth).ok_or_else(|| Refusals::one("auth.auth", "is not base64 of user:password"))
}

fn decode(text: &str) -> Option<Credentials> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (username, password) = text.trim_end_matches('\0').split_once(':')?;
    Some(Credentials::Basic {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

/// `host:port` of an image reference.
fn registry(reference: &str) -> String {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => canonical(host),
        _ => DEFAULT_REGISTRY.to_owned(),
    }
}

/// `host:port` of a server address, which may be a URL.
fn server(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    canonical(rest.split('/').next().unwrap_or_default())
}

/// Docker Hub goes by several names.
fn canonical(host: &str) -> String {
    match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY.to_owned(),
        host => host.to_ascii_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Credentials {
        Credentials::Basic {
            username: username.into(),
            password: password.into(),
        }
    }

    fn got(auth: v1::AuthConfig, reference: &str) -> Credentials {
        credentials(Some(&auth), reference).unwrap_or_else(|refusals| panic!("{refusals}"))
    }

    #[test]
    fn each_way_to_say_who_one_is_is_understood() {
        let r = "r.example:5000/a";
        assert!(credentials(None, r) == Ok(Credentials::Anonymous));
        assert!(got(v1::AuthConfig::default(), r) == Credentials::Anonymous);
        let named = v1::AuthConfig {
            username: "u".into(),
            password: "p:q".into(),
            ..Default::default()
        };
        assert!(got(named, r) == basic("u", "p:q"));
        let encoded = v1::AuthConfig {
            auth: "dTpwOnE=".into(),
            ..Default::default()
        };
        assert!(got(encoded, r) == basic("u", "p:q"));
        let token = v1::AuthConfig {
            registry_token: "t".into(),
            ..Default::default()
        };
        assert!(got(token, r) == Credentials::Bearer("t".into()));
        let identity = v1::AuthConfig {
            identity_token: "i".into(),
            username: "ignored".into(),
            ..Default::default()
        };
        assert!(got(identity, r) == Credentials::IdentityToken("i".into()));
        let garbage = v1::AuthConfig {
            auth: "%%".into(),
            ..Default::default()
        };
        assert!(credentials(Some(&garbage), r).is_err());
    }

    #[test]
    fn credentials_never_go_to_another_registry() {
        let for_server = |server: &str| v1::AuthConfig {
            username: "u".into(),
            server_address: server.into(),
            ..Default::default()
        };
        for (server, reference, sent) in [
            ("https://r.example:5000/v2/", "r.example:5000/a:1", true),
            ("r.example", "r.example:5000/a", false),
            ("https://index.docker.io/v1/", "busybox", true),
            ("docker.io", "library/busybox:1", true),
            ("docker.io", "localhost/x", false),
        ] {
            assert!(
                (got(for_server(server), reference) == basic("u", "")) == sent,
                "{server} {reference}"
            );
        }
    }
}
