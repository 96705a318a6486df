//! Who changed what.

use std::collections::BTreeMap;

use crate::{
    NriError,
    v1alpha1::{CompoundFieldOwners, Field, FieldOwners, OwningPlugins},
};

/// A part of a container: a field, and which entry of it where it has entries.
pub(crate) type Part = (Field, Option<String>);

/// By container and part.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    owners: BTreeMap<String, BTreeMap<(i32, Option<String>), String>>,
}

impl Owners {
    /// Makes `plugin` the owner of all these parts, or of none.
    pub(crate) fn claim(&mut self, container: &str, parts: &[Part], plugin: &str) -> Result<(), NriError> {
        let owned = self.owners.entry(container.to_owned()).or_default();
        for (field, entry) in parts {
            if let Some(first) = owned
                .get(&(i32::from(*field), entry.clone()))
                .filter(|owner| *owner != plugin)
            {
                return Err(NriError::Conflict {
                    first: first.clone(),
                    second: plugin.to_owned(),
                    what: words(*field, entry.as_deref()),
                    container: container.to_owned(),
                });
            }
        }
        for (field, entry) in parts {
            owned.insert((i32::from(*field), entry.clone()), plugin.to_owned());
        }
        Ok(())
    }

    /// Somebody has taken the change away.
    pub(crate) fn clear(&mut self, container: &str, part: &Part) {
        if let Some(owned) = self.owners.get_mut(container) {
            owned.remove(&(i32::from(part.0), part.1.clone()));
        }
    }

    /// As validating plugins are told.
    pub(crate) fn message(&self) -> OwningPlugins {
        let mut message = OwningPlugins::default();
        for (container, owned) in &self.owners {
            let mut fields = FieldOwners::default();
            for ((field, entry), plugin) in owned {
                match entry {
                    None => {
                        fields.simple.insert(*field, plugin.clone());
                    }
                    Some(entry) => {
                        let compound: &mut CompoundFieldOwners = fields.compound.entry(*field).or_default();
                        compound.owners.insert(entry.clone(), plugin.clone());
                    }
                }
            }
            message.owners.insert(container.clone(), fields);
        }
        message
    }
}

fn words(field: Field, entry: Option<&str>) -> String {
    let field = field.as_str_name().to_lowercase().replace('_', " ");
    match entry {
        Some(entry) => format!("{field} {entry:?}"),
        None => field,
    }
}
