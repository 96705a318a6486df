//! Boots a kernel and an initramfs with this driver, and says when what was there and what it cost.
//!
//! `boot KERNEL INITRAMFS CAISSON-VMM [PORT [WORD-OF-CMDLINE...]]` waits until the guest listens on the vsock port (default: 1021, the
//! agent's), prints the figures, and kills the VM. Build it by `cargo build -p caisson-builtin --example boot`; it needs KVM.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a tool for developers")]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use caisson_builtin::{Builtin, BuiltinConfig};
use caisson_hypervisor::{Hypervisor, Vm, VmSpec, VmUser, console_tail, user::Users};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

const LIMIT: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, vmm, rest @ ..] = &args[..] else {
        panic!("usage: boot KERNEL INITRAMFS CAISSON-VMM [PORT [WORD...]]");
    };
    let (port, words) = match rest {
        [port, words @ ..] => (port.parse().unwrap(), words.to_vec()),
        [] => (1021, Vec::new()),
    };
    let absolute = |path: &str| std::fs::canonicalize(path).unwrap();
    let config = BuiltinConfig {
        vmm: absolute(vmm),
        kvm: "/dev/kvm".into(),
        users: Users::new(VmUser::default()).unwrap(),
        huge_pages: false,
    };
    let driver = Builtin::detect(config).await.unwrap();
    println!("{}", driver.describe());
    let dir = tempfile::tempdir().unwrap();
    let spec = VmSpec {
        id: format!("{:x}", std::process::id()),
        dir: dir.path().to_owned(),
        kernel: absolute(kernel),
        initramfs: absolute(initramfs),
        cmdline: words,
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: 128,
        max_memory_mib: 128,
        nics: Vec::new(),
        disks: Vec::new(),
        attach_slots: 16,
        cgroup: None,
    };
    let start = Instant::now();
    let vm = driver.launch(spec).await.unwrap();
    report(&*vm, "guest runs", start);
    let listening = async {
        while !answers(vm.vsock().to_owned(), port).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let outcome = tokio::select! {
        () = listening => None,
        exit = vm.wait() => Some(exit.reason),
        () = tokio::time::sleep(LIMIT) => Some(format!("nothing listens on port {port} after {LIMIT:?}")),
    };
    report(&*vm, "guest listens", start);
    if let Some(reason) = outcome {
        println!("{reason}");
    }
    println!("{}", console_tail(vm.console(), 65536).unwrap());
    vm.kill().await.unwrap();
}

async fn answers(socket: PathBuf, port: u32) -> bool {
    let Ok(stream) = UnixStream::connect(socket).await else {
        return false;
    };
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .is_ok()
        && stream.read_line(&mut line).await.is_ok()
        && line.starts_with("OK ")
}

/// Wall time since `start`, CPU time and resident memory of each process.
fn report(vm: &dyn Vm, what: &str, start: Instant) {
    print!("{what}: {:.2} s", start.elapsed().as_secs_f64());
    for process in vm.record().processes {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        // What follows the name begins with `state`, field 3 of proc(5).
        let rest = stat.rsplit(')').next().unwrap_or_default();
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| {
            fields
                .get(number - 3)
                .and_then(|f| f.parse::<u64>().ok())
                .unwrap_or(0)
        };
        let (ticks, pages) = (field(14) + field(15), field(24));
        print!(
            ", {:?} {}.{:02} CPU-s {} MiB",
            process.role,
            ticks / 100,
            ticks % 100,
            pages / 256
        );
    }
    println!();
}
