//! Images through the CRI: by tag, by digest, one id, and gone when removed.

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    daemon::{Daemon, Product},
    host::Host,
    image::{self, Image, Layer},
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;
use serde_json::json;

#[test]
fn an_image_has_one_id_and_goes_with_its_tags() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let layer = Layer::default().file("hello", 0o644, b"hello\n")?.gzip()?;
        let image = Image::new(
            vec![image::busybox_layer()?, layer],
            &json!({ "User": "www-data", "Cmd": ["sh"] }),
        );
        let one = registry.push("test/image", "one", &image)?;
        let two = registry.push("test/image", "two", &image)?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;

        let id = cri.pull(&one).await?;
        ensure!(cri.pull(&two).await? == id, "two tags of one image have two ids");
        let status = cri.image(&one).await?.context("a pulled image is unknown")?;
        ensure!(
            status.id == id && status.id == image::digest(&serde_json::to_vec(&image.config)?),
            "{status:?}"
        );
        ensure!(
            status.repo_tags == [one.clone(), two.clone()],
            "{:?}",
            status.repo_tags
        );
        ensure!(
            status.username == "www-data" && status.uid.is_none(),
            "{status:?}"
        );
        ensure!(status.size > 0);
        let by_digest = status.repo_digests.first().context("no digest")?.clone();
        ensure!(cri.pull(&by_digest).await? == id);
        for name in [id.as_str(), &id[..19], by_digest.as_str()] {
            ensure!(
                cri.image(name).await?.is_some_and(|found| found.id == id),
                "{name} is unknown"
            );
        }
        let list = cri
            .images
            .list_images(cri::ListImagesRequest { filter: None })
            .await?
            .into_inner()
            .images;
        ensure!(list.len() == 1, "{list:?}");
        let usage = cri
            .images
            .image_fs_info(cri::ImageFsInfoRequest {})
            .await?
            .into_inner();
        let filesystem = usage.image_filesystems.first().context("no image file system")?;
        let path = &filesystem.fs_id.as_ref().context("no path")?.mountpoint;
        ensure!(std::path::Path::new(path).is_dir(), "{path} is no directory");
        ensure!(
            filesystem
                .used_bytes
                .as_ref()
                .is_some_and(|used| used.value > 1 << 20),
            "{filesystem:?}"
        );

        // In use: the name goes, the container goes on; the daemon answers for both.
        let config = pod(&host, "image");
        let pod_id = cri.run_pod(&config).await?;
        let container_id = cri
            .run(&pod_id, &container("c", &one, &["sleep", "1000"]), &config)
            .await?;
        let (code, stdout, _) = cri
            .exec(&container_id, &["sh", "-c", "cat /hello; id -u"])
            .await?;
        ensure!(code == 0 && stdout == "hello\n33\n", "{stdout}");
        let status = cri.status(&container_id).await?;
        ensure!(
            status.image_ref == id || status.image_ref == by_digest,
            "{status:?}"
        );
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        cri.remove_image(&two).await?;
        ensure!(
            cri.image(&one).await?.is_none(),
            "removal by one tag left the other"
        );
        cri.remove_image(&two).await?;
        let left: Vec<_> = ["root/images/images", "root/images/layers"]
            .into_iter()
            .flat_map(|dir| std::fs::read_dir(host.dir().join(dir)))
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}
