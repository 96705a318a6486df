//! What several plugins ask for, as one.
//!
//! Plugins are asked one after the other, and each sees the container as those before it want it. What one has changed no other may
//! change, unless it first takes the change away by a name with a `-` before it (arguments: by an empty first word). Nothing is dropped
//! here: what a plugin asks for is in the result, or the call fails.

mod adjustment;
mod lists;
mod owners;
mod resources;
mod updates;

pub(crate) use adjustment::Creation;
pub(crate) use updates::Update;

/// The name that is to be taken away, when it is marked so.
#[must_use]
pub fn removal(name: &str) -> Option<&str> {
    name.strip_prefix('-')
}
