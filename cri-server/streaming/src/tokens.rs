//! One-time tokens: what the CRI call answers in its URL, and what the client's connection redeems.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::port::{Attach, Exec};

/// How long a token is good for.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(60);

/// Most tokens that wait to be redeemed.
pub const MAX_TOKENS: usize = 1000;

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// A command in a container.
    Exec(Exec),
    /// A container's own streams.
    Attach(Attach),
    /// Connections into this pod.
    PortForward(String),
}

impl Wish {
    /// First part of the URL's path.
    pub(crate) fn method(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward(_) => "portforward",
        }
    }
}

/// [`MAX_TOKENS`] wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_TOKENS} streaming requests wait for their clients already")]
pub struct TooManyTokens;

/// The tokens that wait.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tokens {
    waiting: Arc<Mutex<HashMap<String, (Wish, Instant)>>>,
}

impl Tokens {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Wish, Instant)>> {
        // Each change is one insertion or removal.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token that nobody can guess. Expired ones make room.
    pub(crate) fn issue(&self, wish: Wish, now: Instant) -> Result<String, TooManyTokens> {
        let mut waiting = self.lock();
        if waiting.len() >= MAX_TOKENS {
            waiting.retain(|_, (_, issued)| is_fresh(*issued, now));
        }
        if waiting.len() >= MAX_TOKENS {
            return Err(TooManyTokens);
        }
        let token = uuid::Uuid::new_v4().simple().to_string();
        waiting.insert(token.clone(), (wish, now));
        Ok(token)
    }

    /// What the token stands for; once.
    pub(crate) fn redeem(&self, method: &str, token: &str, now: Instant) -> Option<Wish> {
        let (wish, issued) = self.lock().remove(token)?;
        (wish.method() == method && is_fresh(issued, now)).then_some(wish)
    }
}

fn is_fresh(issued: Instant, now: Instant) -> bool {
    now.saturating_duration_since(issued) < TOKEN_LIFETIME
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish() -> Wish {
        Wish::PortForward("pod".into())
    }

    #[test]
    fn a_token_is_good_once_for_its_method_and_for_a_minute() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.issue(wish(), now).unwrap();
        assert_eq!(tokens.redeem("portforward", &token, now), Some(wish()));
        assert_eq!(tokens.redeem("portforward", &token, now), None);

        let token = tokens.issue(wish(), now).unwrap();
        assert_eq!(tokens.redeem("exec", &token, now), None);
        assert_eq!(tokens.redeem("portforward", &token, now), None);

        let token = tokens.issue(wish(), now).unwrap();
        assert_eq!(tokens.redeem("portforward", &token, now + TOKEN_LIFETIME), None);
    }

    #[test]
    fn tokens_that_nobody_redeems_do_not_block_new_ones_for_ever() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        for _ in 0..MAX_TOKENS {
            tokens.issue(wish(), now).unwrap();
        }
        assert_eq!(tokens.issue(wish(), now), Err(TooManyTokens));
        assert!(tokens.issue(wish(), now + TOKEN_LIFETIME).is_ok());
    }
}
