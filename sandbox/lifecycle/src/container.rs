//! The life of a container.
//!
//! ```text
//! Creating -> Created -> Starting -> Running -> Exited -> Removing -> Removed
//!     \-> Removed  \________\_________\___________________^   (removal kills what runs)
//! ```
//!
//! StopContainer is no event of its own: it sends signals, and the end comes as `Ended` like any other.

use std::time::SystemTime;

use crate::exit::{self, Exit};

/// Where a container's life stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Being made in the guest; nobody knows its id yet.
    Creating,
    /// Made, not started.
    Created,
    /// Its process is being started.
    Starting,
    /// Its process runs.
    Running {
        /// Since when.
        started_at: SystemTime,
    },
    /// It has ended, or could not be started.
    Exited(Exit),
    /// Being removed.
    Removing {
        /// What it was, and is again when removal fails.
        from: Box<State>,
    },
    /// Nothing of it is left.
    Removed,
}

/// What happens to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest has made it.
    Made,
    /// The guest could not make it, or the pod ended meanwhile.
    MakeFailed,
    /// StartContainer.
    StartAsked,
    /// Its process runs.
    Started {
        /// Since when.
        at: SystemTime,
    },
    /// Its process could not be started.
    StartFailed {
        /// When.
        at: SystemTime,
        /// What failed.
        message: String,
    },
    /// It ended, or its VM did.
    Ended(Exit),
    /// RemoveContainer.
    RemoveAsked,
    /// Nothing is left.
    Removed,
    /// Something is left.
    RemoveFailed,
}

/// What to do about it, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Start its process.
    Start,
    /// Take it away.
    Remove,
    /// Write its record, then show the new state.
    Persist,
    /// The request does not fit the state.
    Refuse,
    /// Take it from the list.
    Forget,
    /// The removal that was asked for is already done or under way.
    Join,
}

/// The state after `event`, and what to do. Total: what makes no sense in a state changes nothing, or is refused when asked for.
#[must_use]
pub fn step(state: State, event: Event) -> (State, Vec<Effect>) {
    use Effect as Do;
    use State as S;
    match (state, event) {
        (S::Creating, Event::Made) => (S::Created, vec![Do::Persist]),
        (S::Creating, Event::MakeFailed) => (S::Removed, vec![Do::Forget]),
        (S::Created, Event::StartAsked) => (S::Starting, vec![Do::Start]),
        (state, Event::StartAsked) => (state, vec![Do::Refuse]),
        (S::Starting, Event::Started { at }) => (S::Running { started_at: at }, vec![Do::Persist]),
        (S::Starting, Event::StartFailed { at, message }) => {
            (S::Exited(exit::start_error(at, message)), vec![Do::Persist])
        }
        (S::Created | S::Starting | S::Running { .. }, Event::Ended(exit)) => {
            (S::Exited(exit), vec![Do::Persist])
        }
        (state @ (S::Created | S::Running { .. } | S::Exited(_)), Event::RemoveAsked) => (
            S::Removing {
                from: Box::new(state),
            },
            vec![Do::Remove],
        ),
        (state @ (S::Removing { .. } | S::Removed), Event::RemoveAsked) => (state, vec![Do::Join]),
        (state, Event::RemoveAsked) => (state, vec![Do::Refuse]),
        (S::Removing { .. }, Event::Removed) => (S::Removed, vec![Do::Forget]),
        (S::Removing { from }, Event::RemoveFailed) => (*from, vec![]),
        (S::Removing { from }, event @ Event::Ended(_)) => {
            let (from, effects) = step(*from, event);
            (S::Removing { from: Box::new(from) }, effects)
        }
        (state, _) => (state, vec![]),
    }
}

impl State {
    /// The word for messages.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running { .. } => "running",
            Self::Exited(_) => "exited",
            Self::Removing { .. } => "being removed",
            Self::Removed => "removed",
        }
    }

    /// When it was started, if it ever was.
    #[must_use]
    pub fn started_at(&self) -> Option<SystemTime> {
        match self {
            Self::Running { started_at } => Some(*started_at),
            Self::Exited(exit) => exit.started_at,
            Self::Removing { from } => from.started_at(),
            _ => None,
        }
    }

    /// The state that callers are shown: a removal that goes on is not a state of its own.
    #[must_use]
    pub fn shown(&self) -> &Self {
        match self {
            Self::Removing { from } => from.shown(),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const T: SystemTime = SystemTime::UNIX_EPOCH;

    fn exited() -> Event {
        Event::Ended(exit::observed(Some(T), T, 0, false))
    }

    fn event(choice: u8) -> Event {
        match choice % 9 {
            0 => Event::Made,
            1 => Event::MakeFailed,
            2 => Event::StartAsked,
            3 => Event::Started { at: T },
            4 => Event::StartFailed {
                at: T,
                message: "no".into(),
            },
            5 => exited(),
            6 => Event::RemoveAsked,
            7 => Event::Removed,
            _ => Event::RemoveFailed,
        }
    }

    /// How far along a state is; a life only goes forward, but for a removal that failed.
    fn rank(state: &State) -> u8 {
        match state {
            State::Creating => 0,
            State::Created => 1,
            State::Starting => 2,
            State::Running { .. } => 3,
            State::Exited(_) => 4,
            State::Removing { .. } => 5,
            State::Removed => 6,
        }
    }

    proptest! {
        #[test]
        fn a_life_goes_forward_starts_at_most_once_and_exits_at_most_once(choices in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut state = State::Creating;
            let (mut starts, mut exits) = (0, 0);
            for choice in choices {
                let event = event(choice);
                let failed_removal = event == Event::RemoveFailed;
                let had_exit = matches!(state.shown(), State::Exited(_));
                let (next, effects) = step(state.clone(), event);
                prop_assert!(failed_removal || rank(&next) >= rank(&state), "{state:?} went back to {next:?}");
                starts += effects.iter().filter(|e| **e == Effect::Start).count();
                exits += usize::from(matches!(next.shown(), State::Exited(_)) && !had_exit);
                if next != state && !failed_removal && !matches!(next, State::Starting | State::Removing { .. } | State::Removed) {
                    prop_assert!(effects.contains(&Effect::Persist), "{next:?} is shown but not written");
                }
                prop_assert_eq!(next == State::Removed && state != State::Removed, effects.contains(&Effect::Forget));
                state = next;
            }
            prop_assert!(starts <= 1 && exits <= 1);
        }
    }

    #[test]
    fn a_second_start_is_refused_in_every_state() {
        for state in [
            State::Creating,
            State::Starting,
            State::Running { started_at: T },
            State::Removed,
        ] {
            assert_eq!(
                step(state.clone(), Event::StartAsked),
                (state, vec![Effect::Refuse])
            );
        }
    }

    #[test]
    fn an_exit_seen_during_removal_survives_a_failed_removal() {
        let (state, _) = step(State::Running { started_at: T }, Event::RemoveAsked);
        let (state, effects) = step(state, exited());
        assert_eq!(effects, [Effect::Persist]);
        assert!(matches!(step(state, Event::RemoveFailed).0, State::Exited(_)));
    }

    #[test]
    fn a_late_answer_to_start_does_not_revive_a_container_whose_vm_ended() {
        let (state, _) = step(State::Starting, Event::Ended(exit::vm_gone(None, T, "gone")));
        let (after, effects) = step(state.clone(), Event::Started { at: T });
        assert_eq!((after, effects), (state, vec![]));
    }
}
