//! Mounts of images (Kubernetes' image volumes): read-only, without set-user-id, devices or programs, from the image store.

use std::collections::BTreeMap;

use caisson_cri_api::v1;
use caisson_image::Image;
use caisson_sandbox::spec::{ImageVolume, MountRecord, MountedImage, Propagation};

use super::Refusals;

/// The images that mounts name, by the index of the mount.
pub type MountImages = BTreeMap<usize, Image>;

/// Index and name of each image that is to be mounted.
pub fn mounted_images(config: &v1::ContainerConfig) -> impl Iterator<Item = (usize, &str)> {
    config
        .mounts
        .iter()
        .enumerate()
        .filter_map(|(index, mount)| Some((index, mount.image.as_ref()?.image.as_str())))
}

/// The image volumes of a request, with what their containers' status answers.
pub(super) fn image_volumes(
    list: &[v1::Mount],
    images: &MountImages,
    refusals: &mut Refusals,
) -> Vec<(ImageVolume, MountRecord)> {
    let mut volumes = Vec::new();
    for (index, mount) in list.iter().enumerate() {
        let field = format!("config.mounts[{index}]");
        let Some(wanted) = &mount.image else {
            refusals.add_if(
                !mount.image_sub_path.is_empty(),
                &format!("{field}.image_sub_path"),
                "needs image",
            );
            continue;
        };
        let Some(image) = images.get(&index) else {
            refusals.add(format!("{field}.image.image"), "is missing");
            continue;
        };
        check(mount, &field, refusals);
        let volume = ImageVolume {
            image_id: image.id.clone(),
            disk: image.disk.clone(),
            container_path: mount.container_path.clone(),
            sub_path: mount.image_sub_path.clone(),
        };
        let record = MountRecord {
            host_path: String::new(),
            container_path: mount.container_path.clone(),
            readonly: true,
            recursive_readonly: false,
            propagation: Propagation::Private,
            image: Some(MountedImage {
                image: wanted.image.clone(),
                user_specified: wanted.user_specified_image.clone(),
                sub_path: mount.image_sub_path.clone(),
            }),
        };
        volumes.push((volume, record));
    }
    volumes
}

fn check(mount: &v1::Mount, field: &str, refusals: &mut Refusals) {
    refusals.add_if(
        !mount.host_path.is_empty(),
        &format!("{field}.host_path"),
        "and image exclude each other",
    );
    let leaves = |path: &str| path.split('/').any(|part| part == "..") || path.contains('\0');
    refusals.add_if(
        !mount.container_path.starts_with('/') || leaves(&mount.container_path),
        &format!("{field}.container_path"),
        "is not an absolute path without \"..\"",
    );
    refusals.add_if(
        mount.image_sub_path.starts_with('/') || leaves(&mount.image_sub_path),
        &format!("{field}.image_sub_path"),
        "is not a relative path without \"..\"",
    );
    refusals.add_if(
        mount.propagation != v1::MountPropagation::PropagationPrivate as i32,
        &format!("{field}.propagation"),
        "nothing is mounted below an image",
    );
    if let Some(image) = &mount.image {
        super::handler(
            &format!("{field}.image.runtime_handler"),
            &image.runtime_handler,
            refusals,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn image() -> Image {
        Image {
            id: "sha256:9".into(),
            repo_tags: vec![],
            repo_digests: vec![],
            size_bytes: 1,
            pinned: false,
            config: caisson_image::ImageConfig::default(),
            disk: vec!["/images/9".into()],
            pulled_at: SystemTime::UNIX_EPOCH,
        }
    }

    fn mount(sub_path: &str) -> v1::Mount {
        v1::Mount {
            container_path: "/models".into(),
            image: Some(v1::ImageSpec {
                image: "r/models:1".into(),
                user_specified_image: "models:1".into(),
                ..Default::default()
            }),
            image_sub_path: sub_path.into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_image_is_mounted_read_only_whatever_the_request_says() {
        let config = v1::ContainerConfig {
            mounts: vec![v1::Mount::default(), mount("small/v2")],
            ..Default::default()
        };
        assert_eq!(mounted_images(&config).collect::<Vec<_>>(), [(1, "r/models:1")]);
        let mut refusals = Refusals::default();
        let got = image_volumes(&config.mounts, &[(1, image())].into(), &mut refusals);
        refusals.settle(()).unwrap();
        let [(volume, record)] = got.as_slice() else {
            panic!("{got:?}");
        };
        assert_eq!(
            (volume.image_id.as_str(), volume.sub_path.as_str()),
            ("sha256:9", "small/v2")
        );
        assert!(record.readonly);
        assert_eq!(record.image.as_ref().unwrap().user_specified, "models:1");
    }

    #[test]
    fn what_no_image_can_be_is_refused_by_its_place() {
        let cases = [
            (
                v1::Mount {
                    host_path: "/x".into(),
                    ..mount("")
                },
                "config.mounts[0].host_path: and image exclude",
            ),
            (
                mount("../etc"),
                "config.mounts[0].image_sub_path: is not a relative",
            ),
            (
                mount("/etc"),
                "config.mounts[0].image_sub_path: is not a relative",
            ),
            (
                v1::Mount {
                    container_path: "models".into(),
                    ..mount("")
                },
                "config.mounts[0].container_path",
            ),
            (
                v1::Mount {
                    propagation: 1,
                    ..mount("")
                },
                "config.mounts[0].propagation",
            ),
            (
                v1::Mount {
                    image: None,
                    ..mount("a")
                },
                "config.mounts[0].image_sub_path: needs image",
            ),
        ];
        for (mount, words) in cases {
            let mut refusals = Refusals::default();
            image_volumes(&[mount], &[(0, image())].into(), &mut refusals);
            assert!(refusals.to_string().contains(words), "{refusals}");
        }
    }
}
