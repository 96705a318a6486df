//! The one place where the devices of a VM are listed: from a specification to a machine.

use std::{
    collections::BTreeMap,
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_confinement::{Filters, ThreadKind};
use caisson_devices::{
    followed_memory::FollowedMemory,
    pci::{Ecam, PciAddress, PciRoot, RootError, Window},
    serial::{PortState, SerialPort},
    virtio::{
        self, Attachment, VirtioDevice, VirtioPci, VirtioPciError,
        balloon::Balloon,
        block::{Block, BlockConfig, BlockHandle, DiskError},
        mem::{Layout, Mem, MemError, MemHandle},
        net::{Net, NetConfig, NetError},
        pmem::{Pmem, PmemConfig, PmemError},
        rng::Rng,
        state::{FunctionState, SaveError},
        vsock::{VsockDevice, VsockDialer, VsockError},
    },
};
use caisson_machine::{Backing, Config, ConfigMirror, Entry, Host, Kernel, Machine, Ram, Vm, layout};
use caisson_vmm_api::spec::{self, VmSpec};

use crate::{
    descriptors::{InheritanceError, Inherited},
    threads::{Log, Maker},
};

/// What a guest can write to its console in all: the daemon cuts the file, but there may be no daemon for a while.
const CONSOLE_BYTES_MAX: u64 = 256 << 20;
/// What the guest should read and write at once: a page, which is what it has.
const BLOCK_BYTES: u32 = 4096;
/// What the memory device plugs at once: what the guest's kernel brings online at once on x86-64 may be larger, and then waits.
const MEMORY_BLOCK: u64 = 2 << 20;
/// What becomes memory of the machine at once.
const MEMORY_CHUNK: u64 = 128 << 20;
/// Ports of a serial port.
const SERIAL_PORTS: u64 = 8;

/// Why a machine could not be built or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Inherited(#[from] InheritanceError),
    #[error("cannot make the machine")]
    Machine(#[from] caisson_machine::Error),
    #[error("cannot put the {0} on its bus")]
    Bus(&'static str, #[source] caisson_devices::bus::BusError),
    #[error("cannot make the console's interrupt")]
    Console(#[source] std::io::Error),
    #[error("cannot make the socket device")]
    Vsock(#[from] VsockError),
    #[error("cannot attach a device")]
    Attach(#[from] VirtioPciError),
    #[error("cannot make a disk")]
    Disk(#[from] DiskError),
    #[error("cannot make a NIC")]
    Nic(#[from] NetError),
    #[error("cannot make persistent memory")]
    Pmem(#[from] PmemError),
    #[error("cannot get the size of a file for persistent memory")]
    Size(#[source] std::io::Error),
    #[error("cannot make the memory device")]
    Memory(#[from] MemError),
    #[error("cannot put a device on the PCI bus")]
    Root(#[from] RootError),
}

/// A machine with its devices, not running yet.
pub(crate) struct Built {
    vm: Vm,
    kernel: Kernel,
    places: Places,
    disks: Vec<(String, BlockHandle)>,
    memory: Option<MemHandle>,
    vsock: Option<VsockDialer>,
}

/// A machine that runs.
pub(crate) struct Booted {
    pub(crate) machine: Machine,
    pub(crate) places: Places,
    pub(crate) disks: Vec<(String, BlockHandle)>,
    pub(crate) memory: Option<MemHandle>,
    /// Reaches the guest's ports.
    pub(crate) vsock: Option<VsockDialer>,
}

impl Built {
    pub(crate) fn boot(self) -> Result<Booted, BuildError> {
        Ok(Booted {
            machine: self.vm.boot(&self.kernel)?,
            places: self.places,
            disks: self.disks,
            memory: self.memory,
            vsock: self.vsock,
        })
    }
}

/// A device of the specification.
enum Device {
    Entropy,
    Vsock(spec::Vsock),
    Disk(spec::Disk),
    Nic(spec::Nic),
    Balloon,
    /// As much as may be plugged.
    Memory {
        bytes: u64,
    },
}

/// Every device of a VM, in the order in which the guest finds them.
fn devices(spec: &VmSpec) -> impl Iterator<Item = Device> + '_ {
    let always = [Device::Vsock(spec.vsock), Device::Entropy, Device::Balloon];
    let more_mib = spec.memory.max_mib - spec.memory.boot_mib;
    let memory = (more_mib > 0).then_some(Device::Memory {
        bytes: (more_mib << 20).next_multiple_of(MEMORY_CHUNK),
    });
    let disks = spec.disks.iter().cloned().map(Device::Disk);
    let nics = spec.nics.iter().cloned().map(Device::Nic);
    always.into_iter().chain(memory).chain(disks).chain(nics)
}

/// Builds the machine and every device.
pub(crate) fn build(
    spec: &VmSpec,
    inherited: &mut Inherited,
    maker: &Arc<Maker>,
    filters: &Arc<Filters>,
) -> Result<Built, BuildError> {
    let host = Host::from_fd(inherited.give(spec.kvm)?)?;
    let vm = Vm::new(host, config(spec, filters))?;
    let console = File::from(inherited.give(spec.console)?);
    let places = Places::new(&vm, console, maker)?;
    let (mut disks, mut memory, mut dialer) = (Vec::new(), None, None);
    for device in devices(spec) {
        let device: Box<dyn VirtioDevice> = match device {
            Device::Entropy => Box::new(Rng::new(places.host.clone())),
            Device::Vsock(vsock) => {
                let listener = UnixListener::from(inherited.give(vsock.listener)?);
                let device = VsockDevice::new(vsock.cid.into(), listener, places.host.clone())?;
                dialer = Some(device.dialer());
                Box::new(device)
            }
            Device::Disk(disk) => {
                let files = inherited.give_all(&disk.files)?;
                let (device, handle) = places.disk(&disk.serial, files, disk.read_only)?;
                disks.push((disk.serial, handle));
                device
            }
            Device::Nic(nic) => {
                let taps = inherited.give_all(&nic.queues)?;
                let vhost = inherited.give_all(&nic.vhost)?;
                places.nic(taps, vhost, nic.mac, nic.mtu)?
            }
            Device::Balloon => {
                // Nobody inflates it: it is there for the pages that the guest reports as free.
                let (balloon, _) = Balloon::new(places.host.clone());
                Box::new(balloon)
            }
            Device::Memory { bytes } => {
                let (device, handle) = places.memory(&vm, bytes)?;
                memory = Some(handle);
                device
            }
        };
        places.add(device)?;
    }
    let kernel = Kernel {
        image: inherited.give(spec.boot.kernel)?.into(),
        initramfs: Some(inherited.give(spec.boot.initramfs)?.into()),
        command_line: spec.boot.cmdline.clone(),
        entry: Entry::Any,
    };
    Ok(Built {
        vm,
        kernel,
        places,
        disks,
        memory,
        vsock: dialer,
    })
}

fn config(spec: &VmSpec, filters: &Arc<Filters>) -> Config {
    // The specification allows no more than 254.
    let count = |vcpus: u32| u8::try_from(vcpus).unwrap_or(u8::MAX);
    let filters = Arc::clone(filters);
    let enter = move |_| filters.enter(ThreadKind::Vcpu).map_err(std::io::Error::other);
    Config {
        ram: Ram {
            backing: Backing::Anonymous,
            huge_pages: spec.memory.huge_pages,
        },
        boot_cpus: count(spec.vcpus.boot),
        cpus: count(spec.vcpus.max),
        serial: true,
        enter_cpu_thread: caisson_machine::EnterCpuThread(Arc::new(enter)),
        ..Config::new(spec.memory.boot_mib << 20)
    }
}

/// Where devices go.
#[derive(Debug)]
pub(crate) struct Places {
    root: Arc<PciRoot>,
    /// What the guest sees of the root bus without an exit; told of every function that comes or goes.
    config: Arc<ConfigMirror>,
    attachment: Attachment,
    host: virtio::Host,
    /// Hears from devices.
    log: Arc<Log>,
    console: Arc<SerialPort<File>>,
    /// All that changes the guest's memory goes through it, so that vhost hears of it.
    memory: Arc<FollowedMemory>,
    /// Every function but the host bridge, by its place.
    functions: Mutex<BTreeMap<PciAddress, Arc<VirtioPci>>>,
}

impl Places {
    fn new(vm: &Vm, console: File, maker: &Arc<Maker>) -> Result<Self, BuildError> {
        let line = vm
            .interrupts()
            .line(layout::SERIAL_GSI)
            .map_err(BuildError::Console)?;
        let console = Arc::new(SerialPort::new(line, console, CONSOLE_BYTES_MAX));
        vm.pio()
            .insert(
                layout::SERIAL_PORT.into(),
                SERIAL_PORTS,
                Arc::clone(&console) as _,
            )
            .map_err(|e| BuildError::Bus("serial port", e))?;
        let log = Arc::new(Log::default());
        let root = Arc::new(PciRoot::new(Window::new(layout::PCI_WINDOW), vm.mmio()));
        let config = vm.mirror_config(Arc::new(Ecam::new(Arc::clone(&root))))?;
        Ok(Self {
            root,
            config,
            attachment: Attachment {
                memory: vm.memory(),
                interrupts: vm.interrupts(),
                doorbells: vm.doorbells(),
                events: Arc::clone(&log) as _,
            },
            host: virtio::Host {
                threads: Arc::clone(maker) as _,
                events: Arc::clone(&log) as _,
            },
            log,
            console,
            memory: Arc::new(FollowedMemory::new(vm.memory_control(), vm.memory())),
            functions: Mutex::default(),
        })
    }

    fn functions(&self) -> MutexGuard<'_, BTreeMap<PciAddress, Arc<VirtioPci>>> {
        // A thread that panics takes the process with it.
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nic(
        &self,
        taps: Vec<OwnedFd>,
        vhost: Vec<OwnedFd>,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<Box<dyn VirtioDevice>, BuildError> {
        let files = |all: Vec<OwnedFd>| all.into_iter().map(File::from).collect::<Vec<_>>();
        let config = NetConfig {
            taps: files(taps),
            mac,
            mtu,
            offloads: true,
        };
        let nic = Net::new(config, self.host.clone())?;
        if vhost.is_empty() {
            return Ok(Box::new(nic));
        }
        let memory = Arc::clone(&self.memory);
        Ok(Box::new(nic.with_vhost(
            files(vhost),
            memory,
            &self.attachment.memory,
        )?))
    }

    fn disk(
        &self,
        serial: &str,
        files: Vec<OwnedFd>,
        read_only: bool,
    ) -> Result<(Box<dyn VirtioDevice>, BlockHandle), BuildError> {
        let config = BlockConfig {
            files: files.into_iter().map(File::from).collect(),
            read_only,
            serial: serial.to_owned(),
            block_bytes: BLOCK_BYTES,
        };
        let (device, handle) = Block::new(config, self.host.clone())?;
        Ok((Box::new(device), handle))
    }

    /// Memory that can be plugged while the VM runs.
    fn memory(&self, vm: &Vm, bytes: u64) -> Result<(Box<dyn VirtioDevice>, MemHandle), BuildError> {
        let layout = Layout {
            address: vm.plug_space(bytes).map_err(caisson_machine::Error::from)?,
            region: bytes,
            block: MEMORY_BLOCK,
            chunk: MEMORY_CHUNK,
        };
        let (device, handle) = Mem::new(layout, Arc::clone(&self.memory) as _, self.host.clone())?;
        Ok((Box::new(device), handle))
    }

    fn add(&self, device: Box<dyn VirtioDevice>) -> Result<PciAddress, BuildError> {
        let function = VirtioPci::new(device, self.attachment.clone())?;
        let place = self.root.add(Arc::clone(&function) as _)?;
        self.functions().insert(place, function);
        self.config.refresh(place.device, place.function);
        Ok(place)
    }

    /// Adds a disk to a running VM. The guest finds it when it looks at its bus again.
    pub(crate) fn add_disk(
        &self,
        serial: &str,
        files: Vec<OwnedFd>,
        read_only: bool,
    ) -> Result<(BlockHandle, PciAddress), BuildError> {
        let (device, handle) = self.disk(serial, files, read_only)?;
        Ok((handle, self.add(device)?))
    }

    /// Adds a NIC to a running VM, as [`Places::add_disk`] does.
    pub(crate) fn add_nic(
        &self,
        taps: Vec<OwnedFd>,
        vhost: Vec<OwnedFd>,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<PciAddress, BuildError> {
        self.add(self.nic(taps, vhost, mac, mtu)?)
    }

    /// Adds persistent memory to a running VM, as [`Places::add_disk`] does; and where it lies, which is the caller's to free after it has been
    /// removed.
    pub(crate) fn add_pmem(
        &self,
        vm: &Vm,
        file: OwnedFd,
        read_only: bool,
    ) -> Result<(PciAddress, u64), BuildError> {
        let file = File::from(file);
        let bytes = file.metadata().map_err(BuildError::Size)?.len();
        let address = vm.plug_space(bytes).map_err(caisson_machine::Error::from)?;
        let config = PmemConfig {
            file,
            address,
            read_only,
        };
        let added = Pmem::new(config, Arc::clone(&self.memory) as _, self.host.clone())
            .map_err(BuildError::from)
            .and_then(|pmem| self.add(Box::new(pmem)));
        match added {
            Ok(place) => Ok((place, address)),
            Err(e) => {
                vm.free_plug_space(address);
                Err(e)
            }
        }
    }

    /// No device touches the guest's memory until [`Places::resume`]; to be called while no vCPU runs.
    pub(crate) fn suspend(&self) {
        for function in self.functions().values() {
            function.suspend();
        }
    }

    /// Devices go on where they were.
    pub(crate) fn resume(&self) {
        for function in self.functions().values() {
            function.resume();
        }
    }

    /// What every function is, while all are suspended.
    pub(crate) fn states(&self) -> Result<Vec<(PciAddress, FunctionState)>, (SaveError, PciAddress)> {
        let functions = self.functions();
        let states = functions.iter().map(|(place, function)| match function.state() {
            Ok(state) => Ok((*place, state)),
            Err(e) => Err((e, *place)),
        });
        states.collect()
    }

    /// What the console is.
    pub(crate) fn console(&self) -> PortState {
        self.console.state()
    }

    /// Serials of the disks whose writes wait for space on the host.
    pub(crate) fn full_disks(&self) -> Vec<String> {
        self.log.full_disks()
    }

    /// Takes a device away. The guest should have let go of it.
    pub(crate) fn remove(&self, place: PciAddress) -> Result<(), BuildError> {
        self.root.remove(place)?;
        self.functions().remove(&place);
        self.config.refresh(place.device, place.function);
        Ok(())
    }

    /// Writes out what the console holds back.
    pub(crate) fn flush(&self) {
        self.console.flush();
    }
}
