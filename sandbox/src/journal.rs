//! What is remembered on disk: one file for each pod and each container, so that a later daemon finds them again.
//!
//! Each file is JSON with a version and a checksum, replaced atomically (temporary file, fsync, rename, fsync of the directory). What
//! cannot be parsed is never deleted here. Must not know how a pod is run or recovered.
//!
//! ```text
//! <root>/pods/<pod id>/record.json
//! <root>/pods/<pod id>/scratch.img                         (see scratch.rs)
//! <root>/pods/<pod id>/containers/<container id>/record.json
//! <root>/pods/<pod id>/containers/<container id>/log.json  (checkpoint of its log)
//! ```

use std::{
    fs,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use caisson_hypervisor::VmRecord;
use caisson_lifecycle::{exit::Exit, sizing::VmSize};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{
    ContainerId, SandboxError, SandboxId, spec, view::LinuxUser, volumes::file_server::FileServerRecord,
};

/// Version of both records; a file of another version is kept and listed, not read.
const VERSION: u32 = 1;

const RECORD: &str = "record.json";

/// A pod as it is remembered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    pub(crate) id: SandboxId,
    pub(crate) spec: spec::PodSpec,
    pub(crate) created_at: SystemTime,
    pub(crate) phase: PodPhase,
    pub(crate) vm: Option<VmRecord>,
    pub(crate) ips: Vec<IpAddr>,
    /// Leaf of this pod, made before the boot.
    pub(crate) cgroup: Option<PathBuf>,
    /// What its VM has; `None` before it is booted.
    #[serde(default)]
    pub(crate) size: Option<VmSize>,
    /// What it may grow to; `None`: it cannot grow.
    #[serde(default)]
    pub(crate) ceiling: Option<VmSize>,
    /// The process that serves its shared volumes, when there is one.
    #[serde(default)]
    pub(crate) file_server: Option<FileServerRecord>,
    /// The process that connects its containers to Unix sockets of the host, when there is one.
    #[serde(default)]
    pub(crate) socket_server: Option<FileServerRecord>,
    /// For verbose status; see [`crate::view::SandboxView::info`].
    pub(crate) info: serde_json::Value,
}

/// What a restarted daemon must know about a pod's progress. Everything finer is asked of the host and the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PodPhase {
    /// Written before the first side effect: anything of it may exist.
    Booting,
    /// Its VM has been configured.
    Ready,
    /// Nothing of it is left but this record.
    Stopped,
}

/// A container as it is remembered, from the moment the guest has made it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) id: ContainerId,
    pub(crate) spec: spec::ContainerSpec,
    pub(crate) created_at: SystemTime,
    pub(crate) phase: ContainerPhase,
    pub(crate) user: Option<LinuxUser>,
    /// Ids of its volumes in the guest.
    pub(crate) volumes: Vec<String>,
}

/// A container's state as it is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ContainerPhase {
    Created,
    Running { started_at: SystemTime },
    Exited(Exit),
}

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    pods: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u32,
    /// Of the body as compact JSON.
    sha256: String,
    body: serde_json::Value,
}

impl Journal {
    pub(crate) fn open(root: &Path) -> Result<Self, SandboxError> {
        let pods = root.join("pods");
        private_dir(&pods)?;
        Ok(Self { pods })
    }

    pub(crate) fn pod_dir(&self, id: &SandboxId) -> PathBuf {
        self.pods.join(&id.0)
    }

    pub(crate) fn scratch(&self, id: &SandboxId) -> PathBuf {
        self.pod_dir(id).join("scratch.img")
    }

    fn container_dir(&self, pod: &SandboxId, id: &ContainerId) -> PathBuf {
        self.pod_dir(pod).join("containers").join(&id.0)
    }

    /// Whether there is a directory for this container, readable record or not.
    pub(crate) fn knows_container(&self, pod: &SandboxId, id: &ContainerId) -> bool {
        is_id(&id.0) && self.container_dir(pod, id).exists()
    }

    pub(crate) fn log_checkpoint(&self, pod: &SandboxId, id: &ContainerId) -> PathBuf {
        self.container_dir(pod, id).join("log.json")
    }

    pub(crate) async fn write_pod(&self, record: &PodRecord) -> Result<(), SandboxError> {
        let dir = self.pod_dir(&record.id);
        let bytes = encode(record, &dir)?;
        blocking(move || write(&dir, &bytes)).await
    }

    pub(crate) async fn write_container(
        &self,
        pod: &SandboxId,
        record: &ContainerRecord,
    ) -> Result<(), SandboxError> {
        let dir = self.container_dir(pod, &record.id);
        let bytes = encode(record, &dir)?;
        blocking(move || write(&dir, &bytes)).await
    }

    /// Deletes a container's record and checkpoint. Nothing there is fine.
    pub(crate) async fn delete_container(
        &self,
        pod: &SandboxId,
        id: &ContainerId,
    ) -> Result<(), SandboxError> {
        let dir = self.container_dir(pod, id);
        blocking(move || {
            absent_is_fine(fs::remove_dir_all(&dir))
                .map_err(SandboxError::io(format!("delete {}", dir.display())))
        })
        .await
    }

    /// Deletes everything of a pod, its record last, so that a crash on the way leaves what can be found again.
    pub(crate) async fn delete_pod(&self, id: &SandboxId) -> Result<(), SandboxError> {
        let dir = self.pod_dir(id);
        blocking(move || {
            let failed = |path: &Path| SandboxError::io(format!("delete {}", path.display()));
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(SandboxError::io(format!("list {}", dir.display()))(error)),
            };
            for entry in entries.flatten() {
                let path = entry.path();
                if entry.file_name() == RECORD {
                    continue;
                }
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let result = if is_dir {
                    fs::remove_dir_all(&path)
                } else {
                    fs::remove_file(&path)
                };
                absent_is_fine(result).map_err(failed(&path))?;
            }
            let record = dir.join(RECORD);
            absent_is_fine(fs::remove_file(&record)).map_err(failed(&record))?;
            absent_is_fine(fs::remove_dir(&dir)).map_err(failed(&dir))
        })
        .await
    }

    /// Ids of all pods that have a directory. Directories that are empty (a crash before the first record) are deleted.
    pub(crate) fn pods(&self) -> Result<Vec<SandboxId>, SandboxError> {
        let mut found = Vec::new();
        for entry in list(&self.pods)? {
            let Some(name) = entry
                .file_name()
                .and_then(|name| name.to_str())
                .map(str::to_owned)
            else {
                continue;
            };
            if !is_id(&name) {
                tracing::warn!(path = %entry.display(), "not a pod's directory, left alone");
                continue;
            }
            if !entry.join(RECORD).exists() {
                absent_is_fine(fs::remove_file(entry.join(format!("{RECORD}.tmp"))))
                    .map_err(SandboxError::io(format!("clean {}", entry.display())))?;
                if fs::remove_dir(&entry).is_ok() {
                    continue;
                }
            }
            found.push(SandboxId(name));
        }
        Ok(found)
    }

    pub(crate) fn read_pod(&self, id: &SandboxId) -> Result<PodRecord, SandboxError> {
        let path = self.pod_dir(id).join(RECORD);
        let record: PodRecord = read(&path)?;
        if record.id == *id {
            Ok(record)
        } else {
            Err(SandboxError::Record {
                path,
                reason: format!("it is the record of {}", record.id.0),
            })
        }
    }

    /// What a pod's container records say of images, for those among them that cannot be read, or for all.
    pub(crate) fn kept_images(&self, pod: &SandboxId, all: bool) -> KeptImages {
        let mut kept = KeptImages::default();
        let Ok(dirs) = list(&self.pod_dir(pod).join("containers")) else {
            kept.complete = false;
            return kept;
        };
        for path in dirs.into_iter().map(|dir| dir.join(RECORD)) {
            if !all && read::<ContainerRecord>(&path).is_ok() {
                continue;
            }
            match fs::read(&path) {
                Ok(bytes) => {
                    let mut found = mentioned_images(&bytes);
                    kept.complete &= !found.is_empty();
                    kept.ids.append(&mut found);
                }
                // Made, and the daemon ended before its first record.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(_) => kept.complete = false,
            }
        }
        kept
    }

    /// Every container of a pod that can be read, and for each that cannot the reason.
    pub(crate) fn read_containers(&self, pod: &SandboxId) -> (Vec<ContainerRecord>, Vec<SandboxError>) {
        let (mut records, mut failures) = (Vec::new(), Vec::new());
        match list(&self.pod_dir(pod).join("containers")) {
            Ok(dirs) => {
                for dir in dirs {
                    match read(&dir.join(RECORD)) {
                        Ok(record) => records.push(record),
                        Err(error) => failures.push(error),
                    }
                }
            }
            Err(error) => failures.push(error),
        }
        (records, failures)
    }
}

/// Images that records mention which cannot be read: they may be in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeptImages {
    pub(crate) ids: Vec<String>,
    /// False when a record does not even mention one.
    pub(crate) complete: bool,
}

impl Default for KeptImages {
    fn default() -> Self {
        Self {
            ids: Vec::new(),
            complete: true,
        }
    }
}

/// Ids of images that a damaged record mentions.
fn mentioned_images(bytes: &[u8]) -> Vec<String> {
    const PREFIX: &[u8] = b"sha256:";
    const DIGITS: usize = 64;
    let hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    bytes
        .windows(PREFIX.len() + DIGITS)
        .filter(|window| window.starts_with(PREFIX) && window.iter().skip(PREFIX.len()).all(hex))
        .map(|window| String::from_utf8_lossy(window).into_owned())
        .collect()
}

/// Whether this could be an id that we gave.
pub(crate) fn is_id(name: &str) -> bool {
    name.len() == 64
        && name
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A directory that only root may enter, with its parents.
pub(crate) fn private_dir(path: &Path) -> Result<(), SandboxError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(SandboxError::io(format!("make directory {}", path.display())))
}

/// Runs file work on a thread for it. The thread goes on when the caller is cancelled.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SandboxError> + Send + 'static,
) -> Result<T, SandboxError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(SandboxError::io("finish work on files")(std::io::Error::other(
            error,
        ))),
    }
}

pub(crate) fn absent_is_fine(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, SandboxError> {
    let what = || format!("list {}", dir.display());
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(SandboxError::io(what())(error)),
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(SandboxError::io(what()))?;
    paths.sort();
    Ok(paths)
}

fn digest(body: &serde_json::Value) -> String {
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(body.to_string().as_bytes()) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn encode<T: Serialize>(record: &T, dir: &Path) -> Result<Vec<u8>, SandboxError> {
    let refused = |error: serde_json::Error| SandboxError::Record {
        path: dir.join(RECORD),
        reason: error.to_string(),
    };
    let body = serde_json::to_value(record).map_err(refused)?;
    let envelope = Envelope {
        version: VERSION,
        sha256: digest(&body),
        body,
    };
    serde_json::to_vec_pretty(&envelope).map_err(refused)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if envelope.version != VERSION {
        return Err(format!("its version is {}, not {VERSION}", envelope.version));
    }
    if digest(&envelope.body) != envelope.sha256 {
        return Err("its checksum does not fit its content".into());
    }
    serde_json::from_value(envelope.body).map_err(|error| error.to_string())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, SandboxError> {
    let bytes = fs::read(path).map_err(SandboxError::io(format!("read {}", path.display())))?;
    decode(&bytes).map_err(|reason| SandboxError::Record {
        path: path.to_owned(),
        reason,
    })
}

fn write(dir: &Path, bytes: &[u8]) -> Result<(), SandboxError> {
    let path = dir.join(RECORD);
    let what = || format!("write {}", path.display());
    let new = !dir.exists();
    private_dir(dir)?;
    let temporary = dir.join(format!("{RECORD}.tmp"));
    let result = (|| {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        fs::File::open(dir)?.sync_all()?;
        if new && let Some(parent) = dir.parent() {
            fs::File::open(parent)?.sync_all()?;
        }
        Ok(())
    })();
    result.map_err(SandboxError::io(what()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ContainerRecord {
        ContainerRecord {
            id: ContainerId("c".repeat(64)),
            spec: spec::ContainerSpec {
                name: "a".into(),
                attempt: 0,
                labels: [("k".to_owned(), "v".to_owned())].into(),
                annotations: std::collections::BTreeMap::new(),
                image: spec::ContainerImage {
                    id: "sha256:00".into(),
                    user_reference: "x".into(),
                    reference: "x".into(),
                    disk: vec!["/x".into()],
                },
                guest: crate::guest::ContainerSpec {
                    process: Some(crate::guest::Process {
                        args: vec![b"\xff".to_vec()],
                        ..Default::default()
                    }),
                    ..Default::default()
                },
                files: vec![],
                volumes: vec![],
                disks: vec![],
                termination_file: None,
                log_path: None,
                stop_signal: 15,
                cpuset: crate::cpuset::Cpuset::default(),
                image_volumes: vec![],
                mounts: vec![],
            },
            created_at: SystemTime::now(),
            phase: ContainerPhase::Running {
                started_at: SystemTime::now(),
            },
            user: None,
            volumes: vec![],
        }
    }

    #[test]
    fn a_record_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let before = record();
        write(&path, &encode(&before, &path).unwrap()).unwrap();
        let after: ContainerRecord = read(&path.join(RECORD)).unwrap();
        assert_eq!(
            (after.spec, after.phase, after.created_at),
            (before.spec, before.phase, before.created_at)
        );
        assert!(!path.join("record.json.tmp").exists());
    }

    #[test]
    fn a_changed_torn_or_foreign_record_is_refused_by_name() {
        let good = String::from_utf8(encode(&record(), Path::new("/x")).unwrap()).unwrap();
        let refused = |text: &str| decode::<ContainerRecord>(text.as_bytes()).unwrap_err();
        assert!(refused(&good.replace("\"k\": \"v\"", "\"k\": \"w\"")).contains("checksum"));
        assert!(refused(&good.replace("\"version\": 1", "\"version\": 7")).contains("version is 7"));
        assert!(refused(&good[..good.len() / 2]).contains("EOF"));
    }

    #[test]
    fn only_our_own_ids_are_pods() {
        assert!(is_id(&"0a".repeat(32)));
        assert!(!is_id(&"0A".repeat(32)));
        assert!(!is_id("lost+found"));
    }
}
