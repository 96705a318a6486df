//! AppArmor profiles of the host for a container: found, made fit for the guest's kernel, and loaded there before the container is made.
//!
//! What confines, and when, is the agent's work.

use caisson_apparmor::Found;

use crate::{SandboxError, container::Live, guest};

/// Loads the profile that a container names into its guest; the guest's own default one needs nothing of the host.
pub(crate) async fn provide(live: &Live, wanted: &guest::ContainerSpec) -> Result<(), SandboxError> {
    let profile = wanted
        .process
        .as_ref()
        .and_then(|process| process.apparmor.as_ref());
    let Some(name) = profile
        .map(|profile| &profile.name)
        .filter(|name| !name.is_empty())
    else {
        return Ok(());
    };
    let what = || format!("find AppArmor profile {name:?} on the host");
    let unavailable = |source| SandboxError::AppArmor { what: what(), source };
    let policy = match live.profiles.find(name).await.map_err(unavailable)? {
        Found::Loaded(policy) => policy,
        Found::File(file) => {
            let features = live.guest.apparmor_features(live.deadline).await;
            let features = features.map_err(SandboxError::guest(format!(
                "compile AppArmor profile {name:?} for the guest"
            )))?;
            let compiled = live.profiles.compile(name, &file, &features).await;
            compiled.map_err(unavailable)?
        }
    };
    live.guest
        .load_apparmor_policy(policy, live.deadline)
        .await
        .map_err(SandboxError::guest(format!(
            "load AppArmor profile {name:?} into the guest"
        )))
}
