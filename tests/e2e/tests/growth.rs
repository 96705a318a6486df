//! VMs that change while they run: disks go with the containers that needed them, memory comes with new limits.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    eventually,
    host::Host,
    image::{Image, Layer, busybox_layer},
    node::{Node, node},
    registry::Registry,
    run, skipped,
};
use k8s_cri::v1 as cri;
use serde_json::json;
use tonic::Code;

/// An image like busybox, but another one.
fn variant(number: u32) -> Result<Image> {
    let layer = Layer::default().file("number", 0o644, number.to_string().as_bytes())?;
    Ok(Image::new(vec![busybox_layer()?, layer.gzip()?], &json!({})))
}

#[test]
fn a_pod_uses_more_images_one_after_another_than_its_vm_has_slots() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let config = host.dir().join("config.toml");
        fs::write(&config, "[vm]\nattach_slots = 2\n")?;
        let config = config.display().to_string();
        let mut daemon = Daemon::start(&host, &Product::find()?, &["--config", &config]).await?;
        let mut cri = daemon.cri().await?;
        let pod_config = pod(&host, "slots");
        let mut images = Vec::new();
        for number in 0..4 {
            let image = registry.push(&format!("test/variant{number}"), "1", &variant(number)?)?;
            cri.pull(&image).await?;
            images.push(image);
        }
        let pod_id = cri.run_pod(&pod_config).await?;
        let stays = container("stays", &images[0], &["sleep", "1000"]);
        let stays = cri.run(&pod_id, &stays, &pod_config).await?;
        for (number, image) in images.iter().enumerate().skip(1) {
            let name = format!("c{number}");
            let config = container(&name, image, &["sleep", "1000"]);
            let id = cri.run(&pod_id, &config, &pod_config).await?;
            let (_, text, _) = cri.exec(&id, &["cat", "/number"]).await?;
            ensure!(text == number.to_string(), "image {number} is {text:?}");
            if number == 2 {
                // A daemon that was killed meanwhile takes disks away all the same.
                daemon.kill()?;
                daemon.start_again().await?;
                cri = daemon.cri().await?;
            }
            cri.stop(&id, 0).await?;
            cri.remove(&id).await?;
            let (_, disks, _) = cri.exec(&stays, &["sh", "-c", "ls -d /sys/block/vd*"]).await?;
            ensure!(
                disks.lines().count() == 2,
                "the writable disk and one image: {disks}"
            );
        }
        // What two containers have stays for the second.
        let second = container("second", &images[0], &["sleep", "1000"]);
        let second = cri.run(&pod_id, &second, &pod_config).await?;
        cri.stop(&stays, 0).await?;
        cri.remove(&stays).await?;
        ensure!(cri.exec(&second, &["cat", "/number"]).await?.1 == "0");
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}

/// Memory in MiB and CPUs, as a container's processes see them.
async fn seen(cri: &mut Cri, id: &str) -> Result<(u64, u64)> {
    let script = "awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo; grep -c ^processor /proc/cpuinfo";
    let (code, text, errors) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code == 0, "{errors}");
    let mut lines = text.lines().map(str::parse);
    let mut next = || lines.next().context("too few lines");
    Ok((next()??, next()??))
}

#[test]
fn a_vm_grows_when_the_limits_of_its_pod_or_a_container_do() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "grows");
        let pod_id = cri.run_pod(&config).await?;
        let id = cri
            .run(&pod_id, &container("c", &image, &["sleep", "1000"]), &config)
            .await?;
        let (memory, cpus) = seen(&mut cri, &id).await?;
        ensure!(memory < 512 && cpus == 1, "{memory} MiB, {cpus} CPUs");

        let limits = |mib: i64, cpus: i64| cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: mib << 20,
                cpu_period: 100_000,
                cpu_quota: cpus * 100_000,
                ..Default::default()
            }),
            ..Default::default()
        };
        // No more CPUs than at boot, unless the configuration says so.
        let wanted_cpus = 1;
        match cri
            .runtime
            .update_container_resources(limits(900, wanted_cpus))
            .await
        {
            Ok(_) => {}
            Err(error)
                if error.code() == Code::FailedPrecondition && error.message().contains("cannot grow") =>
            {
                skipped("VMs of this host's driver cannot grow");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        let (memory, cpus) = seen(&mut cri, &id).await?;
        ensure!(
            memory > 800 && cpus == u64::try_from(wanted_cpus)?,
            "{memory} MiB, {cpus} CPUs"
        );
        // It can be used: more than the VM had at first. To touch so much takes minutes on an emulated machine.
        let script = ["sh", "-c", "dd if=/dev/zero of=/dev/null bs=600M count=1"];
        let (code, _, errors) = cri.exec_within(&id, &script, 300).await?;
        ensure!(code == 0, "{errors}");

        // The VM stays as it is when limits fall, and a new daemon knows its size.
        cri.runtime.update_container_resources(limits(100, 1)).await?;
        daemon.terminate().await?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        cri.runtime.update_container_resources(limits(850, 1)).await?;
        ensure!(seen(&mut cri, &id).await?.0 > 800);
        let (_, info) = cri.pod_status(&pod_id).await?;
        let info: serde_json::Value = serde_json::from_str(info.get("info").context("no info")?)?;
        ensure!(
            info["vm"] == json!({ "memory_mib": 900, "vcpus": wanted_cpus }),
            "{info}"
        );

        // And it lives as any other: a new container, and an end that leaves nothing.
        let other = cri
            .run(&pod_id, &container("other", &image, &["sleep", "1000"]), &config)
            .await?;
        eventually("output of a new container", Duration::from_secs(30), async || {
            cri.exec(&other, &["true"]).await.ok().filter(|done| done.0 == 0)
        })
        .await?;
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}
