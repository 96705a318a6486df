//! Confinement profiles of a container: what somebody has written is refused where it cannot be enforced, never dropped.

use caisson_cri_api::v1::{self, security_profile::ProfileType};
use caisson_sandbox::guest;

use super::Refusals;

/// What the field of a profile on the node begins with, in the older field always.
const LOCALHOST: &str = "localhost/";

/// Profile that a request asks for.
enum Wanted<'a> {
    /// Nothing is said.
    Unset,
    Unconfined,
    RuntimeDefault,
    /// One of the node's, by its name.
    Localhost(&'a str),
}

/// The AppArmor profile of a container. One that names none gets the default profile where the guest has it, as in other runtimes; one
/// that asks for a profile gets it or does not run. A privileged container is free of the default one.
pub(super) fn apparmor(
    context: &v1::LinuxContainerSecurityContext,
    refusals: &mut Refusals,
) -> Option<guest::ApparmorProfile> {
    let profile = |name: &str, optional| {
        Some(guest::ApparmorProfile {
            name: name.to_owned(),
            optional,
        })
    };
    match wanted(context) {
        Ok(Wanted::Unset) if !context.privileged => profile("", true),
        Ok(Wanted::RuntimeDefault) if !context.privileged => profile("", false),
        Ok(Wanted::Unset | Wanted::RuntimeDefault | Wanted::Unconfined) => None,
        Ok(Wanted::Localhost(name)) if !name.is_empty() => profile(name, false),
        Ok(Wanted::Localhost(_)) => {
            refusals.add(
                "config.linux.security_context.apparmor",
                "AppArmor profile of the node without a name",
            );
            None
        }
        Err((field, reason)) => {
            refusals.add(format!("config.linux.security_context.{field}"), reason);
            None
        }
    }
}

/// What the request says, in its newer field or in the older one.
fn wanted(context: &v1::LinuxContainerSecurityContext) -> Result<Wanted<'_>, (&'static str, String)> {
    let Some(profile) = &context.apparmor else {
        return match deprecated_profile(context) {
            "" => Ok(Wanted::Unset),
            "unconfined" => Ok(Wanted::Unconfined),
            "runtime/default" => Ok(Wanted::RuntimeDefault),
            other => match other.strip_prefix(LOCALHOST) {
                Some(name) => Ok(Wanted::Localhost(name)),
                None => Err(("apparmor_profile", format!("unknown AppArmor profile {other:?}"))),
            },
        };
    };
    let reference = profile.localhost_ref.as_str();
    let kind = match ProfileType::try_from(profile.profile_type) {
        // Some callers keep the older field's prefix.
        Ok(ProfileType::Localhost) => {
            return Ok(Wanted::Localhost(
                reference.strip_prefix(LOCALHOST).unwrap_or(reference),
            ));
        }
        Ok(ProfileType::Unconfined) => Wanted::Unconfined,
        Ok(ProfileType::RuntimeDefault) => Wanted::RuntimeDefault,
        Err(_) => {
            return Err((
                "apparmor",
                format!("unknown profile type {}", profile.profile_type),
            ));
        }
    };
    if reference.is_empty() {
        Ok(kind)
    } else {
        let reason = format!("localhost_ref {reference:?} has a meaning with profile type Localhost only");
        Err(("apparmor", reason))
    }
}

#[expect(deprecated, reason = "older kubelets and crictl still fill it")]
fn deprecated_profile(context: &v1::LinuxContainerSecurityContext) -> &str {
    &context.apparmor_profile
}

/// Refuses any SELinux label.
pub(super) fn selinux(options: Option<&v1::SeLinuxOption>, field: &str, refusals: &mut Refusals) {
    if let Some(options) = options {
        let label = [&options.user, &options.role, &options.r#type, &options.level];
        if label.iter().any(|part| !part.is_empty()) {
            refusals.add(field, "SELinux labels are not supported inside a VM");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(profile: Option<(ProfileType, &str)>, old: &str) -> v1::LinuxContainerSecurityContext {
        #[expect(deprecated, reason = "the field under test")]
        v1::LinuxContainerSecurityContext {
            apparmor: profile.map(|(kind, name)| v1::SecurityProfile {
                profile_type: kind as i32,
                localhost_ref: name.into(),
            }),
            apparmor_profile: old.into(),
            ..Default::default()
        }
    }

    /// Name, and whether it is fine to go without.
    fn made(context: &v1::LinuxContainerSecurityContext) -> Result<Option<(String, bool)>, String> {
        let mut refusals = Refusals::default();
        let profile = apparmor(context, &mut refusals);
        let profile = profile.map(|profile| (profile.name, profile.optional));
        refusals.settle(profile).map_err(|refusals| refusals.to_string())
    }

    fn named(name: &str, optional: bool) -> Result<Option<(String, bool)>, String> {
        Ok(Some((name.to_owned(), optional)))
    }

    #[test]
    fn a_container_has_the_profile_that_it_names_or_else_the_default_one_if_there_is_one() {
        use ProfileType::{Localhost, RuntimeDefault, Unconfined};
        let new = |kind, name| made(&context(Some((kind, name)), ""));
        assert_eq!(made(&context(None, "")), named("", true));
        assert_eq!(new(RuntimeDefault, ""), named("", false));
        assert_eq!(new(Unconfined, ""), Ok(None));
        assert_eq!(new(Localhost, "mine"), named("mine", false));
        assert_eq!(new(Localhost, "localhost/mine"), named("mine", false));
        assert_eq!(
            new(Localhost, ""),
            Err("config.linux.security_context.apparmor: AppArmor profile of the node without a name".into())
        );
        assert!(new(RuntimeDefault, "mine").unwrap_err().contains("\"mine\""));
    }

    #[test]
    fn the_older_field_is_understood_where_the_newer_is_absent() {
        let old = |text: &str| made(&context(None, text));
        assert_eq!(old("unconfined"), Ok(None));
        assert_eq!(old("runtime/default"), named("", false));
        assert_eq!(old("localhost/a/b"), named("a/b", false));
        assert_eq!(
            old("mine"),
            Err("config.linux.security_context.apparmor_profile: unknown AppArmor profile \"mine\"".into())
        );
        assert!(old("localhost/").is_err());
        let both = context(Some((ProfileType::Localhost, "new")), "localhost/old");
        assert_eq!(made(&both), named("new", false));
    }

    #[test]
    fn a_privileged_container_is_confined_by_a_profile_of_the_node_only() {
        let privileged = |context| {
            made(&v1::LinuxContainerSecurityContext {
                privileged: true,
                ..context
            })
        };
        assert_eq!(privileged(context(None, "")), Ok(None));
        assert_eq!(
            privileged(context(Some((ProfileType::RuntimeDefault, "")), "")),
            Ok(None)
        );
        assert_eq!(
            privileged(context(Some((ProfileType::Localhost, "mine")), "")),
            named("mine", false)
        );
    }

    #[test]
    fn an_empty_selinux_label_is_no_label() {
        let mut refusals = Refusals::default();
        selinux(Some(&v1::SeLinuxOption::default()), "l", &mut refusals);
        refusals.settle(()).unwrap();
        let mut refusals = Refusals::default();
        let label = v1::SeLinuxOption {
            level: "s0".into(),
            ..Default::default()
        };
        selinux(Some(&label), "l", &mut refusals);
        assert_eq!(
            refusals.to_string(),
            "l: SELinux labels are not supported inside a VM"
        );
    }
}
