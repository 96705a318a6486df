//! emptyDir on disk: a sparse ext4 image inside the volume's own host directory, where kubelet's accounting sees what it takes, and
//! where kubelet removes it with the volume.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use crate::{SandboxError, journal::absent_is_fine, scratch, volumes::host_path::HostPath};

/// The image's name in the host directory.
const IMAGE: &str = ".caisson-volume.img";

/// Makes the image unless it is there (the volume outlives a sandbox that had to be made anew). Blocking.
///
/// The directory is open to everybody, so what is there under the image's name is taken only when nobody else can have put it there.
pub(crate) fn image(
    directory: &HostPath,
    root: &std::path::Path,
    bytes: u64,
) -> Result<PathBuf, SandboxError> {
    let image = directory.path.join(IMAGE);
    match fs::symlink_metadata(&image) {
        Ok(found)
            if found.is_file()
                && found.nlink() == 1
                && found.uid() == rustix::process::geteuid().as_raw() =>
        {
            return Ok(image);
        }
        Ok(_) => {
            return Err(SandboxError::Invalid {
                what: format!("content of the emptyDir, {IMAGE},"),
                reason: "it was not made by this daemon".into(),
            });
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(SandboxError::io(format!("inspect {}", image.display()))(error)),
    }
    let unfinished = directory.path.join(format!("{IMAGE}.new"));
    absent_is_fine(fs::remove_file(&unfinished))
        .map_err(SandboxError::io(format!("delete {}", unfinished.display())))?;
    let template = scratch::template(root, bytes)?;
    let made = scratch::copy(&template, &unfinished).and_then(|()| {
        fs::rename(&unfinished, &image).map_err(SandboxError::io(format!("rename {}", unfinished.display())))
    });
    if made.is_err()
        && let Err(error) = absent_is_fine(fs::remove_file(&unfinished))
    {
        tracing::debug!(path = %unfinished.display(), %error, "unfinished disk of an emptyDir not removed");
    }
    made.map(|()| image)
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

    #[test]
    fn what_somebody_else_has_put_there_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let place = HostPath::resolve(dir.path()).unwrap();
        fs::write(dir.path().join("secret"), "of the host").unwrap();
        let image_path = dir.path().join(IMAGE);
        let refused = || {
            image(&place, dir.path(), 64 << 20)
                .unwrap_err()
                .to_string()
                .contains(IMAGE)
        };
        std::os::unix::fs::symlink("secret", &image_path).unwrap();
        assert!(refused());
        fs::remove_file(&image_path).unwrap();
        fs::hard_link(dir.path().join("secret"), &image_path).unwrap();
        assert!(refused());
    }
}
