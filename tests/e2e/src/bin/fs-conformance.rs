//! `make fs-conformance`: what pjdfstest and fsx say of the file systems that a container sees, next to the host's own.
//!
//! pjdfstest tries every file system call for its effects and errors, as root and as others; fsx writes, maps, truncates and punches a file at
//! random and compares it with what it should hold. Both are Rust crates (tests/peers.sh). docs/storage.md lists what is known to fail
//! and why: whatever else fails is an error, and so is a listed test that passes. `fs-conformance [NAME...]` tries some of the file systems.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cache, checkout,
    cri::{Cri, container, pod, security},
    host::Host,
    image::{Image, Layer, busybox_layer},
    node::{Node, node_with},
    run,
    volumes::{Mounted, kubelet_volume, mount},
};
use serde_json::json;

/// Operations of fsx on each file system.
const OPERATIONS: &str = "3000";

/// Longest time for each program, seconds; guests may be emulated.
const LIMIT: i64 = 1800;

/// Users that are in the image, and on Debian.
const CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["www-data", "www-data"]]
"#;

/// File systems by the name that the table gives them: a directory on each, in the container. Of one length: where its own is nine
/// characters, pjdfstest 0.2.2 cannot make the longest path (it counts down from zero).
const PLACES: [(&str, &str); 4] = [
    ("root file system", "/work"),
    ("emptyDir", "/disk"),
    ("emptyDir, medium Memory", "/hold"),
    ("hostPath", "/host"),
];

/// What pjdfstest said of one file system: its tests by how they ended.
#[derive(Default)]
struct Results {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
    skipped: BTreeSet<String>,
}

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |place: &str| wanted.is_empty() || wanted.iter().any(|name| name == place);
    let known = known(&fs::read_to_string(checkout().join("docs/storage.md"))?);
    let host = Host::enter()?;
    let own = on_host(&host)?;
    let guest = run(in_guest(&host, is_wanted))?;
    println!("\n| file system | passed | failed | skipped | fsx |");
    println!("|---|---:|---:|---:|---|");
    line("the host's own", &own, "fine");
    let mut surprises = Vec::new();
    for (place, results, fsx) in &guest {
        line(place, results, if *fsx { "fine" } else { "failed" });
        surprises.extend((!fsx).then(|| format!("{place}: fsx failed")));
        let listed = known.get(*place).map(Vec::as_slice).unwrap_or_default();
        let expected = |test: &str| listed.iter().any(|pattern| matches(pattern, test));
        let failed = results.failed.iter().filter(|test| !expected(test));
        surprises.extend(failed.map(|test| format!("{place}: {test} fails")));
        let stale = listed
            .iter()
            .filter(|pattern| !results.failed.iter().any(|test| matches(pattern, test)));
        surprises.extend(stale.map(|pattern| format!("{place}: nothing that is called {pattern} fails")));
    }
    ensure!(
        surprises.is_empty(),
        "not as docs/storage.md says:\n{}",
        surprises.join("\n")
    );
    Ok(())
}

fn line(place: &str, results: &Results, fsx: &str) {
    let Results {
        passed,
        failed,
        skipped,
    } = results;
    println!(
        "| {place} | {} | {} | {} | {fsx} |",
        passed.len(),
        failed.len(),
        skipped.len()
    );
    for test in failed {
        eprintln!("{place}: {test}");
    }
}

/// Whether a test is meant: by its name, or by the end of it after a `*`.
fn matches(pattern: &str, test: &str) -> bool {
    pattern
        .strip_prefix('*')
        .map_or(pattern == test, |end| test.ends_with(end))
}

/// Tests that the page says fail, by file system: lines such as "- hostPath: `chmod::x`, `*::y`: why".
fn known(page: &str) -> BTreeMap<&'static str, Vec<String>> {
    let section = page
        .split("\n## ")
        .find(|section| section.starts_with("File system conformance"))
        .unwrap_or_default();
    let mut known = BTreeMap::new();
    for (place, _) in PLACES {
        let lines = section
            .lines()
            .filter_map(|line| line.strip_prefix("- ")?.strip_prefix(place)?.strip_prefix(": "));
        let names = lines
            .flat_map(|line| line.split('`').skip(1).step_by(2))
            .filter(|word| word.contains("::"))
            .map(str::to_owned);
        known.insert(place, names.collect());
    }
    known
}

/// The lines that end in how a test did.
fn results(output: &str) -> Result<Results> {
    let mut results = Results::default();
    for line in output.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(end), None) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let set = match end {
            "ok" => &mut results.passed,
            "skipped" => &mut results.skipped,
            "FAILED" => &mut results.failed,
            _ => continue,
        };
        if name.contains("::") {
            set.insert(name.to_owned());
        }
    }
    let summary = output
        .lines()
        .find_map(|line| line.strip_prefix("Summary: "))
        .with_context(|| format!("pjdfstest did not come to its end:\n{output}"))?;
    let counted = results.passed.len() + results.failed.len() + results.skipped.len();
    ensure!(
        summary.ends_with(&format!(" {counted} total")),
        "{counted} tests were read of: {summary}"
    );
    Ok(results)
}

fn tool(name: &str) -> Result<PathBuf> {
    let path = cache().join("bin").join(name);
    ensure!(
        path.exists(),
        "{} is missing: run `make fs-conformance`",
        path.display()
    );
    Ok(path)
}

fn on_host(host: &Host) -> Result<Results> {
    eprintln!("the host's own");
    let place = host.dir().join("own");
    fs::create_dir(&place)?;
    // Others than root pass through here.
    let other = Mounted::tmpfs(host.dir().join("other"))?;
    let config = host.dir().join("pjdfstest.toml");
    fs::write(&config, CONFIG)?;
    let output = Command::new(tool("pjdfstest")?)
        .arg("-c")
        .arg(&config)
        .arg("-p")
        .arg(&place)
        .arg("-s")
        .arg(&other.0)
        .current_dir(&place)
        .output()?;
    results(&String::from_utf8_lossy(&output.stdout))
}

/// busybox with both programs; the root file system's place is made here.
fn image() -> Result<Image> {
    let layer = Layer::default()
        .directory("work", 0o755)?
        .file("pjdfstest.toml", 0o644, CONFIG.as_bytes())?
        .file("bin/pjdfstest", 0o755, &fs::read(tool("pjdfstest")?)?)?
        .file("bin/fsx", 0o755, &fs::read(tool("fsx")?)?)?
        .gzip()?;
    let config = json!({ "Env": ["PATH=/bin"] });
    Ok(Image::new(vec![busybox_layer()?, layer], &config))
}

async fn in_guest(
    host: &Host,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<Vec<(&'static str, Results, bool)>> {
    let Node {
        daemon: _daemon,
        mut cri,
        image,
        registry: _registry,
    } = node_with(host, "test/fs-conformance", &image()?).await?;
    let shared = host.dir().join("shared");
    fs::create_dir(&shared)?;
    let mut config = pod(host, "conformance");
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .privileged = true;
    let memory = Mounted::tmpfs(kubelet_volume(host, "conformance", "empty-dir", "memory")?)?;
    let pod_id = cri.run_pod(&config).await?;
    let mut worker = container("worker", &image, &["sleep", "100000"]);
    // Device nodes, and files of all kinds of owners.
    security(&mut worker).privileged = true;
    worker.mounts = vec![
        mount(
            &kubelet_volume(host, "conformance", "empty-dir", "disk")?,
            "/disk",
        ),
        mount(&memory.0, "/hold"),
        mount(&shared, "/host"),
    ];
    let id = cri.run(&pod_id, &worker, &config).await?;
    let mut measured = Vec::new();
    for (place, path) in PLACES.into_iter().filter(|(place, _)| is_wanted(place)) {
        eprintln!("{place}");
        let results = pjdfstest(&mut cri, &id, Path::new(path)).await.context(place)?;
        let script = format!("cd {path} && fsx -N {OPERATIONS} -S 1 {path}/fsx");
        let (code, out, err) = cri.exec_within(&id, &["sh", "-c", &script], LIMIT).await?;
        if code != 0 {
            eprintln!("{place}: fsx: {out}{err}");
        }
        measured.push((place, results, code == 0));
    }
    cri.remove_pod(&pod_id).await?;
    Ok(measured)
}

async fn pjdfstest(cri: &mut Cri, id: &str, path: &Path) -> Result<Results> {
    // Another file system, for what may not cross from one to another.
    let script = format!(
        "mkdir -p {0}/t /dev/shm/t && cd {0}/t && pjdfstest -c /pjdfstest.toml -p {0}/t -s /dev/shm/t",
        path.display()
    );
    let (_, output, errors) = cri.exec_within(id, &["sh", "-c", &script], LIMIT).await?;
    results(&output).with_context(|| errors)
}
