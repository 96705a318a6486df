//! Images as volumes, as kubelet passes them: an image in a mount, and a part of it.

use std::fs;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{pod, records},
    crictl::Crictl,
    host::Host,
    image::{Image, Layer},
    node::{Node, node},
    run,
};
use serde_json::{Value, json};

#[test]
fn images_are_mounted_read_only_whole_or_in_part() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon,
            registry,
        } = node(&host).await?;
        let layer = Layer::default()
            .directory("small", 0o755)?
            .directory("small/v2", 0o755)?
            .file("small/v2/weights", 0o644, b"forty-two\n")?
            .file("run.sh", 0o4755, b"#!/bin/sh\necho ran\n")?
            .symlink("latest", "/small/v2")?
            .symlink("out", "../../../etc")?
            .gzip()?;
        let models = registry.push("test/models", "1", &Image::new(vec![layer], &json!({})))?;
        cri.pull(&models).await?;
        let crictl = Crictl::new(&daemon)?;

        let pod_config = pod(&host, "volumes");
        let pod_id = cri.run_pod(&pod_config).await?;
        let pod_file = host.dir().join("pod.json");
        fs::write(
            &pod_file,
            json!({"metadata": {"name": "volumes", "namespace": "default", "uid": "uid-volumes", "attempt": 0}}).to_string(),
        )?;
        let mount = |at: &str, part: &str| json!({"container_path": at, "readonly": true, "image": {"image": models, "user_specified_image": models}, "image_sub_path": part});
        // crictl and not the client of the other tests, which does not know these fields.
        let create = |name: &str, mounts: Vec<Value>, script: &str| -> Result<String> {
            let file = host.dir().join(format!("{name}.json"));
            let config = json!({
                "metadata": {"name": name},
                "image": {"image": image},
                "command": ["sh", "-c", script],
                "log_path": format!("{name}.log"),
                "mounts": mounts,
            });
            fs::write(&file, config.to_string())?;
            let (file, pod_file) = (file.display().to_string(), pod_file.display().to_string());
            crictl.run(&["create", &pod_id, &file, &pod_file])
        };

        let script = "cat /models/small/v2/weights /part/weights /linked/weights /file; \
                      touch /models/x 2>&1; touch /part/weights 2>&1; \
                      /models/run.sh 2>&1; sh /models/run.sh; \
                      grep -c ' /models .*nosuid,nodev,noexec' /proc/mounts";
        let mounts = vec![
            mount("/models", ""),
            mount("/part", "small/v2"),
            mount("/linked", "latest"),
            mount("/file", "small/v2/weights"),
        ];
        let id = create("whole", mounts, script)?;
        cri.start(&id).await?;
        cri.exited(&id).await?;
        let log = fs::read_to_string(host.log_dir("volumes")?.join("whole.log"))?;
        let lines: Vec<String> = records(&log)?.into_iter().map(|(_, _, text)| text).collect();
        ensure!(
            lines.iter().filter(|line| *line == "forty-two").count() == 4
                && lines
                    .iter()
                    .filter(|line| line.contains("Read-only file system"))
                    .count()
                    == 2
                && lines.iter().any(|line| line.contains("Permission denied"))
                && lines.iter().any(|line| line == "ran")
                && lines.last().map(String::as_str) == Some("1"),
            "{lines:?}"
        );
        let shown: Value = serde_json::from_str(&crictl.run(&["inspect", &id])?)?;
        let mounts = shown["status"]["mounts"].as_array().context("no mounts")?;
        ensure!(
            mounts.len() == 4
                && mounts[1]["image"]["image"] == models.as_str()
                && mounts[1]["imageSubPath"] == "small/v2"
                && mounts[1]["readonly"] == true,
            "{mounts:?}"
        );

        // What is not there is an error that says so; a link leads nowhere outside.
        for (name, part, words) in [
            ("missing", "small/v3", "small/v3"),
            ("outside", "out/passwd", "out/passwd"),
        ] {
            let error = create(name, vec![mount("/models", part)], "true")
                .err()
                .with_context(|| format!("{part} of an image was mounted"))?;
            ensure!(error.to_string().contains(words), "{error}");
        }
        let unknown = json!({"container_path": "/models", "image": {"image": "test/nowhere:1"}});
        let error = create("unknown", vec![unknown], "true")
            .err()
            .context("an image that is not there was mounted")?;
        ensure!(error.to_string().contains("test/nowhere"), "{error}");

        // The image is free again when the last that used it is gone.
        cri.remove(&id).await?;
        let id = create(
            "again",
            vec![mount("/models", "")],
            "cat /models/small/v2/weights",
        )?;
        cri.start(&id).await?;
        ensure!(cri.exited(&id).await?.exit_code == 0);
        Ok(())
    })
}
