//! The README's example by hand: crictl, built from its own sources, with no help of ours.

use std::fs;

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    checkout,
    crictl::Crictl,
    daemon::{Daemon, Product},
    eventually,
    host::Host,
    image,
    registry::Registry,
    run,
};

#[test]
fn crictl_runs_the_pod_of_the_readme() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("demo/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let crictl = Crictl::new(&daemon)?;
        let crictl = |arguments: &[&str]| crictl.run(arguments);

        // The README's files, with this test's registry and directories in place of the reader's.
        let readme = fs::read_to_string(checkout().join("README.md"))?;
        let file = |name: &str| -> Result<String> {
            let after = readme
                .split_once(&format!("cat >{name} <<EOF\n"))
                .with_context(|| format!("no {name} in the README"))?
                .1;
            let content = after
                .split_once("\nEOF\n")
                .with_context(|| format!("{name} has no end in the README"))?
                .0;
            let content = content
                .replace("127.0.0.1:5000/demo/busybox:1", &image)
                .replace("/tmp/caisson/logs", &host.log_dir("hello")?.display().to_string());
            let path = host.dir().join(name);
            fs::write(&path, content)?;
            Ok(path.display().to_string())
        };
        let (pod, container) = (file("pod.json")?, file("container.json")?);

        ensure!(crictl(&["version"])?.contains("caisson"));
        crictl(&["pull", &image])?;
        ensure!(crictl(&["images"])?.contains("demo/busybox"));
        let pod_id = crictl(&["runp", &pod])?;
        let id = crictl(&["create", &pod_id, &container, &pod])?;
        crictl(&["start", &id])?;
        ensure!(crictl(&["ps"])?.contains(&id[..12]));
        eventually(
            "the container's log",
            std::time::Duration::from_secs(20),
            async || {
                crictl(&["logs", &id])
                    .ok()
                    .filter(|log| log.contains("hello from a VM"))
            },
        )
        .await?;
        ensure!(crictl(&["exec", "-s", &id, "uname", "-s"])? == "Linux");
        // What a person asks of a pod that runs.
        let stats = crictl(&["stats", "-s", "1"])?;
        ensure!(stats.contains(&id[..12]) && stats.contains("CPU %"), "{stats}");
        let stats = crictl(&["statsp", "-s", "1"])?;
        ensure!(stats.contains(&pod_id[..12]), "{stats}");
        ensure!(crictl(&["metricsp"])?.contains("container_memory_working_set_bytes"));
        ensure!(crictl(&["metricdescs"])?.contains("container_cpu_usage_seconds_total"));
        crictl(&["update", "--memory", "67108864", &id])?;
        ensure!(crictl(&["inspect", &id])?.contains("\"memoryLimitInBytes\": \"67108864\""));
        let info: serde_json::Value = serde_json::from_str(&crictl(&["info"])?)?;
        ensure!(
            info["runtimeHandlers"]
                .as_array()
                .is_some_and(|handlers| !handlers.is_empty()),
            "{info:#}"
        );
        // Prefixes of ids are enough, as with other runtimes.
        crictl(&["inspect", &id[..12]])?;
        crictl(&["inspectp", &pod_id[..12]])?;
        crictl(&["stopp", &pod_id[..12]])?;
        crictl(&["rmp", &pod_id[..12]])?;
        ensure!(crictl(&["pods", "-q"])?.is_empty());
        host.leftovers()?.nothing_new_since(&before)
    })
}
