//! Block devices of the host in containers.

use std::fs;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::pod,
    host::Host,
    node::{Node, node},
    run,
    volumes::{Loop, fails, sh, sleeper},
};
use k8s_cri::v1 as cri;

#[test]
fn a_disk_of_the_host_is_a_disk_of_its_containers_only() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let file = host.dir().join("disk");
        let disk = Loop::new(&file, 16 << 20)?;
        let config = pod(&host, "block");
        let pod_id = cri.run_pod(&config).await?;
        let device = |inside: &str, permissions: &str| cri::Device {
            host_path: disk.0.display().to_string(),
            container_path: inside.into(),
            permissions: permissions.into(),
        };
        let mut writer = sleeper("writer", &image, &[]);
        writer.devices = vec![device("/dev/data", "rwm")];
        let writer = cri.run(&pod_id, &writer, &config).await?;
        let mut reader = sleeper("reader", &image, &[]);
        reader.devices = vec![device("/disks/data", "rm")];
        let reader = cri.run(&pod_id, &reader, &config).await?;
        let bystander = cri
            .run(&pod_id, &sleeper("bystander", &image, &[]), &config)
            .await?;

        // Not synced by the container: its end brings it to the host.
        sh(
            &mut cri,
            &writer,
            "test -b /dev/data && echo from the guest | dd of=/dev/data bs=512 seek=3 conv=sync 2>/dev/null",
        )
        .await?;
        fails(
            &mut cri,
            &reader,
            "echo x > /disks/data",
            "Operation not permitted",
        )
        .await?;
        fails(
            &mut cri,
            &bystander,
            "mknod /tmp/disk b 254 0 && cat /tmp/disk",
            "Operation not permitted",
        )
        .await?;
        cri.stop(&writer, 0).await?;
        let content = fs::read(&file)?;
        let found = content.get(3 * 512..3 * 512 + 14);
        ensure!(found == Some(b"from the guest"), "{found:?}");
        ensure!(
            sh(
                &mut cri,
                &reader,
                "dd if=/disks/data bs=512 skip=3 count=1 2>/dev/null | head -c 14"
            )
            .await?
                == "from the guest"
        );

        let mut bad = sleeper("bad", &image, &[]);
        bad.devices = vec![cri::Device {
            host_path: "/dev/nowhere".into(),
            ..device("/dev/x", "rwm")
        }];
        let error = cri
            .create(&pod_id, &bad, &config)
            .await
            .err()
            .context("accepted")?;
        ensure!(
            error.message().contains("config.devices[0]") && error.message().contains("/dev/nowhere"),
            "{error}"
        );
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
