//! `make demo`: a pod of two containers in a microVM, from pull to removal, with nothing left behind.
//!
//! Everything happens on a scratch host (own network and mount namespaces, a temporary directory), with a real registry and real CNI
//! plugins. Each step is printed with the time it took.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    daemon::{Daemon, Product},
    eventually,
    host::{Host, text},
    image,
    registry::Registry,
    run,
};

fn main() -> Result<()> {
    let product = Product::find()?;
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let registry = step("registry with an image of Debian's busybox", async {
            let registry = Registry::start(&host.dir().join("registry")).await?;
            registry.push("demo/busybox", "1", &image::busybox()?)?;
            Ok(registry)
        })
        .await?;
        let reference = registry.reference("demo/busybox:1");
        let mut daemon = step("caissond", Daemon::start(&host, &product, &[])).await?;
        let mut cri = daemon.cri().await?;
        say(&text(
            std::process::Command::new(product.bin.join("caissond")).arg("--version"),
        )?);
        hypervisor(&mut cri).await?;
        step("pull (registry -> EROFS, nothing unpacked on the host)", async {
            Ok(cri.pull(&reference).await?)
        })
        .await?;

        let config = pod(&host, "demo");
        let pod_id = step("RunPodSandbox: network, VM, agent", async {
            Ok(cri.run_pod(&config).await?)
        })
        .await?;
        let (_, info) = cri.pod_status(&pod_id).await?;
        boot_times(&info);
        let web = container(
            "web",
            &reference,
            &["httpd", "-f", "-v", "-p", "80", "-h", "/www"],
        );
        let greeter = container(
            "greeter",
            &reference,
            &[
                "sh",
                "-c",
                "echo hello from $(uname -s) $(uname -r); exec sleep 1000",
            ],
        );
        let web = step("container web", async {
            Ok(cri.run(&pod_id, &web, &config).await?)
        })
        .await?;
        let greeter_id = step("container greeter", async {
            Ok(cri.run(&pod_id, &greeter, &config).await?)
        })
        .await?;

        let ip = cri
            .pod_ips(&pod_id)
            .await?
            .into_iter()
            .next()
            .context("the pod has no address")?;
        step("exec in greeter", async {
            let (code, stdout, stderr) = cri
                .exec(
                    &greeter_id,
                    &["sh", "-c", "hostname; ip -4 addr show eth0 | grep inet"],
                )
                .await?;
            ensure!(code == 0, "exec exited with {code}: {stderr}");
            say(&stdout);
            Ok(())
        })
        .await?;
        step(&format!("page from http://{ip}/"), async {
            let page = eventually("the page", Duration::from_secs(20), async || fetch(&ip).ok()).await?;
            say(&page);
            Ok(())
        })
        .await?;
        step("logs", async {
            for name in ["greeter", "web"] {
                let path = host.log_dir("demo")?.join(format!("{name}.log"));
                let log = eventually("a log line", Duration::from_secs(20), async || {
                    std::fs::read_to_string(&path).ok().filter(|log| !log.is_empty())
                })
                .await?;
                for line in log.lines() {
                    say(&format!("{name}: {line}"));
                }
            }
            Ok(())
        })
        .await?;
        step("StopPodSandbox", async { Ok(cri.stop_pod(&pod_id).await?) }).await?;
        step("RemovePodSandbox, RemoveImage", async {
            cri.remove_pod(&pod_id).await?;
            cri.remove_image(&reference).await?;
            for container in [&web, &greeter_id] {
                ensure!(
                    cri.status(container).await.is_err(),
                    "container {container} is still known"
                );
            }
            Ok(())
        })
        .await?;
        step(
            "nothing is left: processes, links, mounts, firewall rules, files",
            async { host.leftovers()?.nothing_new_since(&before) },
        )
        .await?;
        daemon.terminate().await
    })?;
    println!("\n{HOW_TO_GO_ON}");
    Ok(())
}

/// Runs one step and prints it with its time; a line of progress for each second that it takes longer.
async fn step<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let start = Instant::now();
    let mut out = std::io::stdout();
    write!(out, "{what:.<62} ")?;
    out.flush()?;
    tokio::pin!(work);
    let result = loop {
        match tokio::time::timeout(Duration::from_secs(1), &mut work).await {
            Ok(result) => break result,
            Err(_still_running) => {
                write!(out, ".")?;
                out.flush()?;
            }
        }
    };
    match &result {
        Ok(_) => println!(" {:6.2} s", start.elapsed().as_secs_f64()),
        Err(_) => println!(" failed after {:.2} s", start.elapsed().as_secs_f64()),
    }
    for line in notes::take() {
        println!("    {line}");
    }
    result.with_context(|| format!("step '{what}'"))
}

/// Lines that a step wants printed below it.
mod notes {
    use std::cell::RefCell;
    thread_local!(static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) });
    pub(crate) fn add(text: &str) {
        LINES.with_borrow_mut(|lines| lines.extend(text.lines().map(String::from)));
    }
    pub(crate) fn take() -> Vec<String> {
        LINES.take()
    }
}

fn say(text: &str) {
    notes::add(text);
}

/// Which hypervisor, and why: the daemon's own words.
async fn hypervisor(cri: &mut Cri) -> Result<()> {
    let status = cri
        .runtime
        .status(k8s_cri::v1::StatusRequest { verbose: true })
        .await?
        .into_inner();
    for condition in status.status.map(|status| status.conditions).unwrap_or_default() {
        ensure!(
            condition.status,
            "{} is false: {} {}",
            condition.r#type,
            condition.reason,
            condition.message
        );
    }
    let description = status
        .info
        .get("hypervisor")
        .and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    if let Some(description) = description
        .as_ref()
        .and_then(|value| value["description"].as_str())
    {
        println!("    {description}");
    }
    Ok(())
}

/// The boot split, as the daemon measured it.
fn boot_times(info: &std::collections::HashMap<String, String>) {
    let Some(info) = info
        .get("info")
        .and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok())
    else {
        return;
    };
    if let Some(timings) = info.get("timings_ms").and_then(|t| t.as_object()) {
        let parts: Vec<String> = timings
            .iter()
            .map(|(step, ms)| format!("{step} {ms} ms"))
            .collect();
        println!("    {}", parts.join(", "));
    }
}

/// The page at port 80 of an address, by hand, as a browser would.
fn fetch(ip: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&format!("{ip}:80").parse()?, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET / HTTP/1.0\r\nHost: {ip}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.contains(" 200 "), "the web server answered {head}");
    Ok(body.trim().to_owned())
}

const HOW_TO_GO_ON: &str = "\
To go on by hand with crictl (README, \"A pod by hand\"):
  make crictl                      # builds crictl into ~/.cache/caisson/bin
  make registry                    # in a terminal of its own: images for it
  make run                         # in another: caissond in the foreground, state below /tmp/caisson
  ~/.cache/caisson/bin/crictl -r unix:///tmp/caisson/run/caisson.sock -t 60s info";
