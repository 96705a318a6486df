//! emptyDir on disk: a sparse ext4 image inside the volume's own host directory, where kubelet's accounting sees what it takes, and
//! where kubelet removes it with the volume.

use std::{fs, path::PathBuf};

use crate::{SandboxError, journal::absent_is_fine, scratch, volumes::host_path::HostPath};

/// The image's name in the host directory.
const IMAGE: &str = ".caisson-volume.img";

/// Makes the image unless it is there (the volume outlives a sandbox that had to be made anew). Blocking.
pub(crate) fn image(
    directory: &HostPath,
    root: &std::path::Path,
    bytes: u64,
) -> Result<PathBuf, SandboxError> {
    let image = directory.path.join(IMAGE);
    if image.exists() {
        return Ok(image);
    }
    let unfinished = directory.path.join(format!("{IMAGE}.new"));
    absent_is_fine(fs::remove_file(&unfinished))
        .map_err(SandboxError::io(format!("delete {}", unfinished.display())))?;
    scratch::copy(&scratch::template(root, bytes)?, &unfinished)?;
    fs::rename(&unfinished, &image).map_err(SandboxError::io(format!("rename {}", unfinished.display())))?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_made_once_and_a_torn_one_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join(format!("{IMAGE}.new")), "torn").unwrap();
        let place = HostPath::resolve(&volume).unwrap();
        let made = image(&place, dir.path(), 64 << 20).unwrap();
        assert_eq!(fs::metadata(&made).unwrap().len(), 64 << 20);
        fs::write(&made, "used").unwrap();
        assert_eq!(
            fs::read(image(&place, dir.path(), 64 << 20).unwrap()).unwrap(),
            b"used"
        );
    }
}
