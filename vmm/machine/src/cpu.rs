//! What a vCPU is before it runs: its CPUID, its model-specific registers, its first registers.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};

use crate::{Error, Host, boot::Start};

/// IA32_MISC_ENABLE: Linux does without fast string instructions if firmware has not enabled them.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: all memory is write-back, as firmware would say.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// A model-specific register to be set before a vCPU runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrValue {
    /// Which one.
    pub index: u32,
    /// What it becomes.
    pub value: u64,
    /// Whether the machine must not run without it. Flavours of KVM differ in what they know.
    pub required: bool,
}

/// What about the vCPUs is a matter of choice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tweaks {
    /// Registers to set beyond those that firmware would.
    pub msrs: Vec<MsrValue>,
    /// Give the guest performance counters, where KVM can leave them out. They cost exits.
    pub counters: bool,
}

/// Makes vCPU `id` of `most`, ready to run. The first gets its registers from `start`; the others wait to be started by the guest.
pub(crate) fn create(
    vm: &VmFd,
    host: &Host,
    tweaks: &Tweaks,
    id: u8,
    most: u8,
    start: Option<&Start>,
) -> Result<VcpuFd, Error> {
    let cpu = vm.create_vcpu(id.into()).map_err(Error::kvm("create a vCPU"))?;
    cpu.set_cpuid2(&cpuid(host, tweaks, id, most)?)
        .map_err(Error::kvm("set the CPUID of a vCPU"))?;
    set_msrs(&cpu, tweaks, id)?;
    if let Some(start) = start {
        let mut special = cpu
            .get_sregs()
            .map_err(Error::kvm("get the registers of a vCPU"))?;
        start.set_special(&mut special);
        cpu.set_sregs(&special)
            .map_err(Error::kvm("set the special registers of a vCPU"))?;
        cpu.set_regs(&start.registers())
            .map_err(Error::kvm("set the registers of a vCPU"))?;
    }
    Ok(cpu)
}

fn set_msrs(cpu: &VcpuFd, tweaks: &Tweaks, id: u8) -> Result<(), Error> {
    let usual = [MISC_ENABLE, MTRR_DEF_TYPE].map(|(index, value)| MsrValue {
        index,
        value,
        required: false,
    });
    let all: Vec<MsrValue> = usual.into_iter().chain(tweaks.msrs.iter().copied()).collect();
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| Error::Missing("room for that many MSRs"))?;
        // KVM stops at the first that it does not take, and says how many it has set.
        let done = cpu
            .set_msrs(&entries)
            .map_err(Error::kvm("set the MSRs of a vCPU"))?;
        let Some(refused) = rest.get(done) else {
            return Ok(());
        };
        if refused.required {
            return Err(Error::Msr {
                index: refused.index,
                value: refused.value,
                cpu: id,
            });
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}

/// What the guest is told of its CPU: what KVM supports, with the machine's own topology. Every vCPU is a core of one package.
fn cpuid(host: &Host, tweaks: &Tweaks, id: u8, most: u8) -> Result<CpuId, Error> {
    let mut leaves = host.cpuid.as_slice().to_vec();
    let largest = leaves
        .iter()
        .find(|leaf| leaf.function == 0)
        .map_or(0, |leaf| leaf.eax);
    for leaf in &mut leaves {
        adjust(leaf, id, most, host.optional.tsc_deadline_timer, tweaks.counters);
    }
    // The topology of the host's CPU is none of the guest's business.
    leaves.retain(|leaf| !matches!(leaf.function, EXTENDED_TOPOLOGY | V2_EXTENDED_TOPOLOGY));
    if largest >= EXTENDED_TOPOLOGY {
        leaves.extend(topology(id, most));
    }
    CpuId::from_entries(&leaves).map_err(|_| Error::Missing("room for that many CPUID leaves"))
}

const EXTENDED_TOPOLOGY: u32 = 0xb;
const V2_EXTENDED_TOPOLOGY: u32 = 0x1f;

/// Bits of an APIC identifier that number the cores.
fn core_bits(most: u8) -> u32 {
    u32::from(most).next_power_of_two().trailing_zeros()
}

/// Leaf 0xb: one thread for each core, `most` cores in the package (Intel SDM volume 2, CPUID).
fn topology(id: u8, most: u8) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = 1;
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let level = |index, shift, count: u8, kind| kvm_cpuid_entry2 {
        function: EXTENDED_TOPOLOGY,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count.into(),
        ecx: kind | index,
        edx: id.into(),
        ..Default::default()
    };
    [
        level(0, 0, 1, THREADS),
        level(1, core_bits(most), most, CORES),
        level(2, 0, 0, 0),
    ]
}

fn adjust(leaf: &mut kvm_cpuid_entry2, id: u8, most: u8, deadline: bool, counters: bool) {
    const MULTITHREADED: u32 = 1 << 28;
    const DEADLINE_TIMER: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    let package = core_bits(most);
    match leaf.function {
        0x1 => {
            leaf.ebx = leaf.ebx & 0xffff | u32::from(id) << 24 | (1 << package.min(7)) << 16;
            leaf.ecx |= HYPERVISOR;
            set(&mut leaf.ecx, DEADLINE_TIMER, deadline);
            set(&mut leaf.edx, MULTITHREADED, most > 1);
        }
        // Caches, Intel's and AMD's: the last level is everybody's, the others are each core's own.
        0x4 | 0x8000_001d => {
            let kind = leaf.eax & 0x1f;
            let level = leaf.eax >> 5 & 7;
            let shared = if level >= 3 { (1 << package) - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | shared << 14;
            if leaf.function == 0x4 && kind != 0 {
                leaf.eax |= ((1u32 << package) - 1).min(0x3f) << 26;
            }
        }
        // Performance counters.
        0xa if !counters => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        // AMD: number of cores, and bits of the APIC identifier that number them.
        0x8000_0008 => leaf.ecx = leaf.ecx & !0xf0ff | package << 12 | u32::from(most - 1),
        // AMD: APIC identifier, core, node.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id.into(), id.into(), 0),
        _ => {}
    }
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(function: u32, registers: [u32; 4], id: u8, most: u8) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        let mut leaf = kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        adjust(&mut leaf, id, most, true, false);
        leaf
    }

    #[test]
    fn each_cpu_knows_its_own_number() {
        let leaf = adjusted(1, [0; 4], 3, 4);
        assert_eq!(leaf.ebx >> 24, 3);
        assert_eq!(leaf.ebx >> 16 & 0xff, 4);
        assert_ne!(leaf.edx & 1 << 28, 0);
        assert_ne!(leaf.ecx & 1 << 31, 0, "the guest is told that it is one");
        assert_eq!(adjusted(1, [0, 0, 0, u32::MAX], 0, 1).edx & 1 << 28, 0);
        for level in topology(3, 4) {
            assert_eq!(level.edx, 3);
        }
    }

    #[test]
    fn identifiers_have_bits_for_every_core() {
        for (most, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (128, 7), (254, 8)] {
            assert_eq!(topology(0, most)[1].eax, bits);
            assert_eq!(topology(0, most)[1].ebx, u32::from(most));
        }
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        let second = adjusted(4, [2 << 5 | 1, 0, 0, 0], 0, 4).eax;
        let third = adjusted(4, [3 << 5 | 1, 0, 0, 0], 0, 4).eax;
        assert_eq!((second >> 14 & 0xfff, third >> 14 & 0xfff), (0, 3));
        assert_eq!(third >> 26, 3);
        assert_eq!(adjusted(4, [0; 4], 0, 254).eax >> 26, 0, "there is no such cache");
    }
}
