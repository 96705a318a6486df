//! Lists and maps whose entries have names.

use std::collections::{BTreeMap, BTreeSet};

use super::{owners::Owners, removal};
use crate::{NriError, v1alpha1::Field};

/// Whose change of which field it is.
pub(super) struct Change<'a> {
    owners: &'a mut Owners,
    container: &'a str,
    field: Field,
    plugin: &'a str,
}

impl<'a> Change<'a> {
    pub(super) fn new(owners: &'a mut Owners, container: &'a str, plugin: &'a str, field: Field) -> Self {
        Self {
            owners,
            container,
            field,
            plugin,
        }
    }

    fn take_away(&mut self, name: &str) {
        self.owners
            .clear(self.container, &(self.field, Some(name.to_owned())));
    }

    fn claim(&mut self, name: &str) -> Result<(), NriError> {
        self.owners.claim(
            self.container,
            &[(self.field, Some(name.to_owned()))],
            self.plugin,
        )
    }

    /// Adds what a plugin asks to what was asked before: removals first, then what is set. Answers the names that are not any more what
    /// they were.
    pub(super) fn list<T: Clone>(
        &mut self,
        asked: &mut Vec<T>,
        more: &[T],
        name: impl Fn(&T) -> &str,
    ) -> Result<BTreeSet<String>, NriError> {
        let mut touched = BTreeSet::new();
        for item in more {
            if let Some(gone) = removal(name(item)) {
                self.take_away(gone);
                asked.retain(|known| name(known) != gone && removal(name(known)) != Some(gone));
                asked.push(item.clone());
                touched.insert(gone.to_owned());
            }
        }
        for item in more.iter().filter(|item| removal(name(item)).is_none()) {
            self.claim(name(item))?;
            asked.retain(|known| name(known) != name(item));
            asked.push(item.clone());
            touched.insert(name(item).to_owned());
        }
        Ok(touched)
    }

    /// The same for a map; `seen` is how the container looks to the next plugin.
    pub(super) fn map<T: Clone>(
        &mut self,
        asked: &mut BTreeMap<String, T>,
        seen: &mut BTreeMap<String, T>,
        more: &BTreeMap<String, T>,
    ) -> Result<(), NriError> {
        for (marked, value) in more {
            if let Some(gone) = removal(marked) {
                self.take_away(gone);
                asked.remove(gone);
                seen.remove(gone);
                asked.insert(marked.clone(), value.clone());
            }
        }
        for (name, value) in more.iter().filter(|(name, _)| removal(name).is_none()) {
            self.claim(name)?;
            asked.insert(name.clone(), value.clone());
            seen.insert(name.clone(), value.clone());
        }
        Ok(())
    }
}

/// Brings a list of the container to what the next plugin is to see.
pub(super) fn show<T: Clone>(
    seen: &mut Vec<T>,
    more: &[T],
    touched: &BTreeSet<String>,
    name: impl Fn(&T) -> &str,
) {
    seen.retain(|known| !touched.contains(name(known)));
    seen.extend(more.iter().filter(|item| removal(name(item)).is_none()).cloned());
}
