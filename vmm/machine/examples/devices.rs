//! Every device, under the drivers of a real guest: boots a kernel with all of them, and does from outside what the guest's script on
//! the console asks for.
//!
//! The script is `devices.sh`, as `/init` of an initramfs with a static busybox.
//!
//! `unshare -n devices KERNEL INITRAMFS DISK IMAGE`: `DISK` can be written, `IMAGE` is read-only and persistent memory as well (2 MiB or
//! a multiple). The guest's lines `DO plug`, `DO unplug`, `DO grow`, `DO disk`, `DO quit` are commands; the namespace's end of the
//! network is 10.9.0.1.
#![expect(unsafe_code, reason = "a tap is made by an ioctl")]

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsRawFd, unix::net::UnixListener},
    process::Command,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_devices::{
    followed_memory::FollowedMemory,
    pci::{Ecam, PciRoot, Window},
    ports::{DeviceEvent, Events, Interrupts, Unconfined},
    serial::SerialPort,
    virtio::{
        Attachment, Host as DeviceHost, VirtioDevice, VirtioPci,
        balloon::Balloon,
        block::{Block, BlockConfig},
        mem::{Layout, Mem},
        net::{Net, NetConfig},
        pmem::{Pmem, PmemConfig},
        rng::Rng,
        vsock::VsockDevice,
    },
};
use caisson_machine::{Config, ConfigMirror, Host, Kernel, Machine, Vm, layout};

const MIB: u64 = 1 << 20;
const PLUGGABLE: u64 = 1 << 30;

struct Console {
    line: String,
    lines: mpsc::Sender<String>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for part in String::from_utf8_lossy(bytes).split_inclusive('\n') {
            self.line.push_str(part);
            if self.line.ends_with('\n') {
                self.lines.send(std::mem::take(&mut self.line)).ok();
            }
        }
        io::stdout().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

struct Log;

impl Events for Log {
    fn happened(&self, event: DeviceEvent) {
        eprintln!("event: {event}");
    }
}

fn tap() -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
        },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(answer == 0, "cannot make a tap: {}", io::Error::last_os_error());
    for arguments in [
        ["addr", "add", "10.9.0.1/24", "dev", "tap0"].as_slice(),
        &["link", "set", "tap0", "up"],
    ] {
        ensure!(Command::new("ip").args(arguments).status()?.success());
    }
    Ok(file)
}

/// The bus, and what the guest sees of it.
struct Bus<'v> {
    vm: &'v Vm,
    root: Arc<PciRoot>,
    mirror: Arc<ConfigMirror>,
}

impl<'v> Bus<'v> {
    fn new(vm: &'v Vm) -> Result<Self> {
        let root = Arc::new(PciRoot::new(Window::new(layout::PCI_WINDOW), vm.mmio()));
        let mirror = vm.mirror_config(Arc::new(Ecam::new(Arc::clone(&root))))?;
        Ok(Self { vm, root, mirror })
    }

    fn add(&self, device: impl VirtioDevice + 'static) -> Result<()> {
        let name = device.device_type().name();
        let attachment = Attachment {
            memory: self.vm.memory(),
            interrupts: self.vm.interrupts(),
            doorbells: self.vm.doorbells(),
            events: Arc::new(Log),
        };
        let place = self.root.add(VirtioPci::new(Box::new(device), attachment)?)?;
        self.mirror.refresh(place.device, place.function);
        eprintln!("{name} at {place}");
        Ok(())
    }
}

fn disk(
    file: File,
    read_only: bool,
    serial: &str,
    host: &DeviceHost,
) -> Result<(Block, caisson_devices::virtio::block::BlockHandle)> {
    let config = BlockConfig {
        files: vec![file],
        read_only,
        serial: serial.to_owned(),
        block_bytes: 512,
    };
    Ok(Block::new(config, host.clone())?)
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initramfs, disk_path, image_path] = words.as_slice() else {
        anyhow::bail!("see the head of examples/devices.rs");
    };
    let mut config = Config::new(128 * MIB);
    config.serial = true;
    let vm = Vm::new(Host::open("/dev/kvm".as_ref())?, config)?;
    let (lines, hear) = mpsc::channel();
    let line = Interrupts::line(&*vm.interrupts(), layout::SERIAL_GSI)?;
    let console = Console {
        line: String::new(),
        lines,
    };
    let serial = SerialPort::new(line, console, u64::MAX);
    vm.pio().insert(layout::SERIAL_PORT.into(), 8, Arc::new(serial))?;
    let host = DeviceHost {
        threads: Arc::new(Unconfined),
        events: Arc::new(Log),
    };
    let image = || File::open(image_path);
    let writable = || File::options().read(true).write(true).open(disk_path);
    let bytes = image()?.metadata()?.len();
    // What is plugged must be in the plan of addresses before the guest starts.
    let (pmem_at, mem_at) = (vm.plug_space(bytes)?, vm.plug_space(PLUGGABLE)?);
    let ram = vm.memory();
    let memory = Arc::new(FollowedMemory::new(vm.memory_control(), ram.clone()));
    let mut net = Net::new(
        NetConfig {
            taps: vec![tap()?],
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1500,
            offloads: true,
        },
        host.clone(),
    )?;
    let vhost = File::options().read(true).write(true).open("/dev/vhost-net");
    if let (Ok(vhost), None) = (vhost, std::env::var_os("CAISSON_NO_VHOST")) {
        eprintln!("with vhost-net");
        net = net.with_vhost(vec![vhost], memory.clone(), &ram)?;
    }
    let dir = std::env::temp_dir().join(format!("caisson-devices-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let listener = UnixListener::bind(dir.join("vsock"))?;
    let (block, handle) = disk(writable()?, false, "disk", &host)?;
    let (balloon, balloon_handle) = Balloon::new(host.clone());
    let layout = Layout {
        address: mem_at,
        region: PLUGGABLE,
        block: 2 * MIB,
        chunk: 128 * MIB,
    };
    let (mem, mem_handle) = Mem::new(layout, memory.clone(), host.clone())?;
    let bus = Bus::new(&vm)?;
    bus.add(block)?;
    bus.add(disk(image()?, true, "image", &host)?.0)?;
    bus.add(net)?;
    bus.add(VsockDevice::new(3, listener, host.clone())?)?;
    bus.add(Rng::new(host.clone()))?;
    bus.add(balloon)?;
    bus.add(mem)?;
    let (root, mirror) = (Arc::clone(&bus.root), Arc::clone(&bus.mirror));
    let started = Instant::now();
    let machine: Machine = vm.boot(&Kernel {
        image: File::open(kernel)?,
        initramfs: Some(File::open(initramfs)?),
        command_line: "console=ttyS0 quiet panic=-1 reboot=t memhp_default_state=online_kernel".to_owned(),
        entry: caisson_machine::Entry::Any,
    })?;
    while machine.ends().reported().is_none() && started.elapsed() < Duration::from_secs(300) {
        let Ok(line) = hear.recv_timeout(Duration::from_millis(50)) else {
            continue;
        };
        let bus = Bus {
            vm: machine.vm(),
            root: Arc::clone(&root),
            mirror: Arc::clone(&mirror),
        };
        match line.trim() {
            "DO plug" => mem_handle.request(256 * MIB)?,
            "DO unplug" => mem_handle.request(0)?,
            "DO grow" => {
                writable()?.set_len(64 * MIB)?;
                eprintln!("disk has {} bytes", handle.resized()?);
            }
            "DO disk" => {
                bus.add(disk(image()?, true, "late", &host)?.0)?;
                let pmem = PmemConfig {
                    file: image()?,
                    address: pmem_at,
                    read_only: true,
                };
                bus.add(Pmem::new(pmem, memory.clone(), host.clone())?)?;
            }
            "DO quit" => break,
            _ => continue,
        }
        eprintln!(
            "plugged {} MiB, given back {} MiB",
            mem_handle.plugged() / MIB,
            balloon_handle.given_back() / MIB
        );
    }
    eprintln!(
        "plugged {} MiB, given back {} MiB",
        mem_handle.plugged() / MIB,
        balloon_handle.given_back() / MIB
    );
    machine.stop();
    let end = machine.wait();
    root.shut_down();
    eprintln!("{end} after {:?}\n{}", started.elapsed(), machine.exits());
    std::fs::remove_dir_all(dir).context("clean up")
}
