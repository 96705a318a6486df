//! Notices when kubelet has replaced the content of a volume: one inotify instance for all pods of the node.

#![expect(
    unsafe_code,
    reason = "the runtime wants a promise that a registered descriptor stays the same"
)]

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use rustix::{
    fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init, remove_watch},
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, OnceCell},
    task::JoinSet,
};

/// Watches directories. The instance is made when the first is asked for.
#[derive(Default)]
pub(crate) struct Watcher {
    instance: OnceCell<Arc<Instance>>,
    task: Mutex<JoinSet<()>>,
}

struct Instance {
    inotify: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<i32, Vec<Weak<Notify>>>>,
}

/// A directory that is watched until this is dropped.
pub(crate) struct Watch {
    instance: Arc<Instance>,
    descriptor: i32,
    changed: Arc<Notify>,
}

impl Watcher {
    /// Watches what happens in a directory: names that appear, go, or are replaced.
    pub(crate) async fn watch(&self, directory: &Path) -> io::Result<Watch> {
        let instance = self.instance.get_or_try_init(async || self.start()).await?;
        let flags = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let changed = Arc::new(Notify::new());
        let mut watched = instance.watched();
        // The same directory has the same number: whoever shares it is told as well.
        let descriptor = add_watch(&instance.inotify, directory, flags)?;
        watched
            .entry(descriptor)
            .or_default()
            .push(Arc::downgrade(&changed));
        drop(watched);
        Ok(Watch {
            instance: Arc::clone(instance),
            descriptor,
            changed,
        })
    }

    fn start(&self) -> io::Result<Arc<Instance>> {
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd always names the same descriptor, and keeps it open until the AsyncFd that owns it is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?;
        let instance = Arc::new(Instance {
            inotify,
            watched: Mutex::default(),
        });
        let told = Arc::clone(&instance);
        self.task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .spawn(async move {
                if let Err(error) = told.run().await {
                    tracing::error!(%error, "volumes are no longer watched");
                }
            });
        Ok(instance)
    }
}

impl Instance {
    fn watched(&self) -> MutexGuard<'_, HashMap<i32, Vec<Weak<Notify>>>> {
        // Each change is one insertion or removal.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut reader = Reader::new(self.inotify.as_fd(), &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) => self.tell(event.wd(), event.events()),
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
        }
    }

    fn tell(&self, descriptor: i32, events: ReadFlags) {
        let mut watched = self.watched();
        let tell = |listeners: &Vec<Weak<Notify>>| {
            for listener in listeners.iter().filter_map(Weak::upgrade) {
                listener.notify_one();
            }
        };
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            // Something was lost: everybody looks.
            watched.values().for_each(tell);
        } else if events.contains(ReadFlags::IGNORED) {
            watched.remove(&descriptor);
        } else if let Some(listeners) = watched.get(&descriptor) {
            tell(listeners);
        }
    }
}

impl Watch {
    /// Waits for the next change; one that has happened since the last call counts.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.instance.watched();
        let Some(listeners) = watched.get_mut(&self.descriptor) else {
            return;
        };
        listeners.retain(|listener| !std::ptr::eq(listener.as_ptr(), Arc::as_ptr(&self.changed)));
        if listeners.is_empty() {
            watched.remove(&self.descriptor);
            if let Err(error) = remove_watch(&self.instance.inotify, self.descriptor) {
                tracing::debug!(%error, "the watched directory is gone");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_swapped_link_is_noticed_by_all_who_watch() {
        let dir = tempfile::tempdir().unwrap();
        let watcher = Watcher::default();
        let (one, two) = (
            watcher.watch(dir.path()).await.unwrap(),
            watcher.watch(dir.path()).await.unwrap(),
        );
        std::os::unix::fs::symlink("..1", dir.path().join("..data_tmp")).unwrap();
        one.changed().await;
        two.changed().await;
        drop(one);
        std::fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        two.changed().await;
        watcher.watch(&dir.path().join("absent")).await.err().unwrap();
    }
}
