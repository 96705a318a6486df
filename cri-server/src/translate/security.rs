//! Confinement profiles of a container: what somebody has written is refused where it cannot be enforced, never dropped.

use caisson_cri_api::v1::{self, security_profile::ProfileType};

use super::Refusals;

const NOT_LOADED: &str = "cannot be enforced: profiles of the host are not loaded into a guest's kernel";

/// Refuses AppArmor profiles of the host's. There is no AppArmor policy in a guest, and the runtime's default one, which keeps containers from
/// their host's kernel interfaces, has nothing to add there: as on a host without AppArmor, RuntimeDefault runs without. The other field is
/// the older one.
pub(super) fn apparmor(
    profile: Option<&v1::SecurityProfile>,
    (old_field, old_value): (&str, &str),
    field: &str,
    refusals: &mut Refusals,
) {
    if let Some(profile) = profile {
        match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::Unconfined | ProfileType::RuntimeDefault) => {}
            Ok(ProfileType::Localhost) => refusals.add(
                field,
                format!("AppArmor profile {:?} {NOT_LOADED}", profile.localhost_ref),
            ),
            Err(_) => refusals.add(field, format!("unknown profile type {}", profile.profile_type)),
        }
    }
    if !matches!(old_value, "" | "unconfined" | "runtime/default") {
        refusals.add(old_field, format!("AppArmor profile {old_value:?} {NOT_LOADED}"));
    }
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

    fn told(profile: Option<ProfileType>, old: &str) -> String {
        let profile = profile.map(|kind| v1::SecurityProfile {
            profile_type: kind as i32,
            localhost_ref: "mine".into(),
        });
        let mut refusals = Refusals::default();
        apparmor(profile.as_ref(), ("s.old", old), "s.new", &mut refusals);
        refusals.to_string()
    }

    #[test]
    fn only_a_profile_that_would_not_be_enforced_is_refused() {
        assert_eq!(told(None, ""), "");
        assert_eq!(told(Some(ProfileType::Unconfined), "unconfined"), "");
        assert_eq!(told(Some(ProfileType::RuntimeDefault), "runtime/default"), "");
        assert_eq!(
            told(Some(ProfileType::Localhost), ""),
            format!("s.new: AppArmor profile \"mine\" {NOT_LOADED}")
        );
        assert_eq!(
            told(None, "localhost/x"),
            format!("s.old: AppArmor profile \"localhost/x\" {NOT_LOADED}")
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
