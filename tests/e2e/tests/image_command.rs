//! `caissond image`: an archive becomes an image, with and without a daemon, and the CRI knows it.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    daemon::{Daemon, Product},
    host::{Host, command},
    image, run,
};
use serde_json::{Value, json};

/// An archive as `docker save` writes it, of the image with this name.
fn archive(host: &Host, name: &str) -> Result<std::path::PathBuf> {
    let directory = host.dir().join("saved");
    fs::create_dir(&directory)?;
    let busybox = image::busybox()?;
    let layer = busybox.layers.first().context("busybox has no layer")?;
    fs::write(directory.join("layer.tar"), &layer.bytes)?;
    fs::write(
        directory.join("config.json"),
        serde_json::to_vec(&busybox.config)?,
    )?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(directory.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
    let archive = host.dir().join("saved.tar");
    command(
        Command::new("tar")
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(&directory)
            .args(["layer.tar", "config.json", "manifest.json"]),
    )?;
    Ok(archive)
}

/// Runs `caissond image` on the test's directories: whether it succeeded, and what it said.
fn caissond(host: &Host, words: &[&str]) -> Result<(bool, String)> {
    let path = |part: &str| host.dir().join(part);
    let output = Command::new(Product::find()?.bin.join("caissond"))
        .arg("image")
        .args(words)
        .arg("--root")
        .arg(path("root"))
        .arg("--run-dir")
        .arg(path("run"))
        .arg("--listen")
        .arg(path("run/caisson.sock"))
        .output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    ))
}

fn succeeds(host: &Host, words: &[&str]) -> Result<String> {
    let (success, said) = caissond(host, words)?;
    ensure!(success, "caissond image {words:?}: {said}");
    Ok(said)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the test's directory is not UTF-8")
}

#[test]
fn an_archive_becomes_an_image_with_a_daemon_and_without() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let name = "registry.example/busybox:saved";
        let archive = archive(&host, name)?;

        // Nobody serves: the store is opened by the command.
        let said = succeeds(&host, &["import", "--pin", text(&archive)?])?;
        ensure!(said.contains(name) && said.starts_with("sha256:"), "{said}");

        // The daemon finds it, and is asked from then on.
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let mut cri = daemon.cri().await?;
        let found = cri.image(name).await?.context("the imported image is unknown")?;
        ensure!(found.pinned && found.repo_tags == [name], "{found:?}");
        succeeds(&host, &["unpin", name])?;
        ensure!(!cri.image(name).await?.context("unknown")?.pinned);

        let other = "registry.example/other:v1";
        succeeds(&host, &["import", "--name", other, text(&archive)?])?;
        let list: Value = serde_json::from_str(&succeeds(&host, &["list", "--json"])?)?;
        ensure!(list["images"][0]["repoTags"] == json!([name, other]), "{list}");
        let (success, said) = caissond(&host, &["pin", "registry.example/absent"])?;
        ensure!(!success && said.contains("absent"), "{said}");
        let (success, said) = caissond(&host, &["import", "/etc/hostname"])?;
        ensure!(!success && said.contains("/etc/hostname"), "{said}");
        drop(daemon);
        Ok(())
    })
}
