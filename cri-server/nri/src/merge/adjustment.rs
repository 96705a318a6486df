//! The adjustment of a container that is being created.

use super::{
    lists::{Change, show},
    owners::Owners,
    resources,
    updates::Updates,
};
use crate::{
    NriError,
    v1alpha1::{
        Container, ContainerAdjustment, ContainerUpdate, Field, Hooks, LinuxContainerAdjustment, LinuxRdt,
        OwningPlugins,
    },
};

/// A creation with what plugins have asked so far.
#[derive(Debug)]
pub(crate) struct Creation {
    /// As the next plugin is to see it.
    pub(crate) container: Container,
    adjust: ContainerAdjustment,
    owners: Owners,
    updates: Updates,
}

impl Creation {
    pub(crate) fn new(container: Container) -> Self {
        Self {
            container,
            adjust: ContainerAdjustment::default(),
            owners: Owners::default(),
            updates: Updates::default(),
        }
    }

    /// Adds what a plugin asks for.
    pub(crate) fn add(
        &mut self,
        plugin: &str,
        adjust: Option<&ContainerAdjustment>,
        updates: Vec<ContainerUpdate>,
    ) -> Result<(), NriError> {
        if let Some(adjust) = adjust {
            self.add_lists(plugin, adjust)?;
            self.add_args(plugin, &adjust.args)?;
            self.add_hooks(plugin, adjust.hooks.as_ref());
            if let Some(linux) = &adjust.linux {
                self.add_linux(plugin, linux)?;
            }
        }
        if updates
            .iter()
            .any(|update| update.container_id == self.container.id)
        {
            return Err(NriError::SelfUpdate {
                plugin: plugin.to_owned(),
                container: self.container.id.clone(),
            });
        }
        self.updates.add(&mut self.owners, plugin, updates)
    }

    fn add_lists(&mut self, plugin: &str, more: &ContainerAdjustment) -> Result<(), NriError> {
        let Self {
            container,
            adjust,
            owners,
            ..
        } = self;
        let id = container.id.clone();
        Change::new(owners, &id, plugin, Field::Annotations).map(
            &mut adjust.annotations,
            &mut container.annotations,
            &more.annotations,
        )?;
        let touched = Change::new(owners, &id, plugin, Field::Mounts).list(
            &mut adjust.mounts,
            &more.mounts,
            |mount| &mount.destination,
        )?;
        show(&mut container.mounts, &more.mounts, &touched, |mount| {
            &mount.destination
        });
        let touched =
            Change::new(owners, &id, plugin, Field::Env)
                .list(&mut adjust.env, &more.env, |variable| &variable.key)?;
        let words: Vec<_> = more
            .env
            .iter()
            .map(|variable| format!("{}={}", variable.key, variable.value))
            .collect();
        show(&mut container.env, &words, &touched, |word| {
            word.split('=').next().unwrap_or_default()
        });
        let touched = Change::new(owners, &id, plugin, Field::Rlimits).list(
            &mut adjust.rlimits,
            &more.rlimits,
            |limit| &limit.r#type,
        )?;
        show(&mut container.rlimits, &more.rlimits, &touched, |limit| {
            &limit.r#type
        });
        let touched = Change::new(owners, &id, plugin, Field::CdiDevices).list(
            &mut adjust.cdi_devices,
            &more.cdi_devices,
            |device| &device.name,
        )?;
        show(
            &mut container.cdi_devices,
            &more.cdi_devices,
            &touched,
            |device| &device.name,
        );
        Ok(())
    }

    fn add_args(&mut self, plugin: &str, args: &[String]) -> Result<(), NriError> {
        let args = match args {
            [] => return Ok(()),
            [first, rest @ ..] if first.is_empty() => {
                self.owners.clear(&self.container.id, &(Field::Args, None));
                rest
            }
            all => all,
        };
        self.claim(plugin, Field::Args)?;
        self.adjust.args = args.to_vec();
        self.container.args = args.to_vec();
        Ok(())
    }

    /// Hooks of all plugins run, so there is no conflict.
    fn add_hooks(&mut self, plugin: &str, more: Option<&Hooks>) {
        let Some(more) = more.filter(|more| **more != Hooks::default()) else {
            return;
        };
        for hooks in [&mut self.adjust.hooks, &mut self.container.hooks] {
            let hooks = hooks.get_or_insert_default();
            hooks.prestart.extend(more.prestart.clone());
            hooks.create_runtime.extend(more.create_runtime.clone());
            hooks.create_container.extend(more.create_container.clone());
            hooks.start_container.extend(more.start_container.clone());
            hooks.poststart.extend(more.poststart.clone());
            hooks.poststop.extend(more.poststop.clone());
        }
        self.owners.clear(&self.container.id, &(Field::OciHooks, None));
        if let Err(error) = self.claim(plugin, Field::OciHooks) {
            tracing::debug!(%error, "hooks have more than one owner");
        }
    }

    fn add_linux(&mut self, plugin: &str, more: &LinuxContainerAdjustment) -> Result<(), NriError> {
        self.add_linux_lists(plugin, more)?;
        self.add_linux_values(plugin, more)?;
        if let Some(wanted) = &more.resources {
            self.owners
                .claim(&self.container.id, &resources::parts(wanted), plugin)?;
            let asked = self.adjust.linux.get_or_insert_default();
            resources::overlay(asked.resources.get_or_insert_default(), wanted);
            let seen = self.container.linux.get_or_insert_default();
            resources::overlay(seen.resources.get_or_insert_default(), wanted);
        }
        Ok(())
    }

    fn add_linux_lists(&mut self, plugin: &str, more: &LinuxContainerAdjustment) -> Result<(), NriError> {
        let id = self.container.id.clone();
        let owners = &mut self.owners;
        let asked = self.adjust.linux.get_or_insert_default();
        let seen = self.container.linux.get_or_insert_default();
        let touched = Change::new(owners, &id, plugin, Field::Devices).list(
            &mut asked.devices,
            &more.devices,
            |device| &device.path,
        )?;
        show(&mut seen.devices, &more.devices, &touched, |device| &device.path);
        let touched = Change::new(owners, &id, plugin, Field::Namespace).list(
            &mut asked.namespaces,
            &more.namespaces,
            |namespace| &namespace.r#type,
        )?;
        show(&mut seen.namespaces, &more.namespaces, &touched, |namespace| {
            &namespace.r#type
        });
        Change::new(owners, &id, plugin, Field::Sysctl).map(
            &mut asked.sysctl,
            &mut seen.sysctl,
            &more.sysctl,
        )?;
        Change::new(owners, &id, plugin, Field::LinuxNetDevices).map(
            &mut asked.net_devices,
            &mut seen.net_devices,
            &more.net_devices,
        )
    }

    fn add_linux_values(&mut self, plugin: &str, more: &LinuxContainerAdjustment) -> Result<(), NriError> {
        let values = [
            (!more.cgroups_path.is_empty(), Field::CgroupsPath),
            (more.oom_score_adj.is_some(), Field::OomScoreAdj),
            (more.io_priority.is_some(), Field::IoPriority),
            (more.seccomp_policy.is_some(), Field::SeccompPolicy),
            (more.scheduler.is_some(), Field::LinuxSched),
            (more.memory_policy.is_some(), Field::MemoryPolicy),
        ];
        for (_, field) in values.iter().filter(|(set, _)| *set) {
            self.claim(plugin, *field)?;
        }
        if let Some(rdt) = &more.rdt {
            self.add_rdt(plugin, rdt)?;
        }
        let asked = self.adjust.linux.get_or_insert_default();
        let seen = self.container.linux.get_or_insert_default();
        if !more.cgroups_path.is_empty() {
            asked.cgroups_path.clone_from(&more.cgroups_path);
            seen.cgroups_path.clone_from(&more.cgroups_path);
        }
        if more.oom_score_adj.is_some() {
            asked.oom_score_adj.clone_from(&more.oom_score_adj);
            seen.oom_score_adj.clone_from(&more.oom_score_adj);
        }
        if more.io_priority.is_some() {
            asked.io_priority.clone_from(&more.io_priority);
            seen.io_priority.clone_from(&more.io_priority);
        }
        if more.seccomp_policy.is_some() {
            asked.seccomp_policy.clone_from(&more.seccomp_policy);
            seen.seccomp_policy.clone_from(&more.seccomp_policy);
        }
        if more.scheduler.is_some() {
            asked.scheduler.clone_from(&more.scheduler);
            seen.scheduler.clone_from(&more.scheduler);
        }
        if more.memory_policy.is_some() {
            asked.memory_policy.clone_from(&more.memory_policy);
        }
        Ok(())
    }

    fn add_rdt(&mut self, plugin: &str, more: &LinuxRdt) -> Result<(), NriError> {
        let fields = [Field::RdtClosId, Field::RdtSchemata, Field::RdtEnableMonitoring];
        if more.remove {
            for field in fields {
                self.owners.clear(&self.container.id, &(field, None));
            }
        }
        let set = [
            more.clos_id.is_some(),
            more.schemata.is_some(),
            more.enable_monitoring.is_some(),
        ];
        for (field, _) in fields.into_iter().zip(set).filter(|(_, set)| *set) {
            self.claim(plugin, field)?;
        }
        for place in [
            &mut self.adjust.linux.get_or_insert_default().rdt,
            &mut self.container.linux.get_or_insert_default().rdt,
        ] {
            if more.remove {
                *place = None;
            }
            let rdt = place.get_or_insert_default();
            rdt.remove |= more.remove;
            if more.clos_id.is_some() {
                rdt.clos_id.clone_from(&more.clos_id);
            }
            if more.schemata.is_some() {
                rdt.schemata.clone_from(&more.schemata);
            }
            if more.enable_monitoring.is_some() {
                rdt.enable_monitoring.clone_from(&more.enable_monitoring);
            }
        }
        Ok(())
    }

    fn claim(&mut self, plugin: &str, field: Field) -> Result<(), NriError> {
        self.owners.claim(&self.container.id, &[(field, None)], plugin)
    }

    /// What has been asked so far, for validation.
    pub(crate) fn asked(&self) -> (&ContainerAdjustment, &[ContainerUpdate], OwningPlugins) {
        (&self.adjust, self.updates.list(), self.owners.message())
    }

    /// What has been asked.
    pub(crate) fn finish(self) -> (ContainerAdjustment, Vec<ContainerUpdate>) {
        (self.adjust, self.updates.into_list())
    }
}

#[cfg(test)]
mod tests;
