//! QEMU's command line, as a pure function of a [`Plan`] in which every file is a descriptor number already.
//!
//! Every word of it is made of numbers and checked text, so that nothing needs QEMU's quoting of commas.

use std::os::fd::RawFd;

use crate::{Engine, Version};

/// Bridges of the hotplug pool begin at this PCI device number of `pcie.0`.
const FIRST_POOL_DEVICE: usize = 0x10;
/// Device numbers 1 to 31 of a conventional PCI bus.
const SLOTS_PER_POOL: usize = 31;

/// Four bridges. Each slot costs the guest a little ACPI; a bridge costs next to nothing.
pub(crate) const MAX_SLOTS: usize = 4 * SLOTS_PER_POOL;

/// NICs and cold disks together: devices 0x01 to 0x0f less vsock and entropy.
pub(crate) const MAX_COLD_DEVICES: usize = 13;

/// A full host stops the VM, until `space` lets it go on; any other error is the guest's to hear.
pub(crate) const ON_WRITE_ERROR: &str = "enospc";

const CONSOLE_FDSET: u32 = 1;
const COLD_FDSET: u32 = 10;
const HOT_FDSET: u32 = 1000;
const PART_FDSET: u32 = 100_000;
/// Sets of each slot; more than a disk has files.
pub(crate) const PARTS_PER_SLOT: u32 = 1000;

/// Translated code is kept in a buffer that only ever fills up: the default would let it grow to 1 GiB for each VM.
const TCG_BUFFER_MIB: u32 = 128;

/// Console on the serial port, quiet since every byte is an exit; end at once instead of rebooting; no search for hardware that
/// this machine lacks.
const CMDLINE: &[&str] = &[
    "console=ttyS0",
    "quiet",
    "loglevel=4",
    "panic=-1",
    "reboot=t",
    "no_timer_check",
    "random.trust_cpu=on",
    "i8042.noaux",
    "i8042.nokbd",
    // Tests of its own ciphers, a quarter of the distribution kernel's boot.
    "cryptomgr.notests",
];

/// QEMU takes the guest's TSC from the host's clock; on a loaded host the kernel's watchdog finds fault with it all the same, and goes over to a
/// clock that costs an exit for each look.
const TRUST_TSC: &str = "tsc=reliable";

/// QEMU before 8.0 emulates cmpxchg16b such that an interrupt just after it saves random bits as the guest's flags, and returning
/// with them is fatal. SLUB of a hardened kernel uses it in every allocation: without this word half of the boots of Debian's kernel crash
/// on a loaded host, with it none. Programs in the guest still see the instruction, since images for x86-64-v2 insist on it.
const AVOID_CMPXCHG16B: &str = "clearcpuid=cx16";

const FIRST_SOUND_CMPXCHG16B: Version = Version {
    major: 8,
    minor: 0,
    micro: 0,
};

/// Everything that the command line says.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) id: &'a str,
    pub(crate) engine: Engine,
    pub(crate) version: Version,
    pub(crate) vcpus: u32,
    pub(crate) max_vcpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: RawFd,
    pub(crate) initramfs: RawFd,
    pub(crate) cmdline: &'a [String],
    /// Listening socket.
    pub(crate) qmp: RawFd,
    /// Listening socket of a second monitor, on which nothing is done but listening for stops and ending them.
    pub(crate) stops: RawFd,
    /// Opened for appending.
    pub(crate) console: RawFd,
    /// Connected to the vhost-user backend.
    pub(crate) vsock: RawFd,
    pub(crate) nics: Vec<NicPlan>,
    pub(crate) disks: Vec<DiskPlan<'a>>,
    pub(crate) slots: usize,
}

#[derive(Debug)]
pub(crate) struct NicPlan {
    pub(crate) queues: Vec<RawFd>,
    /// As many as `queues`, or none.
    pub(crate) vhost: Vec<RawFd>,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u32,
}

#[derive(Debug)]
pub(crate) struct DiskPlan<'a> {
    pub(crate) fd: RawFd,
    pub(crate) serial: &'a str,
    pub(crate) read_only: bool,
}

/// Names of what belongs to one hotplug slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlotNames {
    pub(crate) bus: String,
    /// Device number on the bus.
    pub(crate) address: String,
    pub(crate) device: String,
    pub(crate) node: String,
    pub(crate) fdset: u32,
    /// The first of the descriptor sets of a disk that is made of several files.
    pub(crate) parts: u32,
}

impl SlotNames {
    pub(crate) fn of(slot: usize) -> Self {
        let number = u32::try_from(slot).unwrap_or(u32::MAX);
        Self {
            bus: format!("pool{}", slot / SLOTS_PER_POOL),
            address: format!("{:#x}", slot % SLOTS_PER_POOL + 1),
            device: format!("hot{slot}"),
            node: format!("hotnode{slot}"),
            fdset: HOT_FDSET.saturating_add(number),
            parts: PART_FDSET.saturating_add(number.saturating_mul(PARTS_PER_SLOT)),
        }
    }
}

/// The words after the program's name.
pub(crate) fn arguments(plan: &Plan<'_>) -> Vec<String> {
    let mut words = Words(Vec::with_capacity(96));
    machine(&mut words, plan);
    boot(&mut words, plan);
    channels(&mut words, plan);
    for (index, nic) in plan.nics.iter().enumerate() {
        network(&mut words, index, nic);
    }
    for (index, disk) in (0_u32..).zip(&plan.disks) {
        cold_disk(&mut words, index, disk);
    }
    for pool in 0..plan.slots.div_ceil(SLOTS_PER_POOL) {
        bridge(&mut words, pool);
    }
    words.0
}

struct Words(Vec<String>);

impl Words {
    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }

    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }
}

fn machine(words: &mut Words, plan: &Plan<'_>) {
    let Plan {
        id,
        memory_mib,
        vcpus,
        max_vcpus,
        ..
    } = plan;
    words.flag("-nodefaults");
    words.flag("-no-user-config");
    words.option("-display", "none");
    words.option("-name", format!("guest=caisson-{id},debug-threads=on"));
    words.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    words.option("-msg", "timestamp=on");
    let machine = "q35,memory-backend=mem,dump-guest-core=off,smm=off,vmport=off,usb=off,sata=off,smbus=off,graphics=off,\
                   hpet=off,i8042=off";
    match plan.engine {
        Engine::Kvm => {
            words.option("-machine", machine);
            words.option("-accel", "kvm");
            words.option("-cpu", "host");
        }
        Engine::Tcg => {
            words.option("-machine", machine);
            words.option("-accel", format!("tcg,thread=multi,tb-size={TCG_BUFFER_MIB}"));
            // Five-level page tables would be walked in software.
            words.option("-cpu", "max,la57=off");
        }
    }
    words.option("-smp", format!("cpus={vcpus},maxcpus={max_vcpus}"));
    words.option("-m", format!("size={memory_mib}M"));
    // vhost-user backends map the guest's memory: hence a memfd, shared.
    words.option(
        "-object",
        format!("memory-backend-memfd,id=mem,size={memory_mib}M,share=on"),
    );
    // The end of the guest is the end of the process.
    words.flag("-no-reboot");
    words.option("-boot", "menu=off,strict=on");
    words.option("-global", "ICH9-LPC.disable_s3=1");
    words.option("-global", "ICH9-LPC.disable_s4=1");
}

fn boot(words: &mut Words, plan: &Plan<'_>) {
    words.option("-kernel", format!("/proc/self/fd/{}", plan.kernel));
    words.option("-initrd", format!("/proc/self/fd/{}", plan.initramfs));
    let emulated = plan.engine == Engine::Tcg;
    let flawed = emulated && plan.version < FIRST_SOUND_CMPXCHG16B;
    let own = CMDLINE
        .iter()
        .copied()
        .chain(emulated.then_some(TRUST_TSC))
        .chain(flawed.then_some(AVOID_CMPXCHG16B));
    let cmdline: Vec<&str> = own.chain(plan.cmdline.iter().map(String::as_str)).collect();
    words.option("-append", cmdline.join(" "));
}

fn channels(words: &mut Words, plan: &Plan<'_>) {
    words.option(
        "-chardev",
        format!("socket,id=qmp,fd={},server=on,wait=off", plan.qmp),
    );
    words.option("-mon", "chardev=qmp,mode=control");
    words.option(
        "-chardev",
        format!("socket,id=stops,fd={},server=on,wait=off", plan.stops),
    );
    words.option("-mon", "chardev=stops,mode=control");
    words.option("-add-fd", format!("fd={},set={CONSOLE_FDSET}", plan.console));
    words.option(
        "-chardev",
        format!("file,id=console,path=/dev/fdset/{CONSOLE_FDSET},append=on"),
    );
    words.option("-serial", "chardev:console");
    words.option("-chardev", format!("socket,id=vsock,fd={}", plan.vsock));
    words.option(
        "-device",
        "vhost-user-vsock-pci,id=vsock0,chardev=vsock,disable-legacy=on,romfile=",
    );
    words.option("-device", "virtio-rng-pci,id=rng0,disable-legacy=on,romfile=");
}

fn join(fds: &[RawFd]) -> String {
    fds.iter().map(ToString::to_string).collect::<Vec<_>>().join(":")
}

fn network(words: &mut Words, index: usize, nic: &NicPlan) {
    let [a, b, c, d, e, f] = nic.mac;
    let pairs = nic.queues.len();
    let several = pairs > 1;
    let mut netdev = format!("tap,id=net{index},");
    netdev += &if several {
        format!("fds={}", join(&nic.queues))
    } else {
        format!("fd={}", join(&nic.queues))
    };
    netdev += &match (nic.vhost.len() == pairs && pairs > 0, several) {
        (false, _) => ",vhost=off".to_owned(),
        (true, false) => format!(",vhost=on,vhostfd={}", join(&nic.vhost)),
        (true, true) => format!(",vhost=on,vhostfds={}", join(&nic.vhost)),
    };
    words.option("-netdev", netdev);
    let mut device = format!(
        "virtio-net-pci,id=nic{index},netdev=net{index},mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x},\
         host_mtu={},disable-legacy=on,romfile=",
        nic.mtu
    );
    if several {
        // virtio 1.2, 5.1: a vector for each queue of each pair, the control queue and the configuration.
        device += &format!(",mq=on,vectors={}", 2 * pairs + 2);
    }
    words.option("-device", device);
}

fn cold_disk(words: &mut Words, index: u32, disk: &DiskPlan<'_>) {
    let set = COLD_FDSET + index;
    let read_only = if disk.read_only { "on" } else { "off" };
    words.option("-add-fd", format!("fd={},set={set}", disk.fd));
    words.option(
        "-blockdev",
        format!(
            "driver=file,node-name=coldnode{index},filename=/dev/fdset/{set},read-only={read_only},auto-read-only=off,\
             locking=off,discard=unmap"
        ),
    );
    words.option(
        "-device",
        format!(
            "virtio-blk-pci,id=cold{index},drive=coldnode{index},serial={},disable-legacy=on,werror={ON_WRITE_ERROR},\
             rerror=report,romfile=",
            disk.serial
        ),
    );
}

/// A conventional PCI bridge, onto which the guest's ACPI plugs devices. A PCIe root port for each slot works as well, but the guest spends
/// 35 ms of emulated boot on each.
fn bridge(words: &mut Words, pool: usize) {
    words.option(
        "-device",
        format!(
            "pci-bridge,id=pool{pool},bus=pcie.0,addr={:#x},chassis_nr={},shpc=on",
            FIRST_POOL_DEVICE + pool,
            pool + 1
        ),
    );
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn plan(cmdline: &[String]) -> Plan<'_> {
        Plan {
            id: "0a1b",
            engine: Engine::Tcg,
            version: Version {
                major: 7,
                minor: 2,
                micro: 22,
            },
            vcpus: 2,
            max_vcpus: 4,
            memory_mib: 256,
            kernel: 10,
            initramfs: 11,
            cmdline,
            qmp: 12,
            stops: 15,
            console: 13,
            vsock: 14,
            nics: Vec::new(),
            disks: Vec::new(),
            slots: 0,
        }
    }

    fn values<'a>(words: &'a [String], option: &str) -> Vec<&'a str> {
        words
            .windows(2)
            .filter(|pair| pair[0] == option)
            .map(|pair| pair[1].as_str())
            .collect()
    }

    #[test]
    fn sizes_files_and_words_of_the_caller_are_on_the_line() {
        let extra = [
            "caisson.debug".to_owned(),
            "memhp_default_state=online_kernel".to_owned(),
        ];
        let words = arguments(&plan(&extra));
        assert_eq!(values(&words, "-smp"), ["cpus=2,maxcpus=4"]);
        assert_eq!(values(&words, "-m"), ["size=256M"]);
        assert_eq!(
            values(&words, "-object"),
            ["memory-backend-memfd,id=mem,size=256M,share=on"]
        );
        assert_eq!(values(&words, "-kernel"), ["/proc/self/fd/10"]);
        assert_eq!(values(&words, "-initrd"), ["/proc/self/fd/11"]);
        let append = values(&words, "-append")[0];
        assert!(append.starts_with("console=ttyS0 "), "{append}");
        assert!(
            append.ends_with(" caisson.debug memhp_default_state=online_kernel"),
            "{append}"
        );
        assert!(words.contains(&"-no-reboot".to_owned()));
        assert!(values(&words, "-sandbox")[0].contains("spawn=deny"));
    }

    #[test]
    fn only_a_flawed_emulation_hides_an_instruction_from_the_kernel() {
        let mut plan = plan(&[]);
        let hides = |plan: &Plan<'_>| values(&arguments(plan), "-append")[0].contains("clearcpuid=cx16");
        assert!(hides(&plan));
        plan.version = FIRST_SOUND_CMPXCHG16B;
        assert!(!hides(&plan));
        plan.version = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        plan.engine = Engine::Kvm;
        assert!(!hides(&plan));
    }

    #[test]
    fn the_accelerator_decides_on_the_cpu_model() {
        let mut plan = plan(&[]);
        assert!(values(&arguments(&plan), "-accel")[0].starts_with("tcg,"));
        plan.engine = Engine::Kvm;
        let words = arguments(&plan);
        assert_eq!(values(&words, "-accel"), ["kvm"]);
        assert_eq!(values(&words, "-cpu"), ["host"]);
    }

    #[test]
    fn a_nic_gets_its_descriptors_and_several_queues_get_vectors() {
        let mut plan = plan(&[]);
        let mac = [2, 0, 0, 0xab, 0, 1];
        plan.nics = vec![
            NicPlan {
                queues: vec![20],
                vhost: vec![],
                mac,
                mtu: 1450,
            },
            NicPlan {
                queues: vec![21, 22],
                vhost: vec![23, 24],
                mac,
                mtu: 9000,
            },
        ];
        let words = arguments(&plan);
        assert_eq!(
            values(&words, "-netdev"),
            [
                "tap,id=net0,fd=20,vhost=off",
                "tap,id=net1,fds=21:22,vhost=on,vhostfds=23:24"
            ]
        );
        let devices = values(&words, "-device");
        let nics: Vec<_> = devices.iter().filter(|d| d.starts_with("virtio-net")).collect();
        assert!(
            nics[0].contains("mac=02:00:00:ab:00:01,host_mtu=1450"),
            "{nics:?}"
        );
        assert!(!nics[0].contains("mq=on"));
        assert!(nics[1].ends_with("mq=on,vectors=6"), "{nics:?}");
    }

    #[test]
    fn a_cold_disk_is_opened_through_its_own_descriptor_set() {
        let mut plan = plan(&[]);
        plan.disks = vec![
            DiskPlan {
                fd: 30,
                serial: "rootfs",
                read_only: true,
            },
            DiskPlan {
                fd: 31,
                serial: "scratch",
                read_only: false,
            },
        ];
        let words = arguments(&plan);
        assert_eq!(values(&words, "-add-fd")[1..], ["fd=30,set=10", "fd=31,set=11"]);
        let nodes = values(&words, "-blockdev");
        assert!(
            nodes[0].contains("filename=/dev/fdset/10,read-only=on"),
            "{nodes:?}"
        );
        assert!(
            nodes[1].contains("filename=/dev/fdset/11,read-only=off"),
            "{nodes:?}"
        );
        let devices = values(&words, "-device");
        let disks = devices.iter().filter(|device| device.starts_with("virtio-blk"));
        assert!(
            disks.clone().count() == 2
                && disks
                    .clone()
                    .all(|disk| disk.contains("werror=enospc,rerror=report")),
            "{devices:?}"
        );
    }

    #[test]
    fn every_slot_has_a_place_of_its_own_on_a_bridge_that_exists() {
        let mut plan = plan(&[]);
        for slots in [0, 1, SLOTS_PER_POOL, SLOTS_PER_POOL + 1, MAX_SLOTS] {
            plan.slots = slots;
            let words = arguments(&plan);
            let bridges: HashSet<_> = values(&words, "-device")
                .into_iter()
                .filter_map(|device| device.strip_prefix("pci-bridge,id=")?.split(',').next())
                .map(str::to_owned)
                .collect();
            let names: Vec<_> = (0..slots).map(SlotNames::of).collect();
            assert!(
                names.iter().all(|name| bridges.contains(&name.bus)),
                "{slots}: {bridges:?}"
            );
            let places: HashSet<_> = names.iter().map(|name| (&name.bus, &name.address)).collect();
            assert_eq!(places.len(), slots);
        }
    }
}
