//! The life of a pod.
//!
//! ```text
//! Reserved -> Networked -> Launched -> Reachable -> Ready -> Stopping -> Stopped -> (Stopping) -> Removed
//!     \___________\____________\___________\         \-> Broken -/ ^
//!                                           boot failed or stopped: Stopping, then Removed, Stopped or Broken
//! ```
//!
//! A pod whose VM runs, but was not heard of by a new daemon, is `Broken` until its agent answers; then it is `Ready` again.
//! `Stopping` carries what is wanted in the end. Clean-up starts only when the boot has ended (it hands its undo stack back), and
//! never twice at a time. `Broken` is a pod whose VM ended by itself, or whose clean-up failed: it waits for StopPodSandbox.

/// Where a pod's life stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Name and id are taken, the record is on disk.
    Reserved,
    /// It has a network.
    Networked,
    /// Its VM runs.
    Launched,
    /// Its agent answers.
    Reachable,
    /// Containers can run in it.
    Ready,
    /// Not usable, and not cleaned up yet.
    Broken,
    /// Being taken apart.
    Stopping {
        /// What is wanted in the end.
        goal: Goal,
        /// What goes on meanwhile.
        phase: Phase,
    },
    /// Nothing of it runs; record and logs are kept.
    Stopped,
    /// Nothing of it is left.
    Removed,
}

/// What is wanted of a pod that is being taken apart; the greater wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Goal {
    /// The record stays.
    Stop,
    /// Nothing stays: the boot failed.
    Undo,
    /// Nothing stays: somebody asked for it.
    Remove,
}

/// What a pod in [`State::Stopping`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// For the broken-off boot to hand over what it made.
    Boot,
    /// For the clean-up.
    CleanUp,
}

/// What happens to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The boot has a network.
    NetworkUp,
    /// The boot has a VM.
    VmLaunched,
    /// The boot has heard the agent.
    AgentAnswered,
    /// The boot is done.
    BootDone,
    /// The boot has ended without success.
    BootFailed,
    /// The VM of a booted pod ended.
    VmExited,
    /// The agent of a VM that an earlier daemon has booted answers at last.
    AgentFound,
    /// StopPodSandbox.
    StopAsked,
    /// RemovePodSandbox.
    RemoveAsked,
    /// Clean-up is through, as deep as it was started.
    Cleaned {
        /// The record is gone, too.
        deep: bool,
    },
    /// Clean-up is through, but not all of it worked.
    CleanUpFailed,
}

/// What to do about it, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Break the boot off; it answers `BootDone` or `BootFailed`.
    CancelBoot,
    /// Containers count as killed from now on.
    KillContainers,
    /// Containers count as lost with their VM.
    LoseContainers,
    /// Undo what was made: the VM first, the record (only when `deep`) last.
    CleanUp {
        /// Delete the record, too.
        deep: bool,
    },
    /// Answer the callers whose wish is fulfilled by the new state.
    Answer,
    /// Answer everybody who waits for a clean-up with its failures.
    AnswerFailure,
}

/// The state after `event`, and what to do. Total: what makes no sense in a state changes nothing.
#[must_use]
pub fn step(state: State, event: Event) -> (State, Vec<Effect>) {
    use Effect as Do;
    use State as S;
    match (state, event) {
        (S::Reserved, Event::NetworkUp) => (S::Networked, vec![]),
        (S::Networked, Event::VmLaunched) => (S::Launched, vec![]),
        (S::Launched, Event::AgentAnswered) => (S::Reachable, vec![]),
        (S::Reachable, Event::BootDone) => (S::Ready, vec![Do::Answer]),
        (S::Reserved | S::Networked | S::Launched | S::Reachable, Event::BootFailed) => (
            stopping(Goal::Undo, Phase::CleanUp),
            vec![Do::CleanUp { deep: true }],
        ),
        (S::Reserved | S::Networked | S::Launched | S::Reachable, Event::StopAsked) => {
            (stopping(Goal::Stop, Phase::Boot), vec![Do::CancelBoot])
        }
        (S::Reserved | S::Networked | S::Launched | S::Reachable, Event::RemoveAsked) => {
            (stopping(Goal::Remove, Phase::Boot), vec![Do::CancelBoot])
        }
        (
            S::Stopping {
                goal,
                phase: Phase::Boot,
            },
            Event::BootDone | Event::BootFailed,
        ) => (
            stopping(goal, Phase::CleanUp),
            vec![
                Do::CleanUp {
                    deep: goal != Goal::Stop,
                },
                Do::KillContainers,
            ],
        ),
        // A VM whose agent was not heard may end, too.
        (S::Ready | S::Broken, Event::VmExited) => (S::Broken, vec![Do::LoseContainers]),
        (S::Broken, Event::AgentFound) => (S::Ready, vec![]),
        (S::Ready | S::Broken, Event::StopAsked) => (
            stopping(Goal::Stop, Phase::CleanUp),
            vec![Do::CleanUp { deep: false }, Do::KillContainers],
        ),
        (S::Ready | S::Broken | S::Stopped, Event::RemoveAsked) => (
            stopping(Goal::Remove, Phase::CleanUp),
            vec![Do::CleanUp { deep: true }, Do::KillContainers],
        ),
        (S::Stopped, Event::StopAsked) | (S::Removed, Event::StopAsked | Event::RemoveAsked) => {
            (state, vec![Do::Answer])
        }
        (S::Stopping { goal, phase }, Event::RemoveAsked) => {
            (stopping(goal.max(Goal::Remove), phase), vec![])
        }
        (
            S::Stopping {
                goal: Goal::Stop,
                phase: Phase::CleanUp,
            },
            Event::Cleaned { deep: false },
        ) => (S::Stopped, vec![Do::Answer]),
        // Somebody asked for removal while it was being stopped.
        (
            S::Stopping {
                phase: Phase::CleanUp,
                ..
            },
            Event::Cleaned { deep: false },
        ) => (state, vec![Do::CleanUp { deep: true }]),
        (
            S::Stopping {
                phase: Phase::CleanUp,
                ..
            },
            Event::Cleaned { deep: true },
        ) => (S::Removed, vec![Do::Answer]),
        (
            S::Stopping {
                phase: Phase::CleanUp,
                ..
            },
            Event::CleanUpFailed,
        ) => (S::Broken, vec![Do::AnswerFailure]),
        _ => (state, vec![]),
    }
}

const fn stopping(goal: Goal, phase: Phase) -> State {
    State::Stopping { goal, phase }
}

impl State {
    /// The word for messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reserved | Self::Networked | Self::Launched | Self::Reachable => "booting",
            Self::Ready => "ready",
            Self::Broken => "broken",
            Self::Stopping { .. } => "being stopped",
            Self::Stopped => "stopped",
            Self::Removed => "removed",
        }
    }

    /// Whether the boot goes on and nobody has asked to end it.
    #[must_use]
    pub fn is_booting(self) -> bool {
        matches!(
            self,
            Self::Reserved | Self::Networked | Self::Launched | Self::Reachable
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a naive bookkeeper knows: what was started and has not answered yet, and who waits.
    #[derive(Debug, Default)]
    struct Model {
        boot_runs: bool,
        clean_up: Option<bool>,
        record: bool,
        vm: bool,
        waiting: bool,
    }

    impl Model {
        fn apply(&mut self, state: State, effects: &[Effect]) {
            for effect in effects {
                match *effect {
                    Effect::CleanUp { deep } => {
                        assert!(!self.boot_runs, "clean-up beside a running boot");
                        assert_eq!(self.clean_up, None, "two clean-ups at a time");
                        assert!(self.record, "clean-up of nothing");
                        self.clean_up = Some(deep);
                    }
                    Effect::CancelBoot => assert!(self.boot_runs, "no boot to break off"),
                    Effect::Answer | Effect::AnswerFailure => self.waiting = false,
                    Effect::KillContainers | Effect::LoseContainers => {}
                }
            }
            match state {
                State::Ready => assert!(self.vm && !self.boot_runs && self.record),
                State::Stopped => assert!(!self.vm && self.record && self.clean_up.is_none()),
                State::Removed => assert!(!self.vm && !self.record && self.clean_up.is_none()),
                State::Broken => assert!(self.clean_up.is_none() && !self.boot_runs),
                State::Stopping { .. } => assert!(self.boot_runs || self.clean_up.is_some()),
                _ => assert!(self.boot_runs),
            }
        }

        /// Translates a wish into an event that the world could really produce now.
        fn event(&mut self, state: State, choice: u8) -> Option<Event> {
            Some(match choice % 7 {
                0 => {
                    self.waiting = true;
                    Event::StopAsked
                }
                1 => {
                    self.waiting = true;
                    Event::RemoveAsked
                }
                2 if self.boot_runs => match state {
                    State::Reserved => Event::NetworkUp,
                    State::Networked => {
                        self.vm = true;
                        Event::VmLaunched
                    }
                    State::Launched => Event::AgentAnswered,
                    _ => {
                        self.boot_runs = false;
                        Event::BootDone
                    }
                },
                3 if self.boot_runs => {
                    self.boot_runs = false;
                    Event::BootFailed
                }
                4 if self.vm && !self.boot_runs => {
                    self.vm = false;
                    Event::VmExited
                }
                5 => {
                    let deep = self.clean_up.take()?;
                    self.vm = false;
                    self.record &= !deep;
                    Event::Cleaned { deep }
                }
                6 => {
                    self.clean_up.take()?;
                    Event::CleanUpFailed
                }
                _ => return None,
            })
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_clean_up_is_single_ordered_and_answers_everybody(choices in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut model = Model { boot_runs: true, record: true, ..Model::default() };
            let mut state = State::Reserved;
            // Then the world settles: the boot ends, and clean-up works.
            for choice in choices.into_iter().chain([3, 5, 5, 5]) {
                if let Some(event) = model.event(state, choice) {
                    let (next, effects) = step(state, event);
                    model.apply(next, &effects);
                    state = next;
                }
            }
            prop_assert!(!model.waiting, "somebody still waits in {state:?}");
        }
    }

    #[test]
    fn a_failed_boot_leaves_nothing() {
        let (state, effects) = step(State::Networked, Event::BootFailed);
        assert_eq!(effects, [Effect::CleanUp { deep: true }]);
        assert_eq!(step(state, Event::Cleaned { deep: true }).0, State::Removed);
    }

    #[test]
    fn a_boot_that_cannot_be_undone_is_kept_for_a_later_stop() {
        let (state, _) = step(State::Networked, Event::BootFailed);
        let (state, effects) = step(state, Event::CleanUpFailed);
        assert_eq!((state, effects), (State::Broken, vec![Effect::AnswerFailure]));
        assert_eq!(
            step(state, Event::StopAsked).1.first(),
            Some(&Effect::CleanUp { deep: false })
        );
    }

    #[test]
    fn removal_asked_during_a_stop_goes_on_to_the_record() {
        let (state, _) = step(State::Ready, Event::StopAsked);
        let (state, effects) = step(state, Event::RemoveAsked);
        assert!(effects.is_empty());
        let (state, effects) = step(state, Event::Cleaned { deep: false });
        assert_eq!(effects, [Effect::CleanUp { deep: true }]);
        assert_eq!(step(state, Event::Cleaned { deep: true }).0, State::Removed);
    }
}
