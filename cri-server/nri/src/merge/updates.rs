//! Updates of containers that exist.

use super::{owners::Owners, resources};
use crate::{
    NriError,
    v1alpha1::{ContainerUpdate, LinuxContainerUpdate, LinuxResources},
};

/// What plugins want to be updated, each container once.
#[derive(Debug, Default)]
pub(super) struct Updates {
    list: Vec<ContainerUpdate>,
}

impl Updates {
    /// Adds a plugin's wishes.
    pub(super) fn add(
        &mut self,
        owners: &mut Owners,
        plugin: &str,
        updates: Vec<ContainerUpdate>,
    ) -> Result<(), NriError> {
        for update in updates {
            let wanted = update.linux.and_then(|linux| linux.resources).unwrap_or_default();
            let id = update.container_id;
            match owners.claim(&id, &resources::parts(&wanted), plugin) {
                Ok(()) => {}
                Err(error) if update.ignore_failure => {
                    tracing::debug!(%error, "update of an NRI plugin left out, as it allows");
                    continue;
                }
                Err(error) => return Err(error),
            }
            let known = self.list.iter().position(|known| known.container_id == id);
            let place = known.unwrap_or_else(|| {
                self.list.push(ContainerUpdate {
                    linux: Some(LinuxContainerUpdate {
                        resources: Some(LinuxResources::default()),
                    }),
                    container_id: id,
                    ignore_failure: true,
                });
                self.list.len() - 1
            });
            if let Some(merged) = self.list.get_mut(place) {
                merged.ignore_failure &= update.ignore_failure;
                let into = merged
                    .linux
                    .get_or_insert_default()
                    .resources
                    .get_or_insert_default();
                resources::overlay(into, &wanted);
            }
        }
        Ok(())
    }

    pub(super) fn list(&self) -> &[ContainerUpdate] {
        &self.list
    }

    pub(super) fn into_list(self) -> Vec<ContainerUpdate> {
        self.list
    }
}

/// The update that a client asks for, with what plugins make of it.
#[derive(Debug)]
pub(crate) struct Update {
    container: String,
    /// As the next plugin is to see it.
    pub(crate) wanted: LinuxResources,
    changed: bool,
    owners: Owners,
    others: Updates,
}

impl Update {
    pub(crate) fn new(container: &str, wanted: LinuxResources) -> Self {
        Self {
            container: container.to_owned(),
            wanted,
            changed: false,
            owners: Owners::default(),
            others: Updates::default(),
        }
    }

    pub(crate) fn add(&mut self, plugin: &str, updates: Vec<ContainerUpdate>) -> Result<(), NriError> {
        let (own, others): (Vec<_>, Vec<_>) = updates
            .into_iter()
            .partition(|update| update.container_id == self.container);
        for update in own {
            let wanted = update.linux.and_then(|linux| linux.resources).unwrap_or_default();
            match self
                .owners
                .claim(&self.container, &resources::parts(&wanted), plugin)
            {
                Ok(()) => {
                    resources::overlay(&mut self.wanted, &wanted);
                    self.changed = true;
                }
                Err(error) if update.ignore_failure => {
                    tracing::debug!(%error, "update of an NRI plugin left out, as it allows");
                }
                Err(error) => return Err(error),
            }
        }
        self.others.add(&mut self.owners, plugin, others)
    }

    /// What the container is to have, when a plugin has changed it, and updates of others.
    pub(crate) fn finish(self) -> (Option<LinuxResources>, Vec<ContainerUpdate>) {
        (self.changed.then_some(self.wanted), self.others.into_list())
    }
}
