//! `make bench-vmm`: the built-in VMM beside QEMU's microvm, on the same KVM, with the same kernel and initramfs, in the same run.
//!
//! `bench KERNEL INITRAMFS CAISSON-VMM [RUNS [VMS]]` prints tables in Markdown: RUNS boots of each in turn, until the agent's port answers, and
//! then VMS idle VMs of each. Both have 128 MiB, one vCPU, a serial console, vsock, entropy and a balloon that reports free pages. Root only.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a tool for developers")]

mod measure;
mod peers;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use measure::{Cost, Memory};
use peers::{Caisson, Microvm, Peer, Vmm};

/// Guest memory of every VM.
pub(crate) const MEMORY_MIB: u64 = 128;

/// The agent's port.
pub(crate) const PORT: u32 = 1021;

/// A boot that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(120);

/// Between two questions whether the agent listens.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What one boot was.
struct Boot {
    /// Until the VMM said that the guest runs; nothing for a VMM that does not say it.
    start: Option<Cost>,
    /// Until the agent listened.
    ready: Cost,
    wall: Duration,
    /// KVM's own counters.
    exits: BTreeMap<String, u64>,
    memory: Memory,
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, vmm, rest @ ..] = &args[..] else {
        panic!("usage: bench KERNEL INITRAMFS CAISSON-VMM [RUNS [VMS]]");
    };
    let number = |at: usize, default: usize| rest.get(at).map_or(default, |text| text.parse().unwrap());
    let (runs, vms) = (number(0, 10), number(1, 20));
    let absolute = |path: &str| -> PathBuf { std::fs::canonicalize(path).unwrap() };
    let (kernel, initramfs) = (absolute(kernel), absolute(initramfs));
    let caisson = Caisson::new(absolute(vmm), &kernel, &initramfs).await;
    let microvm = Microvm::new(&kernel, &initramfs);
    let peers: [&dyn Peer; 2] = [&caisson, &microvm];
    for peer in peers {
        println!("- {}: {}", peer.name(), peer.describe());
    }
    let mut boots: BTreeMap<&str, Vec<Boot>> = BTreeMap::new();
    for run in 0..runs {
        for peer in peers {
            eprintln!("boot {} of {runs}, {}", run + 1, peer.name());
            let (boot, vm) = boot(peer, 0).await;
            vm.kill().await;
            boots.entry(peer.name()).or_default().push(boot);
        }
    }
    let names: Vec<&str> = peers.iter().map(|peer| peer.name()).collect();
    report_boots(&names, &boots);
    report_exits(&names, &boots);
    println!("\n| {vms} idle VMs | {} |\n|---|---:|---:|", names.join(" | "));
    let mut rows: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for peer in peers {
        let (host, pss) = idle(peer, vms).await;
        rows.entry("host memory for each, MiB")
            .or_default()
            .push(mib(host));
        rows.entry("PSS of all processes of each, MiB")
            .or_default()
            .push(mib(pss));
    }
    for (what, values) in rows {
        println!("| {what} | {} |", values.join(" | "));
    }
}

/// Starts a VM and waits for its agent.
async fn boot(peer: &dyn Peer, number: u32) -> (Boot, Box<dyn Vmm>) {
    measure::settle();
    let began = Instant::now();
    let children = measure::ended_children();
    let vm = peer.start(number).await;
    let cost = |vm: &dyn Vmm| measure::cost(vm.pid()) + (measure::ended_children() - children);
    let start = vm.says_when_it_runs().then(|| cost(&*vm));
    while !vm.listens().await {
        assert!(began.elapsed() < LIMIT, "{}: {}", peer.name(), vm.console());
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let (wall, ready) = (began.elapsed(), cost(&*vm));
    let boot = Boot {
        start,
        ready,
        wall,
        exits: measure::kvm_counters(vm.pid()),
        memory: measure::memory(vm.pid(), MEMORY_MIB),
    };
    (boot, vm)
}

/// What the host has less for each of so many idle VMs, and what their processes have, KiB.
async fn idle(peer: &dyn Peer, count: usize) -> (u64, u64) {
    // What the first one brings into the page cache is everybody's.
    let (_, first) = boot(peer, 0).await;
    let before = measure::available();
    let mut vms = Vec::new();
    for number in 0..count {
        eprintln!("idle VM {} of {count}, {}", number + 1, peer.name());
        vms.push(boot(peer, u32::try_from(number).unwrap() + 1).await.1);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let host = before.saturating_sub(measure::available());
    let pss: u64 = vms
        .iter()
        .map(|vm| measure::memory(vm.pid(), MEMORY_MIB).all_pss)
        .sum();
    for vm in vms.into_iter().chain([first]) {
        vm.kill().await;
    }
    let count = count as u64;
    (host / count, pss / count)
}

fn report_boots(names: &[&str], boots: &BTreeMap<&str, Vec<Boot>>) {
    println!(
        "\n| median (and least) of {} boots | {} |\n|---|---:|---:|",
        boots[names[0]].len(),
        names.join(" | ")
    );
    let row = |what: &str, value: &dyn Fn(&Boot) -> Option<f64>| {
        let cells: Vec<String> = names
            .iter()
            .map(|name| spread(boots[name].iter().filter_map(value).collect()))
            .collect();
        println!("| {what} | {} |", cells.join(" | "));
    };
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    row("until the agent listens, wall ms", &|boot| Some(ms(boot.wall)));
    row("until the agent listens, CPU ms", &|boot| {
        Some(ms(boot.ready.cpu))
    });
    row("until the guest runs, CPU ms", &|boot| {
        boot.start.map(|cost| ms(cost.cpu))
    });
    let memory = |value: fn(&Memory) -> u64| move |boot: &Boot| Some(value(&boot.memory) as f64);
    row(
        "process without guest memory, PSS KiB",
        &memory(|memory| memory.pss),
    );
    row(
        "process without guest memory, private dirty KiB",
        &memory(|memory| memory.private_dirty),
    );
    row("guest memory, RSS KiB", &memory(|memory| memory.guest_rss));
    row("threads", &memory(|memory| memory.threads));
}

/// Counters of KVM that count for something.
fn report_exits(names: &[&str], boots: &BTreeMap<&str, Vec<Boot>>) {
    println!(
        "\n| KVM's counters until the agent listens, median | {} |\n|---|---:|---:|",
        names.join(" | ")
    );
    let all: std::collections::BTreeSet<&String> = boots
        .values()
        .flatten()
        .flat_map(|boot| boot.exits.keys())
        .collect();
    for counter in all {
        let values: Vec<f64> = names
            .iter()
            .map(|name| {
                let values = boots[name]
                    .iter()
                    .map(|boot| boot.exits.get(counter).copied().unwrap_or(0) as f64);
                median(values.collect())
            })
            .collect();
        if values.iter().any(|value| *value > 0.0) {
            let cells: Vec<String> = values.iter().map(|value| format!("{value:.0}")).collect();
            println!("| {counter} | {} |", cells.join(" | "));
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn spread(values: Vec<f64>) -> String {
    if values.is_empty() {
        return "-".into();
    }
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    format!("{:.0} ({least:.0})", median(values))
}

fn mib(kib: u64) -> String {
    format!("{:.1}", kib as f64 / 1024.0)
}
