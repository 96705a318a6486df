//! A VM before it runs: memory, slots, interrupt controllers, buses.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_devices::{
    bus::Bus,
    ports::{BusDevice, Doorbells, GuestRam, Interrupts, MemoryControl},
};
use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::{Cap, VmFd};
use vm_memory::GuestAddressSpace;

use crate::{
    Error, Host, Machine, Tweaks,
    acpi::Described,
    boot::{self, Kernel},
    config_mirror::{ConfigMirror, Unmirrored},
    doorbells::KvmDoorbells,
    ends::Ends,
    interrupts::{Controller, KvmInterrupts},
    kvm::{CAP_COUNTERS, COUNTERS_DISABLE},
    layout::{ECAM, IDENTITY_MAP, Layout, LayoutError, TSS},
    memory::{Ram, Slots},
    power::Power,
};

/// Called first thing on each vCPU's thread, with its number; if it fails, the machine ends. For confinement.
#[derive(Clone)]
pub struct EnterCpuThread(pub Arc<dyn Fn(u8) -> io::Result<()> + Send + Sync>);

impl fmt::Debug for EnterCpuThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnterCpuThread")
    }
}

impl Default for EnterCpuThread {
    fn default() -> Self {
        Self(Arc::new(|_| Ok(())))
    }
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// RAM in bytes, from the start. More can be plugged.
    pub memory: u64,
    /// What it is made of.
    pub ram: Ram,
    /// vCPUs that run from the start.
    pub boot_cpus: u8,
    /// vCPUs that are present. The guest must be told by `maxcpus=` not to start more than run; the others can be brought online after
    /// [`Machine::grow_cpus`].
    pub cpus: u8,
    /// Whether the tables tell of a serial port; whoever says so puts one on the bus of ports.
    pub serial: bool,
    /// What about the vCPUs is a matter of choice.
    pub tweaks: Tweaks,
    /// Remember where each access went. Costs a lock for each exit.
    pub trace_exits: bool,
    /// Confines the threads of the vCPUs.
    pub enter_cpu_thread: EnterCpuThread,
}

impl Config {
    /// A machine with `memory` bytes of RAM and one vCPU.
    #[must_use]
    pub fn new(memory: u64) -> Self {
        Self {
            memory,
            ram: Ram::default(),
            boot_cpus: 1,
            cpus: 1,
            serial: false,
            tweaks: Tweaks::default(),
            trace_exits: false,
            enter_cpu_thread: EnterCpuThread::default(),
        }
    }
}

/// A VM: what devices need, and what a kernel can be booted in.
#[derive(Debug)]
pub struct Vm {
    // Before the memory, so that it is dropped first.
    fd: Arc<VmFd>,
    host: Host,
    config: Config,
    layout: Mutex<Layout>,
    slots: Arc<Slots>,
    unmirrored: Unmirrored,
    controller: Arc<Controller>,
    pio: Bus,
    mmio: Bus,
    ends: Arc<Ends>,
}

impl Vm {
    /// Makes memory, slots and interrupt controllers. In that order: each change of a slot waits for everybody who looks at the table
    /// of interrupts' routes, but only if there is one.
    pub fn new(host: Host, config: Config) -> Result<Self, Error> {
        let limit = host.cpu_limit();
        if config.boot_cpus == 0 || config.boot_cpus > config.cpus || config.cpus > limit {
            return Err(Error::Cpus {
                boot: config.boot_cpus,
                most: config.cpus,
                limit,
            });
        }
        let layout = Layout::new(config.memory, host.address_bits())?;
        let fd = Arc::new(host.kvm.create_vm().map_err(Error::kvm("create a VM"))?);
        let optional = host.optional;
        if optional.own_pages {
            fd.set_identity_map_address(IDENTITY_MAP)
                .map_err(Error::kvm("place KVM's identity map"))?;
            fd.set_tss_address(TSS as usize)
                .map_err(Error::kvm("place KVM's task state"))?;
        }
        let slot_limit = fd.check_extension_int(Cap::NrMemslots).max(0).unsigned_abs();
        let slots = Slots::new(
            Arc::clone(&fd),
            &layout.ram(),
            config.ram,
            optional.read_only_memory,
            slot_limit,
        )?;
        let unmirrored = Unmirrored::show(&slots)?;
        fd.create_irq_chip()
            .map_err(Error::kvm("create the interrupt controllers"))?;
        if optional.no_counters && !config.tweaks.counters {
            let mut capability = kvm_enable_cap {
                cap: CAP_COUNTERS,
                ..Default::default()
            };
            capability.args[0] = COUNTERS_DISABLE;
            fd.enable_cap(&capability)
                .map_err(Error::kvm("leave out the performance counters"))?;
        }
        let ends = Arc::new(Ends::new().map_err(|source| Error::Kvm {
            what: "make an event",
            source,
        })?);
        let pio = Bus::new();
        pio.insert(Power::START, Power::SIZE, Arc::new(Power::new(Arc::clone(&ends))))
            .map_err(|e| Error::Bus("power switch", e))?;
        Ok(Self {
            controller: Arc::new(Controller::new(Arc::clone(&fd), optional.interrupt_events)),
            fd,
            host,
            config,
            layout: Mutex::new(layout),
            slots: Arc::new(slots),
            unmirrored,
            pio,
            mmio: Bus::new(),
            ends,
        })
    }

    /// The bus of ports. [`crate::layout`] says what is where.
    #[must_use]
    pub fn pio(&self) -> Bus {
        self.pio.clone()
    }

    /// The bus of memory-mapped devices.
    #[must_use]
    pub fn mmio(&self) -> Bus {
        self.mmio.clone()
    }

    /// Makes interrupts.
    #[must_use]
    pub fn interrupts(&self) -> Arc<dyn Interrupts> {
        Arc::new(KvmInterrupts(Arc::clone(&self.controller)))
    }

    /// Makes doorbells.
    #[must_use]
    pub fn doorbells(&self) -> Arc<dyn Doorbells> {
        Arc::new(KvmDoorbells {
            vm: Arc::clone(&self.fd),
            available: self.host.optional.doorbells,
        })
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> GuestRam {
        self.slots.ram().clone()
    }

    /// Changes the guest's memory.
    #[must_use]
    pub fn memory_control(&self) -> Arc<dyn MemoryControl> {
        Arc::clone(&self.slots) as Arc<dyn MemoryControl>
    }

    /// Puts PCI configuration space on the bus of memory-mapped devices, at [`crate::layout::ECAM`]; where KVM can, so that the guest
    /// reads it without an exit.
    pub fn mirror_config(&self, space: Arc<dyn BusDevice>) -> Result<Arc<ConfigMirror>, Error> {
        let mirror = Arc::new(ConfigMirror::new(space, &self.unmirrored));
        self.mmio
            .insert(
                ECAM.start,
                ECAM.end - ECAM.start,
                Arc::clone(&mirror) as Arc<dyn BusDevice>,
            )
            .map_err(|e| Error::Bus("PCI configuration space", e))?;
        Ok(mirror)
    }

    /// Guest-physical space for something that is plugged (a region of virtio-mem, a file of virtio-pmem): its first address, a
    /// multiple of [`crate::layout::PLUG_ALIGNMENT`].
    pub fn plug_space(&self, bytes: u64) -> Result<u64, LayoutError> {
        self.layout
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .plug(bytes)
    }

    /// What was plugged at this address is gone.
    pub fn free_plug_space(&self, start: u64) {
        self.layout
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .unplug(start);
    }

    /// Where the end of the machine is reported, by devices that can end it.
    #[must_use]
    pub fn ends(&self) -> Arc<Ends> {
        Arc::clone(&self.ends)
    }

    /// How it was configured.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What this host's KVM has of what is optional.
    #[must_use]
    pub fn optional(&self) -> crate::kvm::Optional {
        self.host.optional
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Becomes what another machine of the same configuration was, and stands still until [`Machine::resume`]. The guest's memory has been put
    /// back before ([`Vm::memory`]), devices follow before the guest runs.
    pub fn restore(self, state: &crate::MachineState) -> Result<Machine, Error> {
        Machine::restore(self, state)
    }

    /// Loads a kernel and starts the vCPUs.
    pub fn boot(self, kernel: &Kernel) -> Result<Machine, Error> {
        let described = Described {
            cpus: self.config.cpus,
            serial: self.config.serial,
        };
        let layout = self.layout.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let memory = self.slots.ram().memory();
        let start = boot::load(&memory, self.slots.backing(), &layout, kernel, described)?;
        drop(memory);
        Machine::start(self, &start)
    }
}
