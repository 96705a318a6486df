//! `RemoveContainer`: ends what runs, and leaves nothing.

use std::{io, path::Path, sync::Arc, time::Duration};

use rustix::{
    io::Errno,
    mount::{UnmountFlags, unmount},
};

use crate::{
    cgroup::Cgroup,
    create::{directory, image_serials, lower, scratch},
    delete_tree,
    error::{AgentError, At},
    guest::Guest,
    service::blocking,
};

/// How long a killed process may take to be gone.
const KILL_BOUND: Duration = Duration::from_secs(20);

/// Removes a container.
pub(crate) async fn remove(guest: Arc<Guest>, id: &str) -> Result<(), AgentError> {
    let container = guest.container(id)?;
    let process = container.begin_remove()?;
    container.cgroup.kill()?;
    if let Some(process) = process {
        container.stdio.abandon();
        // Its first process is a child of the agent's, so the cgroup is empty only when it has been reaped.
        if tokio::time::timeout(KILL_BOUND, process.end()).await.is_err() {
            container.undo_remove();
            return Err(Errno::TIMEDOUT).at(|| format!("waiting for the killed process of {id}"));
        }
    }
    container.stdio.abandon();
    let dismantled = blocking({
        let guest = Arc::clone(&guest);
        let container = Arc::clone(&container);
        move || {
            dismantle(&container.id)?;
            image_serials(&container.spec)
                .iter()
                .for_each(|serial| guest.images.release(serial));
            Ok(())
        }
    })
    .await;
    match dismantled {
        Ok(()) => guest.give_back(id),
        Err(_) => container.undo_remove(),
    }
    dismantled
}

/// Takes apart what CreateContainer made, however much of it there is. Blocking.
pub(crate) fn dismantle(id: &str) -> Result<(), AgentError> {
    Cgroup::of(id).remove()?;
    for place in [directory(id).join("rootfs"), lower(id)] {
        match unmount(&place, UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error).at(|| format!("unmounting {}", place.display())),
        }
    }
    remove_directory(&directory(id))?;
    remove_directory(&scratch(id))
}

fn remove_directory(path: &Path) -> Result<(), AgentError> {
    match delete_tree::delete(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at(|| format!("removing {}", path.display())),
    }
}
