//! `caissond image`: an archive becomes an image and an image an archive, with and without a daemon, and the CRI knows it.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    daemon::{Daemon, Product},
    host::{self, Host, command},
    image, run,
};
use serde_json::{Value, json};

/// An archive as `docker save` writes it, of the image with this name.
fn archive(host: &Host, name: &str) -> Result<std::path::PathBuf> {
    let directory = host.dir().join("saved");
    fs::create_dir(&directory)?;
    let busybox = image::busybox()?;
    let mut layers = Vec::new();
    for (number, layer) in busybox.layers.iter().enumerate() {
        layers.push(format!("layer-{number}.tar"));
        fs::write(directory.join(&layers[number]), &layer.bytes)?;
    }
    fs::write(
        directory.join("config.json"),
        serde_json::to_vec(&busybox.config)?,
    )?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": layers }]);
    fs::write(directory.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
    let archive = host.dir().join("saved.tar");
    command(
        Command::new("tar")
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(&directory)
            .args(["config.json", "manifest.json"])
            .args(&layers),
    )?;
    Ok(archive)
}

/// Runs `caissond image` on the test's directories.
fn caissond(host: &Host, words: &[&str]) -> Result<Output> {
    caissond_in(host, "root", words)
}

/// ... with the store below a directory of this name.
fn caissond_in(host: &Host, root: &str, words: &[&str]) -> Result<Output> {
    let path = |part: &str| host.dir().join(part);
    Ok(Command::new(Product::find()?.bin.join("caissond"))
        .arg("image")
        .args(words)
        .arg("--root")
        .arg(path(root))
        .arg("--run-dir")
        .arg(path("run"))
        .arg("--listen")
        .arg(path("run/caisson.sock"))
        .output()?)
}

/// What it answered.
fn succeeds(host: &Host, words: &[&str]) -> Result<String> {
    let output = caissond(host, words)?;
    ensure!(output.status.success(), "caissond image {words:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Why it did not do it.
fn fails(host: &Host, words: &[&str]) -> Result<String> {
    let output = caissond(host, words)?;
    ensure!(
        !output.status.success(),
        "caissond image {words:?} succeeded: {output:?}"
    );
    Ok(String::from_utf8(output.stderr)?)
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
        let said = fails(&host, &["pin", "registry.example/absent"])?;
        ensure!(said.contains("absent"), "{said}");
        let said = fails(&host, &["import", "/etc/hostname"])?;
        ensure!(said.contains("/etc/hostname"), "{said}");
        let exported = exported_beside_a_daemon(&host, name)?;
        drop(daemon);
        it_is_the_same_in_another_store(&host, name, &exported)?;
        damage_is_found_and_repaired(&host, &archive)
    })
}

/// An archive of an image, in place and whole, or not there.
fn exported_beside_a_daemon(host: &Host, name: &str) -> Result<std::path::PathBuf> {
    let directory = host.dir().join("exported");
    fs::create_dir(&directory)?;
    let file = directory.join("image.tar");
    let said = succeeds(host, &["export", name, text(&file)?])?;
    ensure!(said.starts_with("sha256:") && said.contains(name), "{said}");
    let said = fails(host, &["export", "registry.example/absent", text(&file)?])?;
    ensure!(said.contains("absent"), "{said}");
    let said = fails(host, &["export", name, "/dev/null"])?;
    ensure!(said.contains("/dev/null"), "{said}");
    ensure!(
        fs::read_dir(&directory)?.count() == 1,
        "something was left behind"
    );

    // The same by a pipe: what is for people is not in it.
    let output = caissond(host, &["export", name, "-"])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(
        output.stdout == fs::read(&file)?,
        "a pipe gets another archive than a file"
    );
    Ok(file)
}

/// Out of the archive comes what the first store has, file by file.
fn it_is_the_same_in_another_store(host: &Host, name: &str, archive: &Path) -> Result<()> {
    let output = caissond_in(host, "other", &["import", text(archive)?])?;
    ensure!(output.status.success(), "{output:?}");
    let output = caissond_in(host, "other", &["list", "--json"])?;
    let list: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(list["images"][0]["repoTags"] == json!([name]), "{list}");
    for (kind, extension) in [("layers", "layer"), ("images", "metadata")] {
        let stored = |root: &str| contents(&host.dir().join(root).join("images").join(kind), extension);
        let (here, there) = (stored("root")?, stored("other")?);
        ensure!(
            !here.is_empty() && here == there,
            "the {kind} of the stores differ"
        );
    }

    // Without a daemon, and what became of the layers once stays.
    let again = host.dir().join("exported/again.tar");
    let output = caissond_in(host, "other", &["export", name, text(&again)?])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(
        fs::read(&again)? == fs::read(archive)?,
        "an export of an export is another archive"
    );
    Ok(())
}

/// What the files with this extension hold, whatever their names.
fn contents(directory: &Path, extension: &str) -> Result<Vec<Vec<u8>>> {
    let mut contents = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            contents.push(fs::read(path)?);
        }
    }
    contents.sort();
    Ok(contents)
}

/// One bit of a stored layer: who reads every byte finds it, and a new import mends it.
fn damage_is_found_and_repaired(host: &Host, archive: &Path) -> Result<()> {
    succeeds(host, &["check"])?;
    let layer = largest_file(&host.dir().join("root"))?;
    let mut bytes = fs::read(&layer)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, bytes)?;
    let said = fails(host, &["check"])?;
    ensure!(said.contains(text(&layer)?), "{said}");
    let said = fails(host, &["check", "--remove"])?;
    ensure!(!layer.exists(), "{said}");
    let list: Value = serde_json::from_str(&succeeds(host, &["list", "--json"])?)?;
    ensure!(list["images"] == json!([]), "{list}");
    succeeds(host, &["import", text(archive)?])?;
    ensure!(layer.exists(), "{} is not back", layer.display());
    succeeds(host, &["check"])?;
    Ok(())
}

fn largest_file(directory: &Path) -> Result<std::path::PathBuf> {
    let listed = host::text(
        Command::new("find")
            .arg(directory)
            .args(["-type", "f", "-printf", "%s %p\\n"]),
    )?;
    let files = listed.lines().filter_map(|line| line.split_once(' '));
    let largest = files.max_by_key(|(size, _)| size.parse::<u64>().unwrap_or(0));
    Ok(largest.context("the store is empty")?.1.into())
}
