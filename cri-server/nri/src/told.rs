//! What plugins have been told of each pod and container, so that each end is told once, whoever notices it first.

use std::collections::HashMap;

/// What was told last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    Begun,
    Stopped,
}

/// By id; what was removed is forgotten.
#[derive(Debug, Default)]
pub(crate) struct Told {
    last: HashMap<String, Last>,
}

impl Told {
    /// It runs or has been created.
    pub(crate) fn begun(&mut self, id: &str) {
        self.last.insert(id.to_owned(), Last::Begun);
    }

    /// What was there before plugins were told anything; `ended`: it has stopped already.
    pub(crate) fn learn(&mut self, id: &str, ended: bool) {
        let last = if ended { Last::Stopped } else { Last::Begun };
        self.last.entry(id.to_owned()).or_insert(last);
    }

    /// Whether its stop is still to be told; it counts as told from now on.
    pub(crate) fn stop(&mut self, id: &str) -> bool {
        match self.last.get_mut(id) {
            Some(last @ Last::Begun) => {
                *last = Last::Stopped;
                true
            }
            _ => false,
        }
    }

    /// Whether its removal is still to be told; it is forgotten from now on.
    pub(crate) fn remove(&mut self, id: &str) -> bool {
        self.last.remove(id).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_is_told_once_and_only_of_what_was_told_to_be_there() {
        let mut told = Told::default();
        assert!(!told.stop("a") && !told.remove("a"));
        told.begun("a");
        assert!(told.stop("a"));
        assert!(!told.stop("a"));
        assert!(told.remove("a"));
        assert!(!told.remove("a") && !told.stop("a"));
        told.learn("b", true);
        assert!(!told.stop("b") && told.remove("b"));
        told.begun("c");
        told.stop("c");
        told.learn("c", false);
        assert!(!told.stop("c"), "what was told wins over what is listed");
    }
}
