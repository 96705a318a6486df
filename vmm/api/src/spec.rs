//! What a VM is made of: numbers and descriptors, no paths.
//!
//! Every file, socket and device has been opened by whoever starts the VMM and is inherited under the number given here.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{DecodeError, decode, is_serial};

/// Longest specification, bytes of JSON.
pub const SPEC_BYTES_MAX: usize = 256 * 1024;
/// Longest kernel command line in bytes: COMMAND_LINE_SIZE of x86 less the final NUL (arch/x86/include/asm/setup.h).
pub const CMDLINE_BYTES_MAX: usize = 2047;
/// Most vCPUs of a VM: xAPIC ids without an interrupt remapper.
pub const VCPUS_MAX: u32 = 254;
/// A guest of less cannot unpack its kernel, MiB.
pub const MEMORY_MIN_MIB: u64 = 32;
/// Most memory of a VM, MiB: 4 TiB.
pub const MEMORY_MAX_MIB: u64 = 4 << 20;
/// Most disks and NICs together, those to be attached later included: what one PCI bus holds less vsock, entropy, balloon and memory device.
pub const DEVICES_MAX: usize = 128;
/// Most files that one disk is made of.
pub const FILES_PER_DISK_MAX: usize = 128;
/// Most queue pairs of a NIC.
pub const QUEUES_PER_NIC_MAX: usize = 16;

/// The number of an inherited descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Descriptor(pub i32);

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Names the VM in logs: 1 to 128 letters, digits and hyphens.
    pub id: String,
    /// `/dev/kvm`.
    pub kvm: Descriptor,
    /// What is booted.
    pub boot: Boot,
    /// Processors.
    pub vcpus: Vcpus,
    /// Memory.
    pub memory: Memory,
    /// Gets what the guest writes to its serial port; opened for appending.
    pub console: Descriptor,
    /// The socket device.
    pub vsock: Vsock,
    /// Disks that are there at boot, in order.
    pub disks: Vec<Disk>,
    /// Network devices, in order.
    pub nics: Vec<Nic>,
    /// How many disks must be attachable later.
    pub attach_slots: u32,
    /// Listening socket (SOCK_SEQPACKET) of the control protocol.
    pub control: Descriptor,
    /// File that gets the exit record.
    pub exit_record: Descriptor,
    /// Pipe that gets [`Started`]'s lines; its end without the last of them means that the VM did not start.
    pub started: Descriptor,
    /// What the process takes from itself before the guest runs.
    pub confinement: Confinement,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// vmlinux or bzImage.
    pub kernel: Descriptor,
    /// cpio archive.
    pub initramfs: Descriptor,
    /// The kernel's command line, as a whole.
    pub cmdline: String,
}

/// Processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vcpus {
    /// Online at boot.
    pub boot: u32,
    /// That may ever be online.
    pub max: u32,
}

/// Memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// There at boot, MiB.
    pub boot_mib: u64,
    /// What it may grow to, MiB.
    pub max_mib: u64,
    /// Ask the host for huge pages: less CPU to boot, more memory.
    pub huge_pages: bool,
}

/// The socket device: hybrid vsock, connections by the host only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Listening socket on which the host writes `CONNECT <port>`.
    pub listener: Descriptor,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// How the guest finds it.
    pub serial: String,
    /// One file, or several that make one disk one behind the other.
    pub files: Vec<Descriptor>,
    /// The device refuses writes.
    pub read_only: bool,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Open taps (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), one for each queue pair.
    pub queues: Vec<Descriptor>,
    /// `/dev/vhost-net`, as often as there are taps; or none, and packets take the way through the VMM.
    pub vhost: Vec<Descriptor>,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u16,
}

/// What the process takes from itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confinement {
    /// User and group to become; absent: it stays who it is, without capabilities.
    pub user: Option<User>,
    /// Mount, network, IPC, UTS and PID namespaces of its own, and an empty root directory. Needs privilege.
    pub namespaces: bool,
}

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// What the process says of its start, a line each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// The process that runs the VM from now on, as seen by whoever started it: the one that was started may end.
    Process(i32),
    /// The guest runs.
    Running,
}

impl Started {
    /// The line, line feed included.
    #[must_use]
    pub fn line(self) -> String {
        match self {
            Self::Process(pid) => format!("process {pid}\n"),
            Self::Running => "running\n".to_owned(),
        }
    }

    /// Reads a line without its line feed.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        match line.split_once(' ') {
            Some(("process", pid)) => pid.parse().ok().filter(|pid| *pid > 0).map(Self::Process),
            _ => (line == "running").then_some(Self::Running),
        }
    }
}

impl VmSpec {
    /// Reads and checks a specification.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "the VM's specification";
        let spec: Self = decode(what, bytes, SPEC_BYTES_MAX)?;
        let problems = spec.problems();
        if problems.is_empty() {
            Ok(spec)
        } else {
            Err(DecodeError::Invalid { what, problems })
        }
    }

    /// Its JSON.
    pub fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        serde_json::to_vec(self).map_err(|source| DecodeError::Json {
            what: "the VM's specification",
            source,
        })
    }

    /// Every descriptor it names.
    #[must_use]
    pub fn descriptors(&self) -> Vec<Descriptor> {
        let mut all = vec![
            self.kvm,
            self.boot.kernel,
            self.boot.initramfs,
            self.console,
            self.vsock.listener,
            self.control,
            self.exit_record,
            self.started,
        ];
        all.extend(self.disks.iter().flat_map(|disk| &disk.files));
        all.extend(
            self.nics
                .iter()
                .flat_map(|nic| nic.queues.iter().chain(&nic.vhost)),
        );
        all
    }

    /// All that is wrong with it.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if self.id.is_empty() || self.id.len() > 128 || !self.id.bytes().all(plain) {
            problems.push(format!(
                "id {:?} is not made of 1 to 128 letters, digits and hyphens",
                self.id
            ));
        }
        let cmdline = &self.boot.cmdline;
        if cmdline.len() > CMDLINE_BYTES_MAX
            || !cmdline
                .bytes()
                .all(|byte| byte.is_ascii_graphic() || byte == b' ')
        {
            problems.push(format!(
                "the command line is longer than {CMDLINE_BYTES_MAX} bytes or not printable"
            ));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus.boot)
            || !(self.vcpus.boot..=VCPUS_MAX).contains(&self.vcpus.max)
        {
            problems.push(format!(
                "{} vCPUs of at most {} do not fit 1 to {VCPUS_MAX}",
                self.vcpus.boot, self.vcpus.max
            ));
        }
        if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&self.memory.boot_mib)
            || !(self.memory.boot_mib..=MEMORY_MAX_MIB).contains(&self.memory.max_mib)
        {
            problems.push(format!(
                "{} MiB of memory of at most {} do not fit {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB}",
                self.memory.boot_mib, self.memory.max_mib
            ));
        }
        if self.vsock.cid < 3 {
            problems.push(format!("context id {} is less than 3", self.vsock.cid));
        }
        self.device_problems(&mut problems);
        self.descriptor_problems(&mut problems);
        problems
    }

    fn device_problems(&self, problems: &mut Vec<String>) {
        let devices = (self.disks.len() + self.nics.len()).saturating_add(self.attach_slots as usize);
        if devices > DEVICES_MAX {
            problems.push(format!(
                "{} disks, {} NICs and {} slots for disks are more than {DEVICES_MAX} devices",
                self.disks.len(),
                self.nics.len(),
                self.attach_slots
            ));
        }
        let mut serials = BTreeSet::new();
        for disk in &self.disks {
            if !is_serial(&disk.serial) {
                problems.push(format!("{:?} is no serial of a disk", disk.serial));
            }
            if !serials.insert(&disk.serial) {
                problems.push(format!("two disks have the serial {:?}", disk.serial));
            }
            if !(1..=FILES_PER_DISK_MAX).contains(&disk.files.len()) {
                problems.push(format!(
                    "disk {:?} is not made of 1 to {FILES_PER_DISK_MAX} files",
                    disk.serial
                ));
            }
        }
        for (index, nic) in self.nics.iter().enumerate() {
            if !(1..=QUEUES_PER_NIC_MAX).contains(&nic.queues.len()) {
                problems.push(format!(
                    "NIC {index} does not have 1 to {QUEUES_PER_NIC_MAX} taps"
                ));
            }
            if !nic.vhost.is_empty() && nic.vhost.len() != nic.queues.len() {
                problems.push(format!(
                    "NIC {index} has {} taps and {} vhost descriptors",
                    nic.queues.len(),
                    nic.vhost.len()
                ));
            }
            if !(68..=65_521).contains(&nic.mtu) {
                problems.push(format!("NIC {index} has an MTU of {}", nic.mtu));
            }
        }
    }

    fn descriptor_problems(&self, problems: &mut Vec<String>) {
        let mut seen = BTreeSet::new();
        for descriptor in self.descriptors() {
            if descriptor.0 < 3 {
                problems.push(format!(
                    "descriptor {} is not one that can be passed",
                    descriptor.0
                ));
            } else if !seen.insert(descriptor) {
                problems.push(format!("descriptor {} is named twice", descriptor.0));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            id: "0a1b".into(),
            kvm: Descriptor(3),
            boot: Boot {
                kernel: Descriptor(4),
                initramfs: Descriptor(5),
                cmdline: "console=ttyS0 quiet".into(),
            },
            vcpus: Vcpus { boot: 1, max: 4 },
            memory: Memory {
                boot_mib: 128,
                max_mib: 128,
                huge_pages: false,
            },
            console: Descriptor(6),
            vsock: Vsock {
                cid: 3,
                listener: Descriptor(7),
            },
            disks: vec![Disk {
                serial: "scratch".into(),
                files: vec![Descriptor(8)],
                read_only: false,
            }],
            nics: vec![Nic {
                queues: vec![Descriptor(9)],
                vhost: vec![Descriptor(10)],
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
            }],
            attach_slots: 8,
            control: Descriptor(11),
            exit_record: Descriptor(12),
            started: Descriptor(13),
            confinement: Confinement {
                user: Some(User { uid: 7, gid: 7 }),
                namespaces: true,
            },
        }
    }

    #[test]
    fn a_specification_survives_the_way_to_the_process() {
        let spec = spec();
        assert_eq!(VmSpec::decode(&spec.encode().unwrap()).unwrap(), spec);
        assert_eq!(spec.descriptors().len(), 11);
    }

    #[test]
    fn lines_about_the_start_are_read_as_they_were_written() {
        for started in [Started::Process(77), Started::Running] {
            assert_eq!(Started::parse(started.line().trim_end()), Some(started));
        }
        for wrong in ["", "process", "process -1", "process x", "running now"] {
            assert_eq!(Started::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let mut spec = spec();
        spec.id = "a/b".into();
        spec.boot.cmdline = "a\nb".into();
        spec.vcpus = Vcpus { boot: 4, max: 2 };
        spec.memory.max_mib = 64;
        spec.vsock.cid = 2;
        spec.disks.push(spec.disks[0].clone());
        spec.nics[0].queues.push(Descriptor(1));
        spec.nics[0].mtu = 9;
        spec.attach_slots = 199;
        let problems = spec.problems().join("\n");
        for word in [
            "id \"a/b\"",
            "command line",
            "4 vCPUs",
            "128 MiB",
            "context id 2",
            "serial \"scratch\"",
            "vhost",
            "MTU of 9",
            "199 slots",
            "descriptor 1 is not",
            "descriptor 8 is named twice",
        ] {
            assert!(problems.contains(word), "{word} in {problems}");
        }
    }

    #[test]
    fn unknown_fields_and_oversized_texts_are_refused() {
        let mut json: serde_json::Value = serde_json::from_slice(&spec().encode().unwrap()).unwrap();
        json["surprise"] = true.into();
        let error = VmSpec::decode(json.to_string().as_bytes()).unwrap_err();
        assert!(matches!(error, DecodeError::Json { .. }), "{error}");
        let error = VmSpec::decode(&vec![b' '; SPEC_BYTES_MAX + 1]).unwrap_err();
        assert!(matches!(error, DecodeError::TooLong { .. }), "{error}");
    }
}
