//! Boots a kernel with a serial console on standard output, and says how it ended, how long it took and which exits it had.
//!
//! `boot --kernel vmlinux [--initramfs cpio] [--append LINE] [--memory MIB] [--cpus RUNNING,PRESENT] [--entry any|pvh|linux64]
//! [--huge-pages] [--shared] [--trace] [--no-serial] [--no-pci] [--vsock SOCKET [--probe PORT]] [--until TEXT] [--seconds N]
//! [--hot-disk FILE]`
//!
//! `--hot-disk`: once the console shows `READY`, all vCPUs are made runnable and the file becomes a disk on the bus; once it shows `GONE`,
//! the disk is taken away.
//! `--vsock` adds a socket device behind a Unix socket, `--probe` stops the machine once somebody listens on that port of the guest.
//! `--until` stops the machine once the console has shown a text; `--seconds` is the longest that it may run.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use caisson_devices::{
    pci::{Ecam, PciAddress, PciRoot, Window},
    ports::{Interrupts, Unconfined, Unheard},
    serial::SerialPort,
    virtio::{
        Attachment, Host as DeviceHost, VirtioDevice, VirtioPci,
        block::{Block, BlockConfig},
        vsock::VsockDevice,
    },
};
use caisson_machine::{Backing, Config, ConfigMirror, End, Entry, Host, Kernel, Machine, Vm, layout};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

/// What goes on in the guest.
enum Heard {
    Line(String),
    Listens,
}

/// Copies to standard output, and tells of each line.
struct Console {
    line: String,
    heard: mpsc::Sender<Heard>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in String::from_utf8_lossy(bytes).split_inclusive('\n') {
            self.line.push_str(part);
            if self.line.ends_with('\n') {
                self.heard.send(Heard::Line(std::mem::take(&mut self.line))).ok();
            }
        }
        io::stdout().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

struct Arguments {
    config: Config,
    kernel: Kernel,
    until: Option<String>,
    seconds: u64,
    pci: bool,
    vsock: Option<PathBuf>,
    probe: Option<u32>,
    hot_disk: Option<PathBuf>,
}

fn arguments() -> Result<Arguments> {
    let mut config = Config::new(128 << 20);
    config.serial = true;
    let (mut kernel, mut initramfs, mut line, mut entry) = (None, None, String::new(), Entry::Any);
    let (mut until, mut seconds, mut pci) = (None, 60, true);
    let (mut vsock, mut probe, mut hot_disk) = (None, None, None);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--kernel" => kernel = Some(File::open(value()?)?),
            "--initramfs" => initramfs = Some(File::open(value()?)?),
            "--append" => line = value()?,
            "--memory" => config.memory = value()?.parse::<u64>()? << 20,
            "--cpus" => {
                let value = value()?;
                let (boot, present) = value.split_once(',').context("--cpus RUNNING,PRESENT")?;
                (config.boot_cpus, config.cpus) = (boot.parse()?, present.parse()?);
            }
            "--entry" => {
                entry = match value()?.as_str() {
                    "pvh" => Entry::Pvh,
                    "linux64" => Entry::Linux64,
                    _ => Entry::Any,
                }
            }
            "--huge-pages" => config.ram.huge_pages = true,
            "--shared" => config.ram.backing = Backing::Shared,
            "--trace" => config.trace_exits = true,
            "--no-serial" => config.serial = false,
            "--no-pci" => pci = false,
            "--vsock" => vsock = Some(value()?.into()),
            "--probe" => probe = Some(value()?.parse()?),
            "--hot-disk" => hot_disk = Some(value()?.into()),
            "--until" => until = Some(value()?),
            "--seconds" => seconds = value()?.parse()?,
            _ => bail!("{word}: see the head of examples/boot.rs"),
        }
    }
    Ok(Arguments {
        config,
        kernel: Kernel {
            image: kernel.context("--kernel FILE")?,
            initramfs,
            command_line: line,
            entry,
        },
        until,
        seconds,
        pci,
        vsock,
        probe,
        hot_disk,
    })
}

fn main() -> Result<()> {
    let started = Instant::now();
    let arguments = arguments()?;
    let (trace, serial) = (arguments.config.trace_exits, arguments.config.serial);
    let host = Host::open(Path::new("/dev/kvm"))?;
    let vm = Vm::new(host, arguments.config)?;
    let (heard, hear) = mpsc::channel();
    if serial {
        let console = Console {
            line: String::new(),
            heard: heard.clone(),
        };
        let line = Interrupts::line(&*vm.interrupts(), layout::SERIAL_GSI)?;
        let port = SerialPort::new(line, console, u64::MAX);
        vm.pio().insert(layout::SERIAL_PORT.into(), 8, Arc::new(port))?;
    }
    if let Some(port) = arguments.probe {
        let socket = arguments.vsock.clone().context("--probe needs --vsock")?;
        std::thread::spawn(move || probe(&socket, port, &heard));
    }
    let bus = arguments.pci.then(|| PciBus::new(&vm)).transpose()?;
    if let (Some(socket), Some(bus)) = (&arguments.vsock, &bus) {
        std::fs::remove_file(socket).ok();
        bus.add(
            &vm,
            Box::new(VsockDevice::new(
                3,
                UnixListener::bind(socket)?,
                host_of_devices(),
            )?),
        )?;
    }
    let made = started.elapsed();
    let machine = vm.boot(&arguments.kernel)?;
    let booted = started.elapsed();
    let deadline = started + Duration::from_secs(arguments.seconds);
    let mut disk = None;
    while machine.ends().reported().is_none() {
        let left = deadline.saturating_duration_since(Instant::now());
        match hear.recv_timeout(left.min(Duration::from_millis(20))) {
            Ok(Heard::Line(line)) if line.starts_with("READY") => {
                machine.grow_cpus(machine.vm().config().cpus)?;
                if let (Some(file), Some(bus)) = (&arguments.hot_disk, &bus) {
                    disk = Some(bus.add(machine.vm(), disk_of(file)?)?);
                }
            }
            Ok(Heard::Line(line)) if line.starts_with("GONE") => {
                if let (Some(place), Some(bus)) = (disk.take(), &bus) {
                    bus.remove(place)?;
                }
            }
            Ok(Heard::Line(line)) if arguments.until.as_ref().is_none_or(|text| !line.contains(text)) => {}
            Ok(Heard::Line(_) | Heard::Listens) => machine.stop(),
            Err(_) if left.is_zero() => machine.ends().report(End::Failed("it took too long".into())),
            Err(_) => {}
        }
    }
    let end = machine.wait();
    let all = started.elapsed();
    let usage = cpu_time()?;
    eprintln!("\n{end}: made {made:?}, loaded {booted:?}, ended {all:?}, {usage}");
    eprintln!("{}", machine.exits());
    eprintln!("{}", memory_use(&machine)?);
    if trace {
        for (reason, place, count) in machine.exit_places().into_iter().take(60) {
            eprintln!("{count:8} {:12} {place:#x}", reason.name());
        }
    }
    Ok(())
}

/// The PCI bus, and what the guest sees of it.
struct PciBus {
    root: Arc<PciRoot>,
    mirror: Arc<ConfigMirror>,
}

impl PciBus {
    fn new(vm: &Vm) -> Result<Self> {
        let root = Arc::new(PciRoot::new(Window::new(layout::PCI_WINDOW), vm.mmio()));
        let mirror = vm.mirror_config(Arc::new(Ecam::new(Arc::clone(&root))))?;
        Ok(Self { root, mirror })
    }

    fn add(&self, vm: &Vm, device: Box<dyn VirtioDevice>) -> Result<PciAddress> {
        let attachment = Attachment {
            memory: vm.memory(),
            interrupts: vm.interrupts(),
            doorbells: vm.doorbells(),
            events: Arc::new(Unheard),
        };
        let place = self.root.add(VirtioPci::new(device, attachment)?)?;
        self.mirror.refresh(place.device, place.function);
        Ok(place)
    }

    fn remove(&self, place: PciAddress) -> Result<()> {
        self.root.remove(place)?;
        self.mirror.refresh(place.device, place.function);
        Ok(())
    }
}

fn host_of_devices() -> DeviceHost {
    DeviceHost {
        threads: Arc::new(Unconfined),
        events: Arc::new(Unheard),
    }
}

fn disk_of(file: &Path) -> Result<Box<dyn VirtioDevice>> {
    let config = BlockConfig {
        files: vec![File::options().read(true).write(true).open(file)?],
        read_only: false,
        serial: "hot".into(),
        block_bytes: 512,
    };
    Ok(Box::new(Block::new(config, host_of_devices())?.0))
}

/// Asks again and again, until somebody in the guest listens.
fn probe(socket: &Path, port: u32, heard: &mpsc::Sender<Heard>) {
    loop {
        let asked = UnixStream::connect(socket).and_then(|mut stream| {
            stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer)
        });
        if asked.is_ok_and(|answer| answer.starts_with("OK")) {
            heard.send(Heard::Listens).ok();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the process takes of the host's memory, in KiB: guest memory, and everything else.
fn memory_use(machine: &Machine) -> Result<String> {
    let memory = machine.vm().memory();
    let memory = memory.memory();
    let guest: Vec<_> = memory
        .iter()
        .map(|region| (region.as_ptr().addr(), region.len()))
        .collect();
    let mut sums = std::collections::BTreeMap::<_, u64>::new();
    let mut whose = "VMM";
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [range, rights, ..] if rights.len() == 4 && range.contains('-') => {
                let start = usize::from_str_radix(range.split('-').next().unwrap_or_default(), 16)?;
                let inside = |(from, bytes): &(usize, u64)| (*from..from + *bytes as usize).contains(&start);
                whose = if guest.iter().any(inside) { "guest" } else { "VMM" };
            }
            [
                what @ ("Rss:" | "Pss:" | "Private_Dirty:" | "AnonHugePages:"),
                kib,
                "kB",
            ] => {
                *sums.entry((whose, *what)).or_default() += kib.parse::<u64>()?;
            }
            _ => {}
        }
    }
    let parts: Vec<_> = sums
        .iter()
        .map(|((whose, what), kib)| format!("{whose} {what} {kib}"))
        .collect();
    Ok(format!("KiB: {}", parts.join(", ")))
}

/// User and system time in ticks, from what the kernel says of the process.
fn cpu_time() -> Result<String> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.split_whitespace().collect();
    let (user, system, guest) = (fields[13], fields[14], fields[42]);
    Ok(format!(
        "CPU: user {user}0 ms (guest {guest}0), system {system}0 ms"
    ))
}
