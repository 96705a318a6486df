//! Work that several callers may want at once is done once.
//!
//! A *flight* is a task with at least one caller waiting. Callers that come later join it; when the last one goes away, it is aborted.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::{
    sync::{OwnedMutexGuard, watch},
    task::AbortHandle,
};

/// Flights by what they are for.
pub(crate) struct Flights<K, T> {
    current: Mutex<HashMap<K, Weak<Flight<T>>>>,
}

struct Flight<T> {
    task: AbortHandle,
    outcome: watch::Receiver<Option<T>>,
}

impl<T> Drop for Flight<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<K: Eq + Hash, T: Clone + Send + Sync + 'static> Flights<K, T> {
    pub(crate) fn new() -> Self {
        Self {
            current: Mutex::new(HashMap::new()),
        }
    }

    /// The outcome of the flight for `key`, which `work` starts when there is none. Nothing when the task died.
    pub(crate) async fn join<F>(&self, key: K, work: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let flight = self.enter(key, work);
        let mut outcome = flight.outcome.clone();
        let outcome = outcome.wait_for(Option::is_some).await.ok()?;
        outcome.clone()
    }

    fn enter<F>(&self, key: K, work: impl FnOnce() -> F) -> Arc<Flight<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.retain(|_, flight| flight.strong_count() > 0);
        if let Some(flight) = current.get(&key).and_then(Weak::upgrade) {
            // One that has landed is history: the world may have changed since.
            if flight.outcome.borrow().is_none() && !flight.task.is_finished() {
                return flight;
            }
        }
        let (sender, outcome) = watch::channel(None);
        let work = work();
        let task = tokio::spawn(async move {
            sender.send_replace(Some(work.await));
        });
        let flight = Arc::new(Flight {
            task: task.abort_handle(),
            outcome,
        });
        current.insert(key, Arc::downgrade(&flight));
        flight
    }
}

/// One lock for each key in use.
pub(crate) struct KeyedLocks<K> {
    locks: Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>,
}

impl<K: Eq + Hash + Clone> KeyedLocks<K> {
    pub(crate) fn new() -> Self {
        Self {
            locks: Mutex::new(HashMap::new()),
        }
    }

    /// Waits until nobody else holds the lock for `key`.
    pub(crate) async fn lock(&self, key: &K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(key.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::{Notify, oneshot};

    use super::*;

    #[tokio::test]
    async fn callers_that_come_during_the_flight_share_it() {
        let flights = Arc::new(Flights::<u8, u32>::new());
        let started = Arc::new(AtomicU32::new(0));
        let gate = Arc::new(Notify::new());
        let caller = || {
            let (flights, started, gate) = (flights.clone(), started.clone(), gate.clone());
            async move {
                flights
                    .join(1, || async move {
                        let number = started.fetch_add(1, Ordering::SeqCst);
                        gate.notified().await;
                        number
                    })
                    .await
            }
        };
        let (first, second, ()) = tokio::join!(caller(), caller(), async { gate.notify_one() });
        assert_eq!((first, second), (Some(0), Some(0)));
        gate.notify_one();
        assert_eq!(caller().await, Some(1), "a later caller gets a flight of its own");
    }

    #[tokio::test]
    async fn a_flight_without_callers_is_aborted_and_its_things_dropped() {
        let flights = Arc::new(Flights::<u8, ()>::new());
        let (dropped, wait) = oneshot::channel::<()>();
        let running = Arc::new(Notify::new());
        let (inner, told) = (flights.clone(), running.clone());
        let caller = tokio::spawn(async move {
            inner
                .join(1, || async move {
                    let _held = dropped;
                    told.notify_one();
                    std::future::pending::<()>().await;
                })
                .await
        });
        running.notified().await;
        caller.abort();
        assert!(wait.await.is_err(), "the task's things are dropped");
    }

    #[tokio::test]
    async fn a_task_that_panics_gives_nothing() {
        let flights = Flights::<u8, u32>::new();
        assert_eq!(flights.join(1, || async { panic!("on purpose") }).await, None);
        assert_eq!(flights.join(1, || async { 7 }).await, Some(7));
    }
}
