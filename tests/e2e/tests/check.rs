//! `caissond check` and `--help`: what a person sees before there is any pod.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{daemon::Product, host::Host};

fn caissond(product: &Product, host: &Host, more: &[&str]) -> Result<Output> {
    let mut command = Command::new(product.bin.join("caissond"));
    command
        .arg("--root")
        .arg(host.dir().join("root"))
        .arg("--run-dir")
        .arg(host.dir().join("run"));
    command
        .arg("--cni-conf-dir")
        .arg(host.cni_conf_dir())
        .arg("--cni-bin-dir")
        .arg(Host::cni_bin_dir());
    Ok(command.args(more).output()?)
}

#[test]
fn check_tells_what_the_host_can_do_and_what_is_missing() -> Result<()> {
    let host = Host::enter()?;
    let product = Product::find()?;
    let (kernel, initramfs) = (
        product.kernel.display().to_string(),
        product.initramfs.display().to_string(),
    );

    let good = caissond(
        &product,
        &host,
        &["--kernel", &kernel, "--initramfs", &initramfs, "check", "--json"],
    )?;
    let text = String::from_utf8(good.stdout)?;
    ensure!(
        good.status.success(),
        "a host that runs the other tests is called unfit: {text}"
    );
    let report: serde_json::Value = serde_json::from_str(&text)?;
    let findings = report["findings"].as_array().context("no findings")?;
    let finding = |subject: &str| findings.iter().find(|finding| finding["subject"] == subject);
    for subject in [
        "KVM",
        "hypervisor",
        "tun",
        "vhost-net",
        "cgroups",
        "CNI",
        "guest kernel",
        "guest initramfs",
    ] {
        ensure!(finding(subject).is_some(), "nothing is said of {subject}: {text}");
    }
    // The driver that is named is one, and why it was taken is said.
    let hypervisor = finding("hypervisor").context("no hypervisor")?["found"]
        .as_str()
        .unwrap_or_default();
    ensure!(hypervisor.contains("KVM"), "{hypervisor}");

    let bad = caissond(
        &product,
        &host,
        &["--kernel", "/no/such/kernel", "--initramfs", &initramfs, "check"],
    )?;
    let text = String::from_utf8(bad.stdout)?;
    ensure!(
        bad.status.code() == Some(1),
        "a missing kernel is no obstacle: {text}"
    );
    ensure!(
        text.contains("/no/such/kernel") && text.contains("make guest"),
        "{text}"
    );
    // A check changes nothing.
    ensure!(
        !host.dir().join("root").exists() && !host.dir().join("run").exists(),
        "check made directories"
    );
    Ok(())
}

#[test]
fn a_daemon_that_cannot_be_configured_says_everything_that_is_wrong_at_once() -> Result<()> {
    let host = Host::enter()?;
    let product = Product::find()?;
    let config = host.dir().join("bad.toml");
    std::fs::write(
        &config,
        "[network]\nplugin_deadline_seconds = 0\n[no_such_section]\nx = 1\n",
    )?;
    let output = caissond(
        &product,
        &host,
        &["--config", &config.display().to_string(), "serve"],
    )?;
    let text = String::from_utf8(output.stderr)? + &String::from_utf8(output.stdout)?;
    ensure!(!output.status.success(), "a bad configuration was accepted");
    for word in ["plugin_deadline_seconds", "no_such_section", "bad.toml"] {
        ensure!(text.contains(word), "no {word} in: {text}");
    }
    Ok(())
}
