//! `make critest`: critest against the real daemon on a scratch host, judged by docs/conformance.md.
//!
//! ```text
//! critest [--focus REGEXP] [--skip REGEXP] [--benchmark] [--attempts N] [--containerd] [--report DIRECTORY] [-- CRITEST-FLAGS...]
//! critest --table OURS.json THEIRS.json
//! ```
//! With `--containerd`, Debian's containerd and runc are run instead, and nothing is judged: theirs is the column to compare with.
//! Fails on every spec that fails and is not listed there, and on every listed one that passes: the list may not grow old.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_e2e::{
    aftermath::Watch,
    cache, checkout,
    containerd::Containerd,
    critest_benchmark, critest_images,
    critest_report::{self, State},
    daemon::{Daemon, Product},
    host::Host,
    registry::Registry,
    run,
};
use nix::mount::{MntFlags, umount2};

/// The one port that the images' mirrors name.
const REGISTRY_PORT: u16 = 5000;

/// No spec needs a pod for so long, not even in an emulated machine.
const OLD: Duration = Duration::from_secs(45);

#[derive(Default)]
struct Arguments {
    report: Option<PathBuf>,
    partial: bool,
    containerd: bool,
    benchmark: bool,
    table: Vec<PathBuf>,
    critest: Vec<String>,
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    if let [ours, theirs] = arguments.table.as_slice() {
        let columns = [("Caisson", ours), ("containerd", theirs)];
        let columns = columns.map(|(name, path)| Ok((name.to_owned(), critest_report::read(path)?)));
        print!(
            "{}",
            critest_report::table(&columns.into_iter().collect::<Result<Vec<_>>>()?)
        );
        return Ok(());
    }
    let program =
        std::env::var_os("CAISSON_CRITEST").map_or_else(|| cache().join("bin/critest"), PathBuf::from);
    ensure!(
        program.exists(),
        "{} is missing: run `make critest`",
        program.display()
    );
    if arguments.containerd {
        return reference(&program, &arguments);
    }
    let product = Product::find()?;
    let exceptions = exceptions()?;
    let host = Host::enter()?;
    let outcome = run(async {
        let registry = Registry::start_at(&host.dir().join("registry"), REGISTRY_PORT).await?;
        let digest = critest_images::push_all(&registry)?;
        let program = with_digest(&program, &digest, host.dir())?;
        let config = host.dir().join("config.toml");
        fs::write(&config, mirrors())?;
        let config = config.display().to_string();
        let mut daemon = Daemon::start(&host, &product, &["--config", &config]).await?;
        let before = host.leftovers()?;
        let watch = Watch::start(host.dir().join("run"), OLD);
        let report = judge(&program, &daemon.socket(), &arguments, host.dir())?;
        if let Some(directory) = &arguments.report {
            fs::create_dir_all(directory)?;
            for (file, name) in [
                (report.clone(), "critest.json"),
                (host.dir().join("junit.xml"), "junit.xml"),
                (host.dir().join("caissond.log"), "caissond.log"),
            ] {
                fs::copy(&file, directory.join(name))
                    .with_context(|| format!("cannot copy {}", file.display()))?;
            }
        }
        drop(watch);
        clear_own_mounts()?;
        let left = host.leftovers()?.nothing_new_since(&before);
        daemon.terminate().await?;
        Ok((report, left))
    });
    let (report, left) = outcome?;
    verdict(&report, &exceptions, arguments.partial)?;
    left
}

/// critest's spec of `rshared` mounts a directory of the host's on itself, and when its container is refused it does not get as far as to
/// unmount it.
fn clear_own_mounts() -> Result<()> {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let own = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| point.starts_with("/tmp/test") && point.ends_with("/mnt"));
    for point in own {
        umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {point}"))?;
    }
    Ok(())
}

fn arguments() -> Result<Arguments> {
    let mut parsed = Arguments::default();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--focus" | "--skip" => {
                parsed.partial = true;
                parsed
                    .critest
                    .push(format!("-ginkgo.{}={}", &word[2..], value()?));
            }
            "--containerd" => parsed.containerd = true,
            "--table" => {
                parsed.table.push(value()?.into());
                parsed.table.push(value()?.into());
            }
            "--report" => parsed.report = Some(value()?.into()),
            // What passes at a later attempt is told of at the end.
            "--attempts" => parsed
                .critest
                .push(format!("-ginkgo.flake-attempts={}", value()?)),
            "--benchmark" => {
                parsed.partial = true;
                parsed.benchmark = true;
                parsed
                    .critest
                    .extend(["-benchmark".into(), "-ginkgo.focus=benchmark".into()]);
            }
            "--" => parsed.critest.extend(words.by_ref()),
            _ => bail!("unknown argument {word:?}"),
        }
    }
    Ok(parsed)
}

/// The same for the runtime that ours is compared with.
fn reference(program: &Path, arguments: &Arguments) -> Result<()> {
    Containerd::fetch()?;
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start_at(&host.dir().join("registry"), REGISTRY_PORT).await?;
        let program = with_digest(program, &critest_images::push_all(&registry)?, host.dir())?;
        let containerd = Containerd::start(&host, &critest_images::REGISTRIES, REGISTRY_PORT).await?;
        let report = judge(&program, &containerd.socket(), arguments, host.dir())?;
        println!(
            "{}",
            critest_report::table(&[(Containerd::versions()?, critest_report::read(&report)?)])
        );
        if let Some(directory) = &arguments.report {
            fs::create_dir_all(directory)?;
            fs::copy(&report, directory.join("containerd.json"))?;
        }
        Ok(())
    })
}

/// critest asks for one image by the digest that the original has, which nobody can rebuild; the copy asks for ours.
fn with_digest(program: &Path, digest: &str, dir: &Path) -> Result<PathBuf> {
    const BEFORE: &[u8] = b"test-image-digest@sha256:";
    let hex = digest
        .strip_prefix("sha256:")
        .context("a digest of another kind")?;
    let mut bytes = fs::read(program)?;
    let at = bytes
        .windows(BEFORE.len())
        .position(|window| window == BEFORE)
        .context("critest no longer asks for test-image-digest by digest")?
        + BEFORE.len();
    bytes
        .get_mut(at..at + hex.len())
        .context("critest is cut off")?
        .copy_from_slice(hex.as_bytes());
    let copy = dir.join("critest");
    fs::write(&copy, bytes)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy)
}

/// Configuration: every registry that critest names is mirrored by ours.
fn mirrors() -> String {
    let entries = critest_images::REGISTRIES
        .map(|registry| format!("{registry:?} = [\"http://127.0.0.1:{REGISTRY_PORT}\"]\n"));
    format!("[images.mirrors]\n{}", entries.concat())
}

/// Runs critest, its output as it comes; answers its report.
fn judge(program: &Path, socket: &Path, arguments: &Arguments, dir: &Path) -> Result<PathBuf> {
    let endpoint = format!("unix://{}", socket.display());
    let report = dir.join("critest.json");
    let (parameters, samples) = (dir.join("benchmark.yaml"), dir.join("benchmark"));
    let mut benchmark = Vec::new();
    if arguments.benchmark {
        fs::write(&parameters, critest_benchmark::PARAMETERS)?;
        fs::create_dir(&samples)?;
        benchmark = vec![
            format!("-benchmarking-params-file={}", parameters.display()),
            format!("-benchmarking-output-dir={}", samples.display()),
        ];
    }
    let began = Instant::now();
    let status = Command::new(program)
        .current_dir(dir)
        .args(benchmark)
        .args(["-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
        .args([
            "-ginkgo.no-color",
            "-ginkgo.timeout=2h",
            "-ginkgo.poll-progress-after=5m",
        ])
        .arg(format!("-ginkgo.json-report={}", report.display()))
        .arg(format!(
            "-ginkgo.junit-report={}",
            dir.join("junit.xml").display()
        ))
        .args(&arguments.critest)
        .stdin(Stdio::null())
        .status()?;
    println!(
        "critest ended with {status} after {} s",
        began.elapsed().as_secs()
    );
    ensure!(report.exists(), "critest ended with {status} and wrote no report");
    if arguments.benchmark {
        println!("{}", critest_benchmark::table(&samples)?);
    }
    Ok(report)
}

/// The specs that docs/conformance.md says cannot pass: its lines that begin with "- `".
fn exceptions() -> Result<BTreeSet<String>> {
    let path = checkout().join("docs/conformance.md");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            line.strip_prefix("- `")?
                .split_once('`')
                .map(|(spec, _)| spec.to_owned())
        })
        .collect())
}

fn verdict(report: &Path, exceptions: &BTreeSet<String>, partial: bool) -> Result<()> {
    let mut passed = BTreeSet::new();
    let mut failed = BTreeSet::new();
    let mut skipped = 0;
    for spec in critest_report::read(report)? {
        if spec.attempts > 1 && spec.state == State::Passed {
            println!("passed at attempt {}: {}", spec.attempts, spec.name);
        }
        match spec.state {
            State::Passed => drop(passed.insert(spec.name)),
            State::Skipped => skipped += 1,
            State::Failed => drop(failed.insert(spec.name)),
        }
    }
    println!(
        "{} passed, {} failed, {skipped} skipped",
        passed.len(),
        failed.len()
    );
    let unexpected: Vec<_> = failed.difference(exceptions).cloned().collect();
    ensure!(
        unexpected.is_empty(),
        "failed, and not in docs/conformance.md:\n  {}",
        unexpected.join("\n  ")
    );
    let outgrown: Vec<_> = exceptions.intersection(&passed).cloned().collect();
    ensure!(
        outgrown.is_empty(),
        "listed in docs/conformance.md, but they pass:\n  {}",
        outgrown.join("\n  ")
    );
    ensure!(!passed.is_empty(), "no spec was run");
    if !partial {
        let unknown: Vec<_> = exceptions.difference(&failed).cloned().collect();
        ensure!(
            unknown.is_empty(),
            "listed in docs/conformance.md, but not run:\n  {}",
            unknown.join("\n  ")
        );
    }
    Ok(())
}
