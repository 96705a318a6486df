//! Volumes that kubelet writes (configMap, secret, projected, downwardAPI): copied into guest memory, and again whenever kubelet has
//! changed them, in the shape that kubelet gave them, so that the swap of `..data` is atomic in the guest too.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use caisson_guest::GuestClient;
use tokio::task::JoinSet;

use crate::{
    SandboxError, files, guest,
    journal::blocking,
    volumes::{
        name_of,
        watch::{Watch, Watcher},
    },
};

/// Pauses between attempts to bring a change into the guest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The volumes of one pod that are kept up to date, until this is dropped.
pub(crate) struct Projected {
    watcher: Arc<Watcher>,
    deadline: Duration,
    known: tokio::sync::Mutex<HashMap<PathBuf, String>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Projected {
    pub(crate) fn new(watcher: Arc<Watcher>, deadline: Duration) -> Self {
        Self {
            watcher,
            deadline,
            known: tokio::sync::Mutex::default(),
            tasks: Mutex::default(),
        }
    }

    /// Copies the volume unless it is there, and follows it from now on. Answers its id in the guest.
    pub(crate) async fn provide(&self, guest: &GuestClient, path: &Path) -> Result<String, SandboxError> {
        let mut known = self.known.lock().await;
        if let Some(id) = known.get(path) {
            return Ok(id.clone());
        }
        let id = name_of("live", path);
        // Before it is read, so that no change falls between.
        let watch = self
            .watcher
            .watch(path)
            .await
            .map_err(SandboxError::io(format!("watch {}", path.display())))?;
        push(guest, path, &id, self.deadline).await?;
        self.follow(guest, path, &id, watch, false);
        known.insert(path.to_owned(), id.clone());
        Ok(id)
    }

    /// Goes on with what an earlier daemon has copied; changes since then are copied soon.
    pub(crate) async fn resume(&self, guest: &GuestClient, path: &Path) {
        let mut known = self.known.lock().await;
        if known.contains_key(path) {
            return;
        }
        match self.watcher.watch(path).await {
            Ok(watch) => {
                let id = name_of("live", path);
                self.follow(guest, path, &id, watch, true);
                known.insert(path.to_owned(), id);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "volume is not kept up to date any more");
            }
        }
    }

    fn follow(&self, guest: &GuestClient, path: &Path, id: &str, watch: Watch, mut due: bool) {
        use tracing::Instrument;
        let (guest, path, id, deadline) = (guest.clone(), path.to_owned(), id.to_owned(), self.deadline);
        let work = async move {
            loop {
                if !due {
                    watch.changed().await;
                }
                due = false;
                let mut pause = FIRST_PAUSE;
                // kubelet may be in the middle of it, or the guest busy.
                while let Err(error) = push(&guest, &path, &id, deadline).await {
                    tracing::debug!(path = %path.display(), error = %error.chain(), "volume not updated yet");
                    if tokio::time::timeout(pause, watch.changed()).await.is_err() {
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
                tracing::debug!(path = %path.display(), "volume updated");
            }
        };
        self.tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .spawn(work.instrument(tracing::Span::current()));
    }
}

/// Copies what is at `path` into the guest as the volume `id`.
pub(crate) async fn push(
    guest: &GuestClient,
    path: &Path,
    id: &str,
    deadline: Duration,
) -> Result<(), SandboxError> {
    let read = path.to_owned();
    let entries = blocking(move || files::read(&read)).await?;
    let request = guest::PutVolumeRequest {
        volume_id: id.to_owned(),
        entries,
    };
    guest
        .put_volume(request, deadline)
        .await
        .map_err(SandboxError::guest(format!(
            "copy {} into the guest",
            path.display()
        )))
}
