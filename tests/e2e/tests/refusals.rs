//! Bad input: each gets the CRI's proper code and a message that names what was tried, within a deadline, and leaves nothing behind.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    host::Host,
    image::{self, Image, Layer},
    registry::Registry,
    run,
};
use k8s_cri::v1 as cri;
use serde_json::json;
use tonic::{Code, Status};

/// The error of a call that must fail with `code` and a message that contains every one of `words`.
fn refused<T>(result: Result<T, Status>, code: Code, words: &[&str]) -> Result<()> {
    let status = result
        .err()
        .with_context(|| format!("a call that should answer {code:?} ({words:?}) succeeded"))?;
    ensure!(
        status.code() == code,
        "expected {code:?}, got {:?}: {}",
        status.code(),
        status.message()
    );
    for word in words {
        ensure!(
            status.message().contains(word),
            "no {word:?} in: {}",
            status.message()
        );
    }
    Ok(())
}

#[test]
fn unknown_ids_wrong_states_and_malformed_requests_are_refused_by_name() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("test/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;

        // Unknown ids: an error where there must be something, none where nothing is wanted.
        refused(cri.pod_status("nowhere").await, Code::NotFound, &["nowhere"])?;
        refused(cri.status("nowhere").await, Code::NotFound, &["nowhere"])?;
        refused(cri.start("nowhere").await, Code::NotFound, &["nowhere"])?;
        refused(cri.exec("nowhere", &["true"]).await, Code::NotFound, &["nowhere"])?;
        cri.stop_pod("nowhere").await?;
        cri.remove_pod("nowhere").await?;
        cri.stop("nowhere", 0).await?;
        cri.remove("nowhere").await?;
        cri.remove_image("nowhere/at:all").await?;
        ensure!(cri.image("nowhere/at:all").await?.is_none());

        // Requests that are not whole, or ask for what a VM cannot give.
        let request = cri::RunPodSandboxRequest {
            config: None,
            runtime_handler: String::new(),
        };
        refused(
            cri.runtime.run_pod_sandbox(request).await,
            Code::InvalidArgument,
            &["config"],
        )?;
        let mut config = pod(&host, "refused");
        config.metadata = None;
        refused(cri.run_pod(&config).await, Code::InvalidArgument, &["metadata"])?;
        let request = cri::RunPodSandboxRequest {
            config: Some(pod(&host, "refused")),
            runtime_handler: "runc".into(),
        };
        refused(
            cri.runtime.run_pod_sandbox(request).await,
            Code::InvalidArgument,
            &["runc"],
        )?;
        for (field, options) in [
            (
                "network",
                cri::NamespaceOption {
                    network: cri::NamespaceMode::Node.into(),
                    ..Default::default()
                },
            ),
            (
                "ipc",
                cri::NamespaceOption {
                    ipc: cri::NamespaceMode::Node.into(),
                    ..Default::default()
                },
            ),
        ] {
            let mut config = pod(&host, "refused");
            config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            });
            let error = cri
                .run_pod(&config)
                .await
                .err()
                .with_context(|| format!("host {field} was accepted"))?;
            ensure!(error.message().contains(field), "{error}");
        }
        let mut config = pod(&host, "refused");
        config
            .linux
            .get_or_insert_default()
            .sysctls
            .insert("no.such.parameter".into(), "1".into());
        let error = cri
            .run_pod(&config)
            .await
            .err()
            .context("a sysctl that does not exist was accepted")?;
        ensure!(error.message().contains("no.such.parameter"), "{error}");
        ensure!(cri.pods().await?.is_empty(), "a refused pod is listed");
        host.leftovers()?.nothing_new_since(&before)?;

        // Containers.
        let config = pod(&host, "states");
        let pod_id = cri.run_pod(&config).await?;
        refused(
            cri.create("nowhere", &container("c", &image, &["true"]), &config)
                .await,
            Code::NotFound,
            &["nowhere"],
        )?;
        refused(
            cri.create(&pod_id, &container("c", &image, &["true"]), &config)
                .await,
            Code::NotFound,
            &["test/busybox"],
        )?;
        cri.pull(&image).await?;
        let id = cri
            .create(&pod_id, &container("c", &image, &["true"]), &config)
            .await?;
        let error = cri
            .exec(&id, &["true"])
            .await
            .err()
            .context("a command ran in a container that was not started")?;
        ensure!(error.message().contains(&id[..12]), "{error}");
        cri.start(&id).await?;
        cri.exited(&id).await?;
        let error = cri
            .start(&id)
            .await
            .err()
            .context("an exited container was started")?;
        ensure!(error.code() == Code::FailedPrecondition, "{error}");
        let mut unknown_user = container("user", &image, &["true"]);
        unknown_user.linux.get_or_insert_default().security_context =
            Some(cri::LinuxContainerSecurityContext {
                run_as_username: "nobody-knows".into(),
                ..Default::default()
            });
        let started = match cri.create(&pod_id, &unknown_user, &config).await {
            Ok(id) => cri.start(&id).await,
            Err(error) => Err(error),
        };
        let error = started.err().context("a user that does not exist was accepted")?;
        ensure!(error.message().contains("nobody-knows"), "{error}");
        cri.stop_pod(&pod_id).await?;
        let error = cri
            .create(&pod_id, &container("late", &image, &["true"]), &config)
            .await
            .err();
        ensure!(
            error.is_some_and(|e| e.code() == Code::FailedPrecondition),
            "a container was created in a stopped pod"
        );
        cri.remove_pod(&pod_id).await?;

        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn pulls_that_cannot_work_say_why_and_leave_nothing() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        let stored = || -> Result<Vec<String>> {
            let mut found = Vec::new();
            for dir in ["root/images/images", "root/images/layers", "root/images/tmp"] {
                for entry in fs::read_dir(host.dir().join(dir))?.flatten() {
                    found.push(entry.path().display().to_string());
                }
            }
            Ok(found)
        };

        refused(
            cri.pull("Not A Reference").await,
            Code::InvalidArgument,
            &["Not A Reference"],
        )?;
        refused(
            cri.pull(&registry.reference("no/such:image")).await,
            Code::NotFound,
            &["no/such"],
        )?;
        let error = cri
            .pull("127.0.0.1:1/nobody/home:1")
            .await
            .err()
            .context("a pull from nobody succeeded")?;
        ensure!(error.message().contains("127.0.0.1:1"), "{error}");

        // Layers that try to leave the tree, or to be more than they say.
        let hostile: [(&str, Layer); 3] = [
            (
                "traversal",
                Layer::default().raw(tar::EntryType::Regular, "../../etc/owned", None, b"x")?,
            ),
            (
                "hard-link",
                Layer::default().raw(tar::EntryType::Link, "passwd", Some("../../../etc/passwd"), b"")?,
            ),
            (
                "garbage",
                Layer::default().raw(tar::EntryType::Regular, "ok", None, b"x")?,
            ),
        ];
        for (name, layer) in hostile {
            let mut layer = layer.gzip()?;
            if name == "garbage" {
                layer.bytes = b"this is no gzip stream".to_vec();
                layer.digest = image::digest(&layer.bytes);
            }
            let reference = registry.push(
                &format!("hostile/{name}"),
                "1",
                &Image::new(vec![layer], &json!({})),
            )?;
            let error = cri
                .pull(&reference)
                .await
                .err()
                .with_context(|| format!("hostile layer {name} was accepted"))?;
            ensure!(error.code() != Code::Ok && !error.message().is_empty(), "{error}");
            ensure!(stored()?.is_empty(), "hostile layer {name} left {:?}", stored()?);
        }
        // A config that lies about a layer's content.
        let mut liar = Image::new(vec![image::busybox_layer()?], &json!({}));
        liar.config["rootfs"]["diff_ids"] = json!([image::digest(b"something else")]);
        let error = cri
            .pull(&registry.push("hostile/liar", "1", &liar)?)
            .await
            .err()
            .context("a wrong diff_id was accepted")?;
        ensure!(error.message().contains("sha256:"), "{error}");
        ensure!(stored()?.is_empty(), "{:?}", stored()?);
        Ok(())
    })
}

/// RunPodSandbox must fail with these words, and leave nothing.
async fn no_pod(host: &Host, cri: &mut Cri, name: &str, words: &[&str]) -> Result<()> {
    let before = host.leftovers()?;
    let result = tokio::time::timeout(Duration::from_secs(120), cri.run_pod(&pod(host, name))).await;
    let error = result
        .context("no answer within a deadline")?
        .err()
        .context("a pod ran that could not")?;
    for word in words {
        ensure!(
            error.message().contains(word),
            "no {word:?} in: {}",
            error.message()
        );
    }
    ensure!(cri.pods().await?.is_empty(), "a pod that failed is listed");
    host.leftovers()?.nothing_new_since(&before)
}

#[test]
fn a_vm_that_never_comes_up_is_reported_with_its_console_and_undone() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        // An initramfs without an agent: the kernel panics, and its last words are in the error.
        let mut product = Product::find()?;
        product.initramfs = host.dir().join("empty.cpio");
        let archive = std::process::Command::new("sh")
            .arg("-c")
            .arg("cpio -o --format=newc --quiet < /dev/null")
            .output()?;
        fs::write(&product.initramfs, archive.stdout)?;
        let daemon = Daemon::start(&host, &product, &[]).await?;
        let mut cri = daemon.cri().await?;
        no_pod(&host, &mut cri, "panics", &["panic"]).await
    })
}

#[test]
fn a_cni_plugin_that_fails_or_hangs_is_reported_and_rolled_back() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let bin = host.dir().join("cni/bin");
        fs::create_dir_all(&bin)?;
        let plugin = |script: &str| -> Result<()> {
            let path = bin.join("broken");
            fs::write(
                &path,
                format!(
                    "#!/bin/sh\necho $CNI_COMMAND >> {}/calls\n{script}",
                    bin.display()
                ),
            )?;
            Ok(fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?)
        };
        let conflist = host.cni_conf_dir().join("10-pods.conflist");
        let good = fs::read_to_string(&conflist)?;
        let mut broken: serde_json::Value = serde_json::from_str(&good)?;
        broken["plugins"]
            .as_array_mut()
            .context("no plugins")?
            .push(json!({ "type": "broken" }));
        plugin(
            "cat > /dev/null\nif [ $CNI_COMMAND = ADD ]; then echo '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"out of luck\"}'; exit 1; fi",
        )?;
        fs::write(&conflist, broken.to_string())?;

        let bin_dir = bin.display().to_string();
        let config = host.dir().join("config.toml");
        fs::write(&config, "[network]\nplugin_deadline_seconds = 3\n")?;
        let daemon = Daemon::start(
            &host,
            &Product::find()?,
            &[
                "--cni-bin-dir",
                &bin_dir,
                "--config",
                &config.display().to_string(),
            ],
        )
        .await?;
        let mut cri = daemon.cri().await?;
        no_pod(&host, &mut cri, "unlucky", &["broken", "out of luck"]).await?;
        ensure!(
            fs::read_to_string(bin.join("calls"))?.contains("ADD\nDEL"),
            "a failed ADD was not followed by DEL"
        );
        plugin("if [ $CNI_COMMAND = ADD ]; then exec sleep 1000; fi")?;
        no_pod(&host, &mut cri, "hangs", &["broken"]).await?;

        // Without any configuration the node says so, and becomes ready by itself when there is one.
        fs::remove_file(&conflist)?;
        let network_ready = async |cri: &mut Cri| -> Result<(bool, String)> {
            let status = cri
                .runtime
                .status(cri::StatusRequest { verbose: false })
                .await?
                .into_inner();
            let conditions = status.status.context("no status")?.conditions;
            let network = conditions
                .into_iter()
                .find(|c| c.r#type == "NetworkReady")
                .context("no NetworkReady")?;
            Ok((network.status, network.message))
        };
        let (ready, why) = network_ready(&mut cri).await?;
        ensure!(!ready && why.contains("net.d"), "{why}");
        fs::write(&conflist, good)?;
        ensure!(network_ready(&mut cri).await?.0);
        Ok(())
    })
}

/// A small file system below a host's directory; unmounted at the end.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: std::path::PathBuf, bytes: u64) -> Result<Self> {
        fs::create_dir_all(&path)?;
        let options = format!("size={bytes}");
        nix::mount::mount(
            Some("small"),
            &path,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_is_named_and_nothing_is_left_on_it() -> Result<()> {
    let host = Host::enter()?;
    let disk = SmallDisk::mount(host.dir().join("root"), 24 << 20)?;
    let before = host.leftovers()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        // Zeroes are small on their way and large where they arrive.
        let layer = Layer::default()
            .file("zeroes", 0o644, &vec![0x55; 64 << 20])?
            .gzip()?;
        let large = registry.push("test/large", "1", &Image::new(vec![layer], &json!({})))?;
        let small = registry.push("test/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        refused(
            cri.pull(&large).await,
            Code::ResourceExhausted,
            &["no space left", "root/images"],
        )?;
        ensure!(
            cri.image(&large).await?.is_none(),
            "an image that does not fit is listed"
        );
        for dir in ["images", "tmp"] {
            let mut left = fs::read_dir(disk.0.join("images").join(dir))?;
            ensure!(left.next().is_none(), "the pull left files in {dir}");
        }
        cri.pull(&small).await?;

        let filler = disk.0.join("filler");
        let fill = || -> Result<()> {
            let mut file = fs::File::create(&filler)?;
            while std::io::Write::write(&mut file, &[0; 4096]).is_ok_and(|written| written > 0) {}
            Ok(())
        };
        let config = pod(&host, "full");
        // At first there is no template of the pods' disks, later there is.
        for _ in 0..2 {
            fill()?;
            refused(
                cri.run_pod(&config).await,
                Code::ResourceExhausted,
                &["root", "space"],
            )?;
            ensure!(cri.pods().await?.is_empty(), "a pod that failed is listed");
            fs::remove_file(&filler)?;
            host.leftovers()?.nothing_new_since(&before)?;
            let pod_id = cri.run_pod(&config).await?;
            // A disk that fills up under a pod does not keep it from ending.
            fill()?;
            let id = cri
                .run(&pod_id, &container("c", &small, &["sh", "-c", "exit 3"]), &config)
                .await;
            match id {
                Ok(id) => ensure!(cri.exited(&id).await?.exit_code == 3),
                Err(error) => ensure!(error.code() == Code::ResourceExhausted, "{error}"),
            }
            cri.stop_pod(&pod_id).await?;
            cri.remove_pod(&pod_id).await?;
            fs::remove_file(&filler)?;
            host.leftovers()?.nothing_new_since(&before)?;
        }
        Ok(())
    })
}
