//! ImageFsInfo: what images, and what the pods' writable disks, take of the host's disk; kubelet's garbage collection goes by it.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use caisson_cri_api::v1;
use caisson_image::Usage;

use crate::{answer, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    _: v1::ImageFsInfoRequest,
) -> Result<v1::ImageFsInfoResponse, RpcError> {
    let images = runtime.images.usage().await?;
    let root = runtime.settings.sandboxes_root.clone();
    let disks = tokio::task::spawn_blocking({
        let root = root.clone();
        move || walk(&root)
    })
    .await
    .map_err(|_| RpcError::TaskLost("measure the writable disks"))?
    .map_err(|source| RpcError::Io {
        what: format!("measure the writable disks in {}", root.display()),
        source,
    })?;
    Ok(v1::ImageFsInfoResponse {
        image_filesystems: vec![filesystem(runtime.images.root(), images)],
        container_filesystems: vec![filesystem(&root, disks)],
    })
}

fn filesystem(mountpoint: &Path, usage: Usage) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: answer::nanos(SystemTime::now()),
        fs_id: Some(v1::FilesystemIdentifier {
            mountpoint: mountpoint.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(v1::UInt64Value {
            value: usage.used_bytes,
        }),
        inodes_used: Some(v1::UInt64Value {
            value: usage.inodes_used,
        }),
    }
}

/// Allocated bytes (the disks are sparse) and inodes below a directory. What vanishes meanwhile counts as nothing.
fn walk(root: &Path) -> std::io::Result<Usage> {
    let mut usage = Usage {
        used_bytes: 0,
        inodes_used: 0,
    };
    let mut pending: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            usage.used_bytes += metadata.blocks() * 512;
            usage.inodes_used += 1;
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_disk_counts_by_its_blocks() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("pod")).unwrap();
        let disk = std::fs::File::create(dir.path().join("pod/disk")).unwrap();
        disk.set_len(1 << 30).unwrap();
        let usage = walk(dir.path()).unwrap();
        assert_eq!(usage.inodes_used, 2);
        assert!(usage.used_bytes < 1 << 20);
        assert_eq!(walk(&dir.path().join("gone")).unwrap().inodes_used, 0);
    }
}
