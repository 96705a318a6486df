//! Boots a kernel with a serial console on standard output, and says how it ended, how long it took and which exits it had.
//!
//! `boot --kernel vmlinux [--initramfs cpio] [--append LINE] [--memory MIB] [--cpus RUNNING,PRESENT] [--entry any|pvh|linux64]
//! [--huge-pages] [--shared] [--trace] [--no-serial] [--no-pci] [--vsock SOCKET [--probe PORT]] [--until TEXT] [--seconds N]`
//!
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
    virtio::{Attachment, Host as DeviceHost, VirtioPci, vsock::VsockDevice},
};
use caisson_machine::{Backing, Config, End, Entry, Host, Kernel, Vm, layout};

/// Copies to standard output, and says when a text has gone by.
struct Console {
    until: Option<String>,
    seen: String,
    found: mpsc::Sender<()>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(until) = &self.until {
            self.seen.push_str(&String::from_utf8_lossy(bytes));
            if self.seen.contains(until) {
                self.found.send(()).ok();
                self.until = None;
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
}

fn arguments() -> Result<Arguments> {
    let mut config = Config::new(128 << 20);
    config.serial = true;
    let (mut kernel, mut initramfs, mut line, mut entry) = (None, None, String::new(), Entry::Any);
    let (mut until, mut seconds, mut pci, mut vsock, mut probe) = (None, 60, true, None, None);
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
    })
}

fn main() -> Result<()> {
    let started = Instant::now();
    let arguments = arguments()?;
    let (trace, serial) = (arguments.config.trace_exits, arguments.config.serial);
    let host = Host::open(Path::new("/dev/kvm"))?;
    let vm = Vm::new(host, arguments.config)?;
    let (found, wait) = mpsc::channel();
    if serial {
        let console = Console {
            until: arguments.until,
            seen: String::new(),
            found: found.clone(),
        };
        let line = Interrupts::line(&*vm.interrupts(), layout::SERIAL_GSI)?;
        let port = SerialPort::new(line, console, u64::MAX);
        vm.pio().insert(layout::SERIAL_PORT.into(), 8, Arc::new(port))?;
    }
    if let Some(port) = arguments.probe {
        let (socket, found) = (
            arguments.vsock.clone().context("--probe needs --vsock")?,
            found.clone(),
        );
        std::thread::spawn(move || probe(&socket, port, &found));
    }
    if arguments.pci {
        let root = Arc::new(PciRoot::new(Window::new(layout::PCI_WINDOW), vm.mmio()));
        let mirror = vm.mirror_config(Arc::new(Ecam::new(Arc::clone(&root))))?;
        if let Some(socket) = &arguments.vsock {
            let place = add_vsock(&vm, &root, socket)?;
            mirror.refresh(place.device, place.function);
        }
    }
    let made = started.elapsed();
    let machine = vm.boot(&arguments.kernel)?;
    let booted = started.elapsed();
    let ends = machine.vm().ends();
    std::thread::spawn(move || {
        // Ends when the text was seen, or with the process.
        if wait.recv_timeout(Duration::from_secs(arguments.seconds)).is_ok() {
            ends.report(End::Stopped);
        } else {
            ends.report(End::Failed("took too long".into()));
        }
    });
    let end = machine.wait();
    let all = started.elapsed();
    let usage = cpu_time()?;
    eprintln!("\n{end}: made {made:?}, loaded {booted:?}, ended {all:?}, {usage}");
    eprintln!("{}", machine.exits());
    if trace {
        for (reason, place, count) in machine.exit_places().into_iter().take(60) {
            eprintln!("{count:8} {:12} {place:#x}", reason.name());
        }
    }
    Ok(())
}

fn add_vsock(vm: &Vm, root: &PciRoot, socket: &Path) -> Result<PciAddress> {
    std::fs::remove_file(socket).ok();
    let listener = UnixListener::bind(socket)?;
    let host = DeviceHost {
        threads: Arc::new(Unconfined),
        events: Arc::new(Unheard),
    };
    let device = VsockDevice::new(3, listener, host)?;
    let attachment = Attachment {
        memory: vm.memory(),
        interrupts: vm.interrupts(),
        doorbells: vm.doorbells(),
        events: Arc::new(Unheard),
    };
    Ok(root.add(VirtioPci::new(Box::new(device), attachment)?)?)
}

/// Asks again and again, until somebody in the guest listens.
fn probe(socket: &Path, port: u32, found: &mpsc::Sender<()>) {
    loop {
        let asked = UnixStream::connect(socket).and_then(|mut stream| {
            stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer)
        });
        if asked.is_ok_and(|answer| answer.starts_with("OK")) {
            found.send(()).ok();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
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
