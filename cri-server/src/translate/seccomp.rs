//! Seccomp: which profile a container has, read and compiled here, so that the guest has nothing to decide.

use std::{io::Read, os::unix::fs::OpenOptionsExt, path::Path};

use caisson_cri_api::v1::{self, security_profile::ProfileType};
use caisson_sandbox::guest;
use caisson_seccomp::{MAX_PROFILE_BYTES, Program, compile, default_profile};

use super::Refusals;
use crate::status::chain;

/// Profile that a request asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted<'a> {
    Unconfined,
    RuntimeDefault,
    /// A file of the host's.
    Localhost(&'a str),
}

/// The filter of a container with `bounding` capabilities; none when it is unconfined, privileged, or says nothing. A profile that
/// cannot be used is a refusal: nothing runs with less than it was promised.
pub(super) fn filter(
    context: &v1::LinuxContainerSecurityContext,
    bounding: &[String],
    refusals: &mut Refusals,
) -> Option<guest::SeccompFilter> {
    const FIELD: &str = "config.linux.security_context.seccomp";
    let wanted = match wanted(context) {
        Ok(wanted) => wanted,
        Err((field, reason)) => {
            refusals.add(format!("config.linux.security_context.{field}"), reason);
            return None;
        }
    };
    let compiled = match wanted {
        // As in every other runtime, a privileged container is free of profiles.
        _ if context.privileged => return None,
        Wanted::Unconfined => return None,
        Wanted::RuntimeDefault => default_profile(bounding).map_err(|error| chain(&error)),
        Wanted::Localhost(path) => localhost(path, bounding),
    };
    match compiled {
        Ok(program) => Some(guest::SeccompFilter {
            program: program.to_bytes(),
            flags: program.flags,
        }),
        Err(reason) => {
            refusals.add(FIELD, reason);
            None
        }
    }
}

/// What the request says, in its newer field or in the older one.
fn wanted(context: &v1::LinuxContainerSecurityContext) -> Result<Wanted<'_>, (&'static str, String)> {
    let Some(profile) = &context.seccomp else {
        let path = deprecated_path(context);
        return match path {
            "" | "unconfined" => Ok(Wanted::Unconfined),
            "runtime/default" | "docker/default" => Ok(Wanted::RuntimeDefault),
            other => match other.strip_prefix("localhost/") {
                Some(path) => Ok(Wanted::Localhost(path)),
                None => Err(("seccomp_profile_path", format!("unknown profile {other:?}"))),
            },
        };
    };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Unconfined) => Ok(Wanted::Unconfined),
        Ok(ProfileType::RuntimeDefault) => Ok(Wanted::RuntimeDefault),
        Ok(ProfileType::Localhost) => Ok(Wanted::Localhost(&profile.localhost_ref)),
        Err(_) => Err((
            "seccomp",
            format!("unknown profile type {}", profile.profile_type),
        )),
    }
}

#[expect(deprecated, reason = "older kubelets and crictl still fill it")]
fn deprecated_path(context: &v1::LinuxContainerSecurityContext) -> &str {
    &context.seccomp_profile_path
}

fn localhost(path: &str, bounding: &[String]) -> Result<Program, String> {
    if !path.starts_with('/') {
        return Err(format!("localhost_ref {path:?} is not an absolute path"));
    }
    let text = read(Path::new(path)).map_err(|error| format!("cannot read the profile {path:?}: {error}"))?;
    compile(&text, bounding)
        .map_err(|error| format!("the profile {path:?} cannot be used: {}", chain(&error)))
}

/// A file of the node's administrator; neither a fifo nor an endless device is waited for.
fn read(path: &Path) -> std::io::Result<String> {
    let file = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is not a file"));
    }
    let mut text = String::new();
    file.take(MAX_PROFILE_BYTES + 1).read_to_string(&mut text)?;
    if u64::try_from(text.len()).is_ok_and(|length| length > MAX_PROFILE_BYTES) {
        return Err(std::io::Error::other(format!(
            "it is over {MAX_PROFILE_BYTES} bytes"
        )));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(kind: ProfileType, path: &str) -> v1::LinuxContainerSecurityContext {
        v1::LinuxContainerSecurityContext {
            seccomp: Some(v1::SecurityProfile {
                profile_type: kind as i32,
                localhost_ref: path.into(),
            }),
            ..Default::default()
        }
    }

    fn made(context: &v1::LinuxContainerSecurityContext) -> Result<Option<guest::SeccompFilter>, String> {
        let mut refusals = Refusals::default();
        let filter = filter(context, &["CAP_CHOWN".into()], &mut refusals);
        refusals.settle(filter).map_err(|refusals| refusals.to_string())
    }

    #[test]
    fn only_what_asks_for_a_profile_has_one_and_privileged_has_none() {
        let nothing = v1::LinuxContainerSecurityContext::default();
        assert_eq!(made(&nothing), Ok(None));
        assert_eq!(made(&context(ProfileType::Unconfined, "")), Ok(None));
        let default = context(ProfileType::RuntimeDefault, "");
        let filter = made(&default).unwrap().unwrap();
        assert!(filter.program.len() > 800 && filter.program.len().is_multiple_of(8));
        let privileged = v1::LinuxContainerSecurityContext {
            privileged: true,
            ..default
        };
        assert_eq!(made(&privileged), Ok(None));
    }

    #[test]
    fn the_older_field_is_understood_where_the_newer_is_absent() {
        let old = |text: &str| {
            #[expect(deprecated, reason = "the field under test")]
            let context = v1::LinuxContainerSecurityContext {
                seccomp_profile_path: text.into(),
                ..Default::default()
            };
            made(&context)
        };
        assert_eq!(old("unconfined"), Ok(None));
        assert!(old("runtime/default").unwrap().is_some());
        assert!(
            old("localhost//nowhere.json")
                .unwrap_err()
                .contains("/nowhere.json")
        );
        assert_eq!(
            old("x").unwrap_err(),
            "config.linux.security_context.seccomp_profile_path: unknown profile \"x\""
        );
    }

    #[test]
    fn a_profile_that_cannot_be_used_is_refused_with_its_path_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        let asked = |text: &str| {
            std::fs::write(&path, text).unwrap();
            made(&context(ProfileType::Localhost, path.to_str().unwrap()))
        };
        assert!(asked(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap().is_some());
        for (text, words) in [
            ("{", "malformed: EOF while parsing"),
            (
                r#"{"defaultAction":"SCMP_ACT_X"}"#,
                "unknown action \"SCMP_ACT_X\"",
            ),
            (&"x".repeat(2 << 20), "it is over 1048576 bytes"),
        ] {
            let error = asked(text).unwrap_err();
            assert!(error.contains(words) && error.contains("p.json"), "{error}");
        }
        for path in ["", "relative.json", "/dev/zero", "/nowhere"] {
            assert!(made(&context(ProfileType::Localhost, path)).is_err(), "{path}");
        }
    }
}
