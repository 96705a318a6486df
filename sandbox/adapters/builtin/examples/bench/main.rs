//! `make bench-vmm`: the built-in VMM beside QEMU's microvm, on the same KVM, with the same kernel and initramfs, in the same run.
//!
//! `bench KERNEL INITRAMFS CAISSON-VMM [RUNS [VMS]]` prints tables in Markdown: RUNS boots of each in turn, until the agent's port answers, one
//! boot of each with a histogram of its exits, and then VMS idle VMs of each. Both have 128 MiB, one vCPU, a serial console, vsock, entropy and a
//! balloon that reports free pages. Root only. A boot that fails is told and left out; a table is printed as soon as its figures are there.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a tool for developers")]

mod exits;
mod measure;
mod peers;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use measure::{Cost, Memory};
use peers::{Caisson, Microvm, Peer, Vmm};

/// Guest memory of every VM.
pub(crate) const MEMORY_MIB: u64 = 128;

/// The agent's port.
pub(crate) const PORT: u32 = 1021;

/// A boot that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(90);

/// Idle VMs are not made for longer than this: the figures are then of those that there are.
const IDLE_BUDGET: Duration = Duration::from_secs(300);

/// After so many failures a peer is given up.
const FAILURES_MAX: usize = 3;

/// What went wrong, for the reader of the tables.
pub(crate) type Outcome<T> = Result<T, String>;

/// What one boot was.
struct Boot {
    /// Until the VMM said that the guest runs; nothing for a VMM that does not say it.
    start: Option<Cost>,
    /// Until the agent listened.
    ready: Cost,
    wall: Duration,
    /// KVM's own counters.
    exits: BTreeMap<String, u64>,
    memory: Option<Memory>,
}

/// Boots of one peer, and how many failed.
#[derive(Default)]
struct Boots {
    done: Vec<Boot>,
    failed: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, vmm, rest @ ..] = &args[..] else {
        panic!("usage: bench KERNEL INITRAMFS CAISSON-VMM [RUNS [VMS]]");
    };
    let number = |at: usize, default: usize| rest.get(at).map_or(default, |text| text.parse().unwrap());
    let (runs, vms) = (number(0, 10), number(1, 20));
    let absolute = |path: &str| -> PathBuf { std::fs::canonicalize(path).unwrap() };
    let (kernel, initramfs) = (absolute(kernel), absolute(initramfs));
    let mut peers: Vec<Box<dyn Peer>> = Vec::new();
    match Caisson::new(absolute(vmm), &kernel, &initramfs).await {
        Ok(caisson) => peers.push(Box::new(caisson)),
        Err(e) => println!("- caisson-vmm is left out: {e}"),
    }
    match Microvm::new(&kernel, &initramfs) {
        Ok(microvm) => peers.push(Box::new(microvm)),
        Err(e) => println!("- QEMU microvm is left out: {e}"),
    }
    for peer in &peers {
        println!("- {}: {}", peer.name(), peer.describe());
    }
    let boots = boot_in_turn(&peers, runs).await;
    let names: Vec<&str> = peers.iter().map(|peer| peer.name()).collect();
    report_boots(&names, &boots);
    report_counters(&names, &boots);
    report_exits(&peers).await;
    let idle = report_idle(&peers, vms).await;
    let failed: usize = boots.values().map(|boots| boots.failed).sum();
    if failed == 0 && idle && peers.len() == 2 {
        ExitCode::SUCCESS
    } else {
        println!("\n**Incomplete: {failed} boots failed; see above.**");
        ExitCode::FAILURE
    }
}

async fn boot_in_turn(peers: &[Box<dyn Peer>], runs: usize) -> BTreeMap<&'static str, Boots> {
    let mut all: BTreeMap<&'static str, Boots> = BTreeMap::new();
    for run in 0..runs {
        for peer in peers {
            let boots = all.entry(peer.name()).or_default();
            if boots.failed >= FAILURES_MAX {
                continue;
            }
            match boot(&**peer, 0).await {
                Ok((boot, vm)) => {
                    vm.kill().await;
                    let (wall, cpu) = (ms(boot.wall), ms(boot.ready.cpu));
                    eprintln!(
                        "boot {} of {runs}, {}: {wall:.0} ms, {cpu:.0} ms of CPU",
                        run + 1,
                        peer.name()
                    );
                    boots.done.push(boot);
                }
                Err(e) => {
                    println!("- boot {} of {} failed: {e}", run + 1, peer.name());
                    if boots.done.is_empty() && peer.fall_back() {
                        println!("- {}: {} from now on", peer.name(), peer.describe());
                    }
                    boots.failed += 1;
                }
            }
        }
    }
    all
}

/// Starts a VM and waits for its agent.
async fn boot(peer: &dyn Peer, number: u32) -> Outcome<(Boot, Box<dyn Vmm>)> {
    measure::settle();
    let began = Instant::now();
    let children = measure::ended_children();
    let vm = peer.start(number).await?;
    let cost = |vm: &dyn Vmm| measure::cost(vm.pid()) + (measure::ended_children() - children);
    let start = vm.says_when_it_runs().then(|| cost(&*vm));
    while !vm.listens().await {
        if began.elapsed() > LIMIT || !measure::lives(vm.pid()) {
            let console = vm.console();
            vm.kill().await;
            let seconds = began.elapsed().as_secs();
            return Err(format!("no agent after {seconds} s; it said {console:?}"));
        }
        // Asking costs both sides CPU: two hundredths of what has passed is exact enough.
        tokio::time::sleep((began.elapsed() / 50).max(Duration::from_millis(1))).await;
    }
    let (wall, ready) = (began.elapsed(), cost(&*vm));
    let boot = Boot {
        start,
        ready,
        wall,
        exits: measure::kvm_counters(vm.pid()),
        memory: measure::memory(vm.pid(), MEMORY_MIB),
    };
    Ok((boot, vm))
}

/// What the host has less for each of so many idle VMs, and what their processes have.
struct Idle {
    count: u64,
    host_kib: u64,
    pss_kib: u64,
    /// Of all processes, for each VM and second.
    cpu: Duration,
}

async fn idle(peer: &dyn Peer, count: usize) -> Outcome<Idle> {
    // What the first one brings into the page cache is everybody's.
    let (_, first) = boot(peer, 0).await?;
    let before = measure::available();
    let mut vms = Vec::new();
    let mut failure = None;
    let began = Instant::now();
    for number in 1..=u32::try_from(count).unwrap() {
        if began.elapsed() > IDLE_BUDGET {
            break;
        }
        eprintln!("idle VM {number} of {count}, {}", peer.name());
        match boot(peer, number).await {
            Ok((_, vm)) => vms.push(vm),
            Err(e) => {
                failure = Some(e);
                break;
            }
        }
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let host_kib = before.saturating_sub(measure::available());
    let memories = vms.iter().filter_map(|vm| measure::memory(vm.pid(), MEMORY_MIB));
    let pss_kib: u64 = memories.map(|memory| memory.all_pss).sum();
    let spent = |vms: &[Box<dyn Vmm>]| -> Duration { vms.iter().map(|vm| measure::cost(vm.pid()).cpu).sum() };
    let (asleep, spent_before) = (Duration::from_secs(5), spent(&vms));
    tokio::time::sleep(asleep).await;
    let cpu = spent(&vms).saturating_sub(spent_before);
    let made = vms.len() as u64;
    for vm in vms.into_iter().chain([first]) {
        vm.kill().await;
    }
    if let Some(e) = failure {
        println!("- idle VM {} of {} failed: {e}", made + 1, peer.name());
    }
    if made == 0 {
        return Err("none was there".into());
    }
    Ok(Idle {
        count: made,
        host_kib: host_kib / made,
        pss_kib: pss_kib / made,
        cpu: cpu / u32::try_from(made * asleep.as_secs()).unwrap(),
    })
}

/// Whether all were made.
async fn report_idle(peers: &[Box<dyn Peer>], vms: usize) -> bool {
    println!(
        "\n| idle VMs | how many | host memory for each, MiB | PSS of each, MiB | CPU of each, ms in a second |"
    );
    println!("|---|---:|---:|---:|---:|");
    let mut whole = true;
    for peer in peers {
        match idle(&**peer, vms).await {
            Ok(idle) => {
                whole &= idle.count == vms as u64;
                println!(
                    "| {} | {} | {} | {} | {:.2} |",
                    peer.name(),
                    idle.count,
                    mib(idle.host_kib),
                    mib(idle.pss_kib),
                    ms(idle.cpu)
                );
            }
            Err(e) => {
                whole = false;
                println!("| {} | failed: {e} | - | - | - |", peer.name());
            }
        }
    }
    whole
}

/// One boot of each under the kernel's tracer, apart from those that are timed.
async fn report_exits(peers: &[Box<dyn Peer>]) {
    for peer in peers {
        let histogram = match exits::Histogram::begin() {
            Ok(histogram) => histogram,
            Err(e) => return println!("\n- exits by reason are left out: {e}"),
        };
        match boot(&**peer, 0).await {
            Ok((_, vm)) => {
                let table = histogram.end(vm.pid());
                vm.kill().await;
                println!(
                    "\n| exits of {} until the agent listens, by reason | |\n|---|---:|",
                    peer.name()
                );
                for (reason, count) in table {
                    println!("| {reason} | {count} |");
                }
            }
            Err(e) => println!("\n- exits of {} by reason: {e}", peer.name()),
        }
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn report_boots(names: &[&str], boots: &BTreeMap<&str, Boots>) {
    let counts: Vec<String> = names
        .iter()
        .map(|name| {
            format!(
                "{name}, {} boots",
                boots.get(name).map_or(0, |boots| boots.done.len())
            )
        })
        .collect();
    println!("\n| median (and least) | {} |", counts.join(" | "));
    println!("|---|{}", "---:|".repeat(names.len()));
    let row = |what: &str, value: &dyn Fn(&Boot) -> Option<f64>| {
        let cells: Vec<String> = names
            .iter()
            .map(|name| {
                let boots = boots.get(name).map_or(&[][..], |boots| &boots.done);
                spread(boots.iter().filter_map(value).collect())
            })
            .collect();
        println!("| {what} | {} |", cells.join(" | "));
    };
    row("until the agent listens, wall ms", &|boot| Some(ms(boot.wall)));
    row("until the agent listens, CPU ms", &|boot| {
        Some(ms(boot.ready.cpu))
    });
    row("of it all threads but the vCPU's, ms", &|boot| {
        Some(ms(boot.ready.own))
    });
    row("until the guest runs, CPU ms without the vCPU's", &|boot| {
        boot.start.map(|cost| ms(cost.own))
    });
    let memory = |value: fn(&Memory) -> u64| move |boot: &Boot| boot.memory.as_ref().map(|m| value(m) as f64);
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
fn report_counters(names: &[&str], boots: &BTreeMap<&str, Boots>) {
    let all: std::collections::BTreeSet<&String> = boots
        .values()
        .flat_map(|boots| &boots.done)
        .flat_map(|boot| boot.exits.keys())
        .collect();
    if all.is_empty() {
        return println!("\n- KVM's counters are left out: /sys/kernel/debug/kvm has none of these VMs");
    }
    println!(
        "\n| KVM's counters until the agent listens, median | {} |",
        names.join(" | ")
    );
    println!("|---|{}", "---:|".repeat(names.len()));
    for counter in all {
        let values: Vec<f64> = names
            .iter()
            .map(|name| {
                let boots = boots.get(name).map_or(&[][..], |boots| &boots.done);
                let values = boots
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
