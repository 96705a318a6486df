//! What is wrong with a request, field by field, so that one answer names everything.

use std::fmt;

/// One field that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Path of the field in the request, e.g. `config.linux.sysctls`.
    pub field: String,
    /// Why, in a few words.
    pub reason: String,
}

/// Everything that is wrong with a request; empty when nothing is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refusals(Vec<Refusal>);

impl Refusals {
    /// A single refusal.
    #[must_use]
    pub fn one(field: impl Into<String>, reason: impl Into<String>) -> Self {
        let mut refusals = Self::default();
        refusals.add(field, reason);
        refusals
    }

    /// Notes one more.
    pub fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Refusal {
            field: field.into(),
            reason: reason.into(),
        });
    }

    /// Notes one more when `wrong` holds.
    pub fn add_if(&mut self, wrong: bool, field: &str, reason: &str) {
        if wrong {
            self.add(field, reason);
        }
    }

    /// The value, when nothing was refused.
    pub fn settle<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }

    /// All of them, in the order of the request.
    #[must_use]
    pub fn list(&self) -> &[Refusal] {
        &self.0
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Refusal { field, reason }) in self.0.iter().enumerate() {
            let between = if index == 0 { "" } else { "; " };
            write!(f, "{between}{field}: {reason}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusals {}
