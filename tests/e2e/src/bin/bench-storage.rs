//! `make bench-storage [BENCH_SECONDS=4]`: disks and files as a container sees them, next to the same on the host and to QEMU with virtiofsd.
//!
//! One script does the same work everywhere, with the same busybox and fio: on the host after a chroot, in a container on its root file
//! system, an emptyDir and a hostPath, and in a VM of our kernel, made by hand, whose only file system is virtiofsd's. Prints a table in
//! Markdown. Where QEMU emulates, only the columns of guests can be compared with each other. Needs fio on the host.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    checkout,
    cri::{container, pod},
    daemon::Product,
    eventually, figures,
    host::{Host, command, text},
    image::{Blob, Image, Layer, busybox_layer},
    node::{Node, node_with},
    run,
    volumes::{Mounted, kubelet_volume, mount},
};
use k8s_cri::v1 as cri;
use serde_json::json;

/// Debian's, of QEMU 7.2.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// For all work in one place; guests may be emulated.
const LIMIT: Duration = Duration::from_secs(1200);

/// `sh work.sh DIRECTORY SECONDS`: prints a line for each figure: its value, and what it is.
const WORK: &str = r#"
set -e
cd "$1"
job() {
    fio --name=x --filename=x --size=64M --ioengine=psync --thread --direct=1 --minimal "$@"
}
job --rw=write --bs=1M --end_fsync=1 >/dev/null
timed="--time_based --runtime=$2"
echo "$(job --rw=randread --bs=4k $timed | cut -d';' -f8) random reads of 4 KiB, direct, one at a time, IOPS"
echo "$(job --rw=randwrite --bs=4k $timed | cut -d';' -f49) random writes of 4 KiB, direct, one at a time, IOPS"
echo "$(($(job --rw=read --bs=1M $timed | cut -d';' -f7) / 1024)) sequential reads of 1 MiB, direct, MiB/s"
echo "$(($(job --rw=write --bs=1M $timed | cut -d';' -f48) / 1024)) sequential writes of 1 MiB, direct, MiB/s"
rm x

now() { read -r up rest </proc/uptime; echo "${up%.*}${up#*.}"; }
# Of so many things, from then until now, each second.
rate() { passed=$(($(now) - $2)); echo "$(($1 * 100 / (passed + (passed == 0))))"; }
mkdir small
began=$(now)
i=0
while [ $i -lt 1000 ]; do echo "$i" >small/$i; i=$((i + 1)); done
echo "$(rate 1000 $began) small files made, each second"
mkdir tree
began=$(now)
tar -x -f /source.tar -C tree
files=$(tar -t -f /source.tar | grep -c '[^/]$')
echo "$(rate $files $began) files of a source tree unpacked, each second"
began=$(now)
for pass in 1 2 3 4 5; do find tree -size -1 >/dev/null; done
echo "$(rate $((5 * files)) $began) files of that tree looked at (stat), each second"
began=$(now)
find tree -type f -exec cat {} + >/dev/null
echo "$(rate $files $began) files of that tree read, each second"
began=$(now)
rm -r tree small
echo "$(rate $((files + 1000)) $began) files removed, each second"
"#;

/// How many lines that are.
const FIGURES: usize = 9;

/// Figures in the order of the work.
type Column = Vec<(String, u64)>;

fn main() -> Result<()> {
    let seconds: u32 = std::env::args().nth(1).map_or(Ok(4), |text| text.parse())?;
    let host = Host::enter()?;
    let layer = tools()?;
    let tree = host.dir().join("tree");
    unpack(&[&busybox_layer()?, &layer], &tree)?;
    let mut columns = vec![("host", on_host(&host, &tree, seconds)?)];
    columns.extend(run(in_pod(&host, layer, seconds))?);
    if Path::new(VIRTIOFSD).exists() {
        columns.push(("QEMU + virtiofsd", run(with_virtiofsd(&host, &tree, seconds))?));
    } else {
        println!("- no {VIRTIOFSD} here: its column is left out");
    }
    println!("- {}", figures::machine()?);
    print(&columns)
}

fn print(columns: &[(&str, Column)]) -> Result<()> {
    let names: Vec<&str> = columns.iter().map(|(name, _)| *name).collect();
    println!("\n| | {} |", names.join(" | "));
    println!("|---|{}", "---:|".repeat(columns.len()));
    let (_, first) = columns.first().context("no columns")?;
    for (index, (what, _)) in first.iter().enumerate() {
        let values: Vec<String> = columns
            .iter()
            .map(|(_, column)| {
                column
                    .get(index)
                    .map_or(String::new(), |(_, value)| value.to_string())
            })
            .collect();
        println!("| {what} | {} |", values.join(" | "));
    }
    Ok(())
}

fn column(output: &str) -> Result<Column> {
    let lines = output.lines().filter_map(|line| line.trim_end().split_once(' '));
    let figures: Column = lines
        .filter_map(|(value, what)| Some((what.to_owned(), value.parse().ok()?)))
        .collect();
    ensure!(
        figures.len() == FIGURES,
        "{} figures of {FIGURES}:\n{output}",
        figures.len()
    );
    Ok(figures)
}

/// fio with its libraries, the work, and a source tree: this one.
fn tools() -> Result<Blob> {
    let fio = text(Command::new("sh").args(["-c", "command -v fio"])).context("fio is missing")?;
    let libraries = text(Command::new("ldd").arg(fio.trim()))?;
    let mut files: BTreeSet<&str> = libraries
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'))
        .collect();
    files.insert(fio.trim());
    let mut layer = Layer::default();
    for file in files {
        let content = fs::read(file).with_context(|| format!("cannot read {file}"))?;
        let mode = fs::metadata(file)?.permissions().mode() & 0o777;
        layer = layer.file(file.trim_start_matches('/'), mode, &content)?;
    }
    let source = Command::new("git")
        .args(["archive", "--format=tar", "HEAD"])
        .current_dir(checkout())
        .output()?;
    ensure!(source.status.success(), "git archive: {}", source.status);
    layer
        .file("source.tar", 0o644, &source.stdout)?
        .file("work.sh", 0o755, WORK.as_bytes())?
        .directory("place", 0o755)?
        .gzip()
}

fn unpack(layers: &[&Blob], to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for layer in layers {
        let tar = flate2::read::GzDecoder::new(layer.bytes.as_slice());
        tar::Archive::new(tar).unpack(to)?;
    }
    Ok(())
}

fn words(place: &str, seconds: u32) -> [String; 4] {
    ["sh".into(), "/work.sh".into(), place.into(), seconds.to_string()]
}

fn on_host(host: &Host, tree: &Path, seconds: u32) -> Result<Column> {
    eprintln!("host");
    let place = host.dir().join("own");
    fs::create_dir(&place)?;
    let _place = Mounted::bind(&place, tree.join("place"))?;
    let _proc = Mounted::bind(Path::new("/proc"), tree.join("proc"))?;
    let _dev = Mounted::bind(Path::new("/dev"), tree.join("dev"))?;
    column(&text(
        Command::new("/usr/sbin/chroot")
            .arg(tree)
            .args(words("/place", seconds))
            .env_clear()
            .env("PATH", "/bin:/usr/bin"),
    )?)
}

async fn in_pod(host: &Host, layer: Blob, seconds: u32) -> Result<Vec<(&'static str, Column)>> {
    let config = json!({ "Env": ["PATH=/bin:/usr/bin"] });
    let image = Image::new(vec![busybox_layer()?, layer], &config);
    let Node {
        daemon: _daemon,
        mut cri,
        image,
        registry: _registry,
    } = node_with(host, "bench/storage", &image).await?;
    let mut config = pod(host, "bench");
    config.linux.get_or_insert_default().resources = Some(cri::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 200_000,
        ..Default::default()
    });
    let pod_id = cri.run_pod(&config).await?;
    let shared = host.dir().join("shared");
    fs::create_dir(&shared)?;
    let mut worker = container("worker", &image, &["sleep", "100000"]);
    worker.mounts = vec![
        mount(&kubelet_volume(host, "bench", "empty-dir", "data")?, "/empty"),
        mount(&shared, "/shared"),
    ];
    let id = cri.run(&pod_id, &worker, &config).await?;
    let mut columns = Vec::new();
    for (name, place) in [
        ("root file system", "/place"),
        ("emptyDir", "/empty"),
        ("hostPath", "/shared"),
    ] {
        eprintln!("{name}");
        let words = words(place, seconds);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let limit = i64::try_from(LIMIT.as_secs())?;
        let (code, output, errors) = cri.exec_within(&id, &words, limit).await?;
        ensure!(code == 0, "{name}: {code}: {output}{errors}");
        columns.push((name, column(&output)?));
    }
    cri.remove_pod(&pod_id).await?;
    Ok(columns)
}

/// Ends with its scope.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _already_gone = self.0.kill();
        let _already_reaped = self.0.wait();
    }
}

/// The first program of the VM: mounts, works, and switches off.
fn init(seconds: u32) -> String {
    let words = words("/place", seconds).join(" ");
    format!(
        "#!/bin/sh\nexport PATH=/bin:/usr/bin\nmount -t proc proc /proc\nmount -t devtmpfs dev /dev\nmount -t tmpfs tmp /tmp\n\
         mount -t virtiofs data /place && {words}\necho end of work\npoweroff -f\n"
    )
}

async fn with_virtiofsd(host: &Host, tree: &Path, seconds: u32) -> Result<Column> {
    eprintln!("QEMU + virtiofsd");
    let dir = host.dir();
    let place = dir.join("virtiofs");
    fs::create_dir(&place)?;
    fs::write(tree.join("init"), init(seconds))?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    let initramfs = dir.join("bench.cpio");
    let pack = format!("find . | cpio --quiet -o -H newc > {}", initramfs.display());
    command(Command::new("sh").args(["-c", &pack]).current_dir(tree))?;
    let socket = dir.join("fs.sock");
    let server = Command::new(VIRTIOFSD)
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", place.display()), "-o", "cache=auto"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let _server = Running(server);
    eventually("virtiofsd's socket", Duration::from_secs(20), async || {
        socket.exists().then_some(())
    })
    .await?;
    let console = dir.join("bench-console.log");
    let mut vm = Running(qemu(&Product::find()?.kernel, &initramfs, &socket, &console)?);
    eventually("the end of the work in the VM", LIMIT, async || {
        vm.0.try_wait().ok().flatten()
    })
    .await
    .with_context(|| fs::read_to_string(&console).unwrap_or_default())?;
    column(&String::from_utf8_lossy(&fs::read(&console)?))
}

/// As the product's driver starts it, but for the file system.
fn qemu(kernel: &Path, initramfs: &PathBuf, socket: &Path, console: &Path) -> Result<Child> {
    let memory = 512;
    let accelerated = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
        && fs::read_to_string("/proc/cpuinfo").is_ok_and(|cpu| cpu.contains(" vmx") || cpu.contains(" svm"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-machine", "q35,memory-backend=mem,sata=off,usb=off", "-smp", "2"])
        .args(["-m", &format!("size={memory}M")])
        .args([
            "-object",
            &format!("memory-backend-memfd,id=mem,size={memory}M,share=on"),
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-chardev")
        .arg(format!("socket,id=fs,path={}", socket.display()))
        .args(["-device", "vhost-user-fs-pci,chardev=fs,tag=data"])
        .args([
            "-append",
            "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t no_timer_check tsc=reliable clearcpuid=cx16 rdinit=/init",
        ]);
    if accelerated {
        qemu.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max,la57=off"]);
    }
    Ok(qemu.stdin(Stdio::null()).spawn()?)
}
