//! The volumes of a pod's containers: what each host path is, and how it comes into the guest.
//!
//! ```text
//! kubelet's configMap, secret, projected, downwardAPI    copied, and again at each change        projected.rs
//! a subPath of these                                     copied once, as Kubernetes says
//! emptyDir on disk                                       ext4 image in the host directory        empty_dir.rs
//! emptyDir in memory                                     tmpfs in the guest
//! a Unix socket of the host                              a socket in the guest, connected to it  file_server.rs
//! everything else                                        stays on the host, served by a process  file_server.rs
//!   and what is listened on below it                     the same as a Unix socket                sockets_below.rs
//! ```
//!
//! Must not know the CRI: a mount arrives as a [`HostVolume`]. Every error names the host path and the place in the container.

mod empty_dir;
pub(crate) mod file_server;
mod host_path;
mod kubelet;
mod listeners;
mod mount_table;
mod mount_tree;
mod projected;
mod sockets_below;
pub(crate) mod watch;

use std::{
    collections::HashSet,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use caisson_guest::GuestClient;
use caisson_hypervisor::Disk;
use rustix::fs::FileType;
use sha2::{Digest, Sha256};

use crate::{
    ContainerId, SandboxError,
    container::Live,
    disks::Holder,
    guest::{self, mount::Source as Mounted, pod_volume_source::Backing},
    journal::{PodRecord, blocking},
    registry::Node,
    spec::{HostDisk, HostVolume, Propagation},
};
use file_server::{FileServer, FileServerRecord};
use host_path::HostPath;
use kubelet::{KubeletVolume, Medium, Source};
use mount_tree::ReadOnly;
use projected::Projected;
use sockets_below::{Found, LIMITS, Limit};

/// Everything that a pod's volumes need on the host while its VM lives.
pub(crate) struct Volumes {
    /// Of the pod, which is in kubelet's paths.
    uid: String,
    /// Where templates of disks are.
    root: PathBuf,
    /// Size of an emptyDir's disk.
    empty_dir_bytes: u64,
    file_server: FileServer,
    socket_server: FileServer,
    projected: Projected,
    /// What was said in the log of searches for sockets that did not see everything.
    said: Mutex<HashSet<(PathBuf, Option<Limit>)>>,
}

/// A name for what is at a path, within the 20 bytes of a disk's serial.
fn name_of(kind: &str, path: &Path) -> String {
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    let mut name = format!("{kind}-");
    for byte in digest.iter().take(7) {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

impl Volumes {
    pub(crate) fn new(node: &Node, record: &PodRecord) -> Self {
        let settings = file_server::Settings {
            program: node.config.file_server.clone(),
            owner: record.id.0.clone(),
            dir: node.run_dir(&record.id),
            cgroup: record.cgroup.clone(),
            deadline: node.config.agent_deadline,
            sockets: false,
        };
        let for_sockets = file_server::Settings {
            sockets: true,
            ..settings.clone()
        };
        Self {
            uid: record.spec.identity.uid.clone(),
            root: node.config.root.clone(),
            empty_dir_bytes: node.config.empty_dir_bytes,
            file_server: FileServer::new(settings, record.file_server.clone()),
            socket_server: FileServer::new(for_sockets, record.socket_server.clone()),
            projected: Projected::new(node.watcher.clone(), node.config.agent_deadline),
            said: Mutex::default(),
        }
    }

    /// What to journal.
    pub(crate) fn file_server(&self) -> Option<FileServerRecord> {
        self.file_server.record()
    }

    /// The same for the one that connects to Unix sockets.
    pub(crate) fn socket_server(&self) -> Option<FileServerRecord> {
        self.socket_server.record()
    }

    /// Makes every volume of a container available in the guest, and says how to mount it.
    pub(crate) async fn provide(
        &self,
        live: &Live,
        volumes: &[HostVolume],
    ) -> Result<Vec<guest::Mount>, SandboxError> {
        let mut mounts = Vec::new();
        for volume in volumes {
            let mount = Box::pin(self.one(live, volume)).await;
            mounts.push(mount.map_err(|source| SandboxError::Volume {
                host_path: volume.host_path.clone(),
                container_path: volume.container_path.clone(),
                source: Box::new(source),
            })?);
        }
        Ok(mounts)
    }

    /// Attaches block devices of the host, and says how they look in the container.
    pub(crate) async fn disks(
        &self,
        live: &Live,
        id: &ContainerId,
        disks: &[HostDisk],
    ) -> Result<Vec<guest::BlockDevice>, SandboxError> {
        let mut devices = Vec::new();
        for disk in disks {
            let attached = block_device(live, id, disk).await;
            devices.push(attached.map_err(|source| SandboxError::Volume {
                host_path: disk.host_path.clone(),
                container_path: disk.container_path.clone(),
                source: Box::new(source),
            })?);
        }
        Ok(devices)
    }

    /// Goes on to keep up to date what an earlier daemon has copied.
    pub(crate) async fn resume(&self, guest: &GuestClient, volumes: &[HostVolume]) {
        for volume in volumes {
            let found = blocking({
                let (wanted, uid) = (volume.host_path.clone(), self.uid.clone());
                move || look(&wanted, &uid)
            });
            match found.await {
                Ok((_, Some(known))) if is_followed(&known) => {
                    self.projected.resume(guest, &known.directory).await;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(path = %volume.host_path.display(), error = %error.chain(), "volume not found again");
                }
            }
        }
    }

    async fn one(&self, live: &Live, volume: &HostVolume) -> Result<guest::Mount, SandboxError> {
        let (path, known) = within(live, &volume.host_path, {
            let uid = self.uid.clone();
            move |wanted| look(wanted, &uid)
        })
        .await?;
        let is_empty_dir = matches!(&known, Some(known) if matches!(known.source, Source::EmptyDir(_)));
        if volume.propagation == Propagation::Shared && !is_empty_dir {
            return Err(SandboxError::Invalid {
                what: "propagation Bidirectional".into(),
                reason: "mounts of a container are in its VM, and cannot appear on the host; \
                         between containers of a pod they travel through an emptyDir"
                    .into(),
            });
        }
        let source = match known {
            Some(known) if is_followed(&known) => {
                Mounted::VolumeId(self.projected.provide(&live.guest, &known.directory).await?)
            }
            Some(known) if known.source == Source::Projected => {
                let id = name_of("part", &path.path);
                projected::push(&live.guest, &path.path, &id, live.deadline).await?;
                Mounted::VolumeId(id)
            }
            Some(KubeletVolume {
                source: Source::EmptyDir(medium),
                directory,
                sub_path,
            }) => Mounted::PodVolume(self.empty_dir(live, medium, directory, sub_path, &path).await?),
            _ => return self.shared(live, volume, path).await,
        };
        Ok(guest::Mount {
            destination: volume.container_path.clone(),
            readonly: volume.readonly,
            source: Some(source),
            propagation: match volume.propagation {
                Propagation::Slave if is_empty_dir => guest::MountPropagation::MountSlave.into(),
                Propagation::Shared => guest::MountPropagation::MountShared.into(),
                // What is copied has nothing mounted below it.
                Propagation::Private | Propagation::Slave => guest::MountPropagation::MountPrivate.into(),
            },
            sockets: Vec::new(),
        })
    }

    async fn empty_dir(
        &self,
        live: &Live,
        medium: Medium,
        directory: PathBuf,
        sub_path: PathBuf,
        path: &HostPath,
    ) -> Result<guest::PodVolumeSource, SandboxError> {
        let sub_path = sub_path
            .into_os_string()
            .into_string()
            .map_err(|name| SandboxError::Invalid {
                what: format!("subPath {}", name.display()),
                reason: "it is not UTF-8".into(),
            })?;
        let (backing, id) = match medium {
            Medium::Memory(bytes) => (Backing::MemoryBytes(bytes), name_of("mem", &directory)),
            Medium::Disk => {
                let serial = name_of("vol", &directory);
                let image = blocking({
                    let (root, bytes, directory) =
                        (self.root.clone(), self.empty_dir_bytes, directory.clone());
                    move || empty_dir::image(&HostPath::resolve(&directory)?, &root, bytes)
                });
                let disk = Disk {
                    serial: serial.clone(),
                    files: vec![image.await?],
                    read_only: false,
                };
                live.disks.attach(live, disk, Holder::Pod).await?;
                (Backing::DiskSerial(serial.clone()), serial)
            }
        };
        Ok(guest::PodVolumeSource {
            id,
            backing: Some(backing),
            mode: path.mode,
            uid: path.uid,
            gid: path.gid,
            sub_path,
        })
    }

    async fn shared(
        &self,
        live: &Live,
        volume: &HostVolume,
        path: HostPath,
    ) -> Result<guest::Mount, SandboxError> {
        if path.kind == FileType::Socket {
            // A read-only mount does not keep anybody from connecting; neither does it in a container.
            let export = self
                .socket_server
                .export(&live.guest, path, ReadOnly::No, volume.propagation)
                .await?;
            return Ok(guest::Mount {
                destination: volume.container_path.clone(),
                readonly: volume.readonly,
                source: Some(Mounted::Shared(export)),
                ..guest::Mount::default()
            });
        }
        if !matches!(path.kind, FileType::Directory | FileType::RegularFile) {
            return Err(SandboxError::Invalid {
                what: "volume".into(),
                reason: format!("a {} of the host cannot be mounted into a VM", name(path.kind)),
            });
        }
        // What is read-only is so on the host already. The guest's own mount is read-only besides, unless something that is mounted
        // below stays writable: one file system in the guest, it would become read-only as a whole.
        let has_more = path.has_mounts_below()? || volume.propagation == Propagation::Slave;
        let readonly = match (volume.readonly, volume.recursive_readonly) {
            (false, _) => ReadOnly::No,
            (true, false) => ReadOnly::Top,
            (true, true) => ReadOnly::All,
        };
        let (path, sockets) = self.sockets_below(live, path).await?;
        let export = self
            .file_server
            .export(&live.guest, path, readonly, volume.propagation)
            .await?;
        Ok(guest::Mount {
            destination: volume.container_path.clone(),
            readonly: readonly == ReadOnly::All || (readonly == ReadOnly::Top && !has_more),
            source: Some(Mounted::Shared(export)),
            sockets,
            ..guest::Mount::default()
        })
    }

    /// What is listened on below a directory now, ready to be connected from the guest.
    async fn sockets_below(
        &self,
        live: &Live,
        path: HostPath,
    ) -> Result<(HostPath, Vec<guest::SocketBelow>), SandboxError> {
        if path.kind != FileType::Directory {
            return Ok((path, Vec::new()));
        }
        let directory = path.path.clone();
        let (path, found) = within(live, &directory, move |_| {
            let found = sockets_below::search(&path, &LIMITS);
            Ok((path, found))
        })
        .await?;
        let Found { sockets, mut reached } = found.unwrap_or_else(|error| {
            if self.is_new(&directory, None) {
                tracing::warn!(path = %directory.display(), error = %error.chain(), "sockets below the volume are not connected");
            }
            Found::default()
        });
        let mut below = Vec::new();
        for (path, socket) in sockets {
            match self.socket_server.export_found(&live.guest, socket).await? {
                Some(source) => below.push(guest::SocketBelow {
                    path: path.into_os_string().into_vec(),
                    source: Some(source),
                }),
                // Others may be served already.
                None => {
                    reached.insert(Limit::Exports);
                }
            }
        }
        for limit in reached {
            if self.is_new(&directory, Some(limit)) {
                tracing::info!(path = %directory.display(), %limit, found = below.len(), "not all of a volume was searched for sockets");
            }
        }
        Ok((path, below))
    }

    /// Whether nothing was said of it yet.
    fn is_new(&self, directory: &Path, limit: Option<Limit>) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.insert((directory.to_owned(), limit))
    }
}

async fn block_device(
    live: &Live,
    id: &ContainerId,
    disk: &HostDisk,
) -> Result<guest::BlockDevice, SandboxError> {
    let path = within(live, &disk.host_path, HostPath::resolve).await?;
    if path.kind != FileType::BlockDevice {
        return Err(SandboxError::Invalid {
            what: "block volume".into(),
            reason: format!("a {} is no disk", name(path.kind)),
        });
    }
    // By its numbers: a node can have many names. Once for each way to open it.
    let (kind, (major, minor)) = (if disk.readonly { "blr" } else { "blk" }, path.numbers);
    let serial = format!("{kind}-{major}-{minor}");
    let attached = Disk {
        serial: serial.clone(),
        files: vec![path.path],
        read_only: disk.readonly,
    };
    live.disks.attach(live, attached, Holder::Container(id)).await?;
    Ok(guest::BlockDevice {
        serial,
        path: disk.container_path.clone(),
        readonly: disk.readonly,
        mode: path.mode,
        uid: path.uid,
        gid: path.gid,
    })
}

/// Looks at a path, but not forever: a file system whose server does not answer holds up a thread, not the caller.
async fn within<T: Send + 'static>(
    live: &Live,
    path: &Path,
    look: impl FnOnce(&Path) -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    let wanted = path.to_owned();
    let looking = blocking(move || look(&wanted));
    tokio::time::timeout(live.deadline, looking)
        .await
        .unwrap_or_else(|_| {
            Err(SandboxError::Deadline {
                what: format!("the look at {}", path.display()),
                limit: live.deadline,
            })
        })
}

/// What is at a path, and what kubelet means by it. Blocking.
fn look(wanted: &Path, uid: &str) -> Result<(HostPath, Option<KubeletVolume>), SandboxError> {
    let path = HostPath::resolve(wanted)?;
    let known = kubelet::recognize(&path.path, uid)?;
    let swapped = || path.kind == FileType::Directory && path.path.join("..data").is_symlink();
    // A volume that is written as kubelet writes its own, wherever it is, is one.
    let known = match known {
        None if swapped() => Some(KubeletVolume {
            source: Source::Projected,
            directory: path.path.clone(),
            sub_path: PathBuf::new(),
        }),
        known => known,
    };
    Ok((path, known))
}

/// A part of such a volume stays as it was when its container was made.
fn is_followed(volume: &KubeletVolume) -> bool {
    volume.source == Source::Projected && volume.sub_path.as_os_str().is_empty()
}

fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "directory",
        FileType::RegularFile => "file",
        FileType::BlockDevice => "block device",
        FileType::CharacterDevice => "character device",
        FileType::Socket => "socket",
        FileType::Fifo => "named pipe",
        _ => "thing of unknown kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_a_disk_s_serial_and_differ() {
        let (one, two) = (name_of("vol", Path::new("/a")), name_of("vol", Path::new("/b")));
        assert!(
            one != two && one.len() <= caisson_hypervisor::SERIAL_BYTES,
            "{one}"
        );
        assert_eq!(one, name_of("vol", Path::new("/a")));
    }

    #[test]
    fn what_is_swapped_through_a_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let look_at = |path: &Path| look(path, "u").unwrap().1;
        assert_eq!(look_at(dir.path()), None);
        std::os::unix::fs::symlink("..1", dir.path().join("..data")).unwrap();
        assert!(is_followed(&look_at(dir.path()).unwrap()));
        std::fs::create_dir(dir.path().join("..1")).unwrap();
        assert_eq!(look_at(&dir.path().join("..1")), None);
    }
}
