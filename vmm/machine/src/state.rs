//! What a paused machine is to KVM: its vCPUs, its interrupt controllers and its clock, as plain data that can be written down and given to
//! another machine. Guest memory is not in it; [`MachineState::memory`] says where it lies.
//!
//! Which model-specific registers there are to save is asked of KVM; hosts know of more (KVM_GET_MSR_INDEX_LIST leaves some out), so a caller can
//! name others. Everything that a flavour of KVM may lack is optional here as well.

#![expect(
    unsafe_code,
    reason = "KVM reads a whole XSAVE area, whose size only it knows"
)]

use kvm_bindings::{
    Msrs, kvm_clock_data, kvm_debugregs, kvm_fpu, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::{Error, Host};

/// Most registers that a caller may name.
pub const NAMED_MSRS_MAX: usize = 256;

/// What one call of KVM takes (KVM_MAX_MSR_ENTRIES of arch/x86/kvm/x86.c).
const MSRS_AT_ONCE: usize = 256;
/// IA32_TSC_DEADLINE: means something only when the clock and the local APIC are as they were, so it comes last.
const TSC_DEADLINE: u32 = 0x6e0;
/// Both 8259s and the I/O APIC (linux/kvm.h).
const CONTROLLERS: [u32; 3] = [0, 1, 2];
/// Bytes of an XSAVE area that KVM_SET_XSAVE reads unless a guest may use dynamic features (AMX), which a process has to ask for.
const XSAVE_BYTES: i32 = 4096;

/// A machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// By number; those that have been made.
    pub cpus: Vec<CpuState>,
    /// Both 8259s and the I/O APIC.
    pub controllers: Vec<kvm_irqchip>,
    /// The guest's clock (KVM_GET_CLOCK).
    pub clock: kvm_clock_data,
    /// First address and bytes of each piece of the guest's memory.
    pub memory: Vec<(u64, u64)>,
}

/// A vCPU, in KVM's own structures.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// Whether it runs, sleeps, or waits to be started.
    pub mode: kvm_mp_state,
    /// General registers.
    pub registers: kvm_regs,
    /// Segments, control registers, tables.
    pub special: kvm_sregs,
    /// Floating point and vectors.
    pub floating: Floating,
    /// Breakpoints.
    pub debug: Option<kvm_debugregs>,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// Interrupts and exceptions on their way.
    pub events: Option<kvm_vcpu_events>,
    /// What the guest's TSC counts, kHz.
    pub tsc_khz: Option<u32>,
}

/// Floating point and vector registers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Floating {
    /// On a CPU with XSAVE.
    Extended {
        /// The area, boxed for its size.
        area: Box<kvm_xsave>,
        /// What of it is in use.
        control: Option<Box<kvm_xcrs>>,
    },
    /// On one without: x87 and SSE, as `struct kvm_fpu` has them.
    Plain(Box<Fpu>),
}

/// `struct kvm_fpu` (linux/kvm.h for x86).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the names of KVM's structure")]
pub struct Fpu {
    pub fpr: [[u8; 16]; 8],
    pub fcw: u16,
    pub fsw: u16,
    pub ftwx: u8,
    pub last_opcode: u16,
    pub last_ip: u64,
    pub last_dp: u64,
    pub xmm: [[u8; 16]; 16],
    pub mxcsr: u32,
}

impl From<kvm_fpu> for Fpu {
    fn from(fpu: kvm_fpu) -> Self {
        Self {
            fpr: fpu.fpr,
            fcw: fpu.fcw,
            fsw: fpu.fsw,
            ftwx: fpu.ftwx,
            last_opcode: fpu.last_opcode,
            last_ip: fpu.last_ip,
            last_dp: fpu.last_dp,
            xmm: fpu.xmm,
            mxcsr: fpu.mxcsr,
        }
    }
}

impl From<&Fpu> for kvm_fpu {
    fn from(fpu: &Fpu) -> Self {
        Self {
            fpr: fpu.fpr,
            fcw: fpu.fcw,
            fsw: fpu.fsw,
            ftwx: fpu.ftwx,
            last_opcode: fpu.last_opcode,
            last_ip: fpu.last_ip,
            last_dp: fpu.last_dp,
            xmm: fpu.xmm,
            mxcsr: fpu.mxcsr,
            ..Self::default()
        }
    }
}

/// Model-specific registers to save: what KVM says, then what the caller says, each once.
pub(crate) fn msrs_to_save(host: &Host, named: &[u32]) -> Result<Vec<u32>, Error> {
    if named.len() > NAMED_MSRS_MAX {
        return Err(Error::Missing("room for that many MSRs"));
    }
    let list = host
        .kvm
        .get_msr_index_list()
        .map_err(Error::kvm("learn which MSRs KVM saves"))?;
    Ok(in_order(list.as_slice(), named))
}

fn in_order(known: &[u32], named: &[u32]) -> Vec<u32> {
    let mut all: Vec<u32> = Vec::with_capacity(known.len() + named.len());
    for &index in known.iter().chain(named) {
        if !all.contains(&index) {
            all.push(index);
        }
    }
    all.sort_by_key(|index| *index == TSC_DEADLINE);
    all
}

/// What a vCPU that does not run is. `named` must be readable; what else KVM lists and does not give is left out.
pub(crate) fn save_cpu(
    cpu: &VcpuFd,
    id: u8,
    host: &Host,
    indices: &[u32],
    named: &[u32],
) -> Result<CpuState, Error> {
    let has = |capability| host.kvm.check_extension(capability);
    // First: it may let interrupts through that change the others.
    let mode = cpu.get_mp_state().map_err(Error::kvm("get the mode of a vCPU"))?;
    let floating = if has(Cap::Xsave) {
        Floating::Extended {
            area: Box::new(
                cpu.get_xsave()
                    .map_err(Error::kvm("get the XSAVE area of a vCPU"))?,
            ),
            control: has(Cap::Xcrs)
                .then(|| cpu.get_xcrs())
                .transpose()
                .map_err(Error::kvm("get the XCRs of a vCPU"))?
                .map(Box::new),
        }
    } else {
        let fpu = cpu
            .get_fpu()
            .map_err(Error::kvm("get the floating point registers of a vCPU"))?;
        Floating::Plain(Box::new(fpu.into()))
    };
    Ok(CpuState {
        mode,
        registers: cpu
            .get_regs()
            .map_err(Error::kvm("get the registers of a vCPU"))?,
        special: cpu
            .get_sregs()
            .map_err(Error::kvm("get the special registers of a vCPU"))?,
        floating,
        debug: has(Cap::Debugregs)
            .then(|| cpu.get_debug_regs())
            .transpose()
            .map_err(Error::kvm("get the debug registers of a vCPU"))?,
        lapic: cpu
            .get_lapic()
            .map_err(Error::kvm("get the local APIC of a vCPU"))?,
        msrs: save_msrs(cpu, id, indices, named)?,
        events: has(Cap::VcpuEvents)
            .then(|| cpu.get_vcpu_events())
            .transpose()
            .map_err(Error::kvm("get the events of a vCPU"))?,
        // Only for whoever compares two hosts.
        tsc_khz: cpu.get_tsc_khz().ok(),
    })
}

fn save_msrs(cpu: &VcpuFd, id: u8, indices: &[u32], named: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let count = rest.len().min(MSRS_AT_ONCE);
        let entries: Vec<_> = rest
            .iter()
            .take(count)
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut entries =
            Msrs::from_entries(&entries).map_err(|_| Error::Missing("room for that many MSRs"))?;
        // KVM stops at the first that it does not give, and says how many it has given.
        let done = cpu
            .get_msrs(&mut entries)
            .map_err(Error::kvm("get the MSRs of a vCPU"))?;
        saved.extend(entries.as_slice().iter().take(done));
        let skipped = usize::from(done < count);
        if let Some(&index) = rest
            .get(done)
            .filter(|index| skipped > 0 && named.contains(index))
        {
            return Err(Error::MsrRead { index, cpu: id });
        }
        rest = rest.get(done + skipped..).unwrap_or_default();
    }
    Ok(saved)
}

/// Makes a fresh vCPU what another one was.
pub(crate) fn restore_cpu(cpu: &VcpuFd, id: u8, host: &Host, state: &CpuState) -> Result<(), Error> {
    cpu.set_mp_state(state.mode)
        .map_err(Error::kvm("set the mode of a vCPU"))?;
    cpu.set_regs(&state.registers)
        .map_err(Error::kvm("set the registers of a vCPU"))?;
    cpu.set_sregs(&state.special)
        .map_err(Error::kvm("set the special registers of a vCPU"))?;
    restore_floating(cpu, host, &state.floating)?;
    if let Some(debug) = &state.debug {
        cpu.set_debug_regs(debug)
            .map_err(Error::kvm("set the debug registers of a vCPU"))?;
    }
    // Behind the special registers, which say what kind of APIC it is, and before the MSRs that make it tick.
    cpu.set_lapic(&state.lapic)
        .map_err(Error::kvm("set the local APIC of a vCPU"))?;
    restore_msrs(cpu, id, &state.msrs)?;
    if let Some(events) = &state.events {
        cpu.set_vcpu_events(events)
            .map_err(Error::kvm("set the events of a vCPU"))?;
    }
    Ok(())
}

fn restore_floating(cpu: &VcpuFd, host: &Host, floating: &Floating) -> Result<(), Error> {
    match floating {
        Floating::Plain(fpu) => cpu
            .set_fpu(&kvm_fpu::from(&**fpu))
            .map_err(Error::kvm("set the floating point registers of a vCPU")),
        Floating::Extended { area, control } => {
            if host.kvm.check_extension_raw(Cap::Xsave2 as u64) > XSAVE_BYTES {
                return Err(Error::Missing("XSAVE area of 4096 bytes"));
            }
            if let Some(control) = control {
                cpu.set_xcrs(control)
                    .map_err(Error::kvm("set the XCRs of a vCPU"))?;
            }
            // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, which is no more than the 4096 of the structure, as just checked.
            unsafe { cpu.set_xsave(area) }.map_err(Error::kvm("set the XSAVE area of a vCPU"))
        }
    }
}

/// A register that KVM does not take is no failure if it has the value already: hosts list registers that can only be read.
fn restore_msrs(cpu: &VcpuFd, id: u8, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
    let room = |_| Error::Missing("room for that many MSRs");
    let mut rest = msrs;
    while !rest.is_empty() {
        let count = rest.len().min(MSRS_AT_ONCE);
        let entries = Msrs::from_entries(rest.get(..count).unwrap_or_default()).map_err(room)?;
        let done = cpu
            .set_msrs(&entries)
            .map_err(Error::kvm("set the MSRs of a vCPU"))?;
        if let Some(refused) = rest.get(done).filter(|_| done < count) {
            let mut now = Msrs::from_entries(&[kvm_msr_entry {
                index: refused.index,
                ..Default::default()
            }])
            .map_err(room)?;
            let read = cpu
                .get_msrs(&mut now)
                .map_err(Error::kvm("get the MSRs of a vCPU"))?;
            let same = now.as_slice().first().is_some_and(|now| now.data == refused.data);
            if read == 0 || !same {
                return Err(Error::Msr {
                    index: refused.index,
                    value: refused.data,
                    cpu: id,
                });
            }
        }
        rest = rest.get(done + usize::from(done < count)..).unwrap_or_default();
    }
    Ok(())
}

/// Interrupt controllers and clock.
pub(crate) fn save_vm(vm: &VmFd) -> Result<(Vec<kvm_irqchip>, kvm_clock_data), Error> {
    let mut controllers = Vec::with_capacity(CONTROLLERS.len());
    for chip_id in CONTROLLERS {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(Error::kvm("get an interrupt controller"))?;
        controllers.push(chip);
    }
    let clock = vm.get_clock().map_err(Error::kvm("get the clock"))?;
    Ok((controllers, clock))
}

/// Interrupt controllers and clock of another machine.
pub(crate) fn restore_vm(
    vm: &VmFd,
    controllers: &[kvm_irqchip],
    clock: &kvm_clock_data,
) -> Result<(), Error> {
    for chip in controllers {
        vm.set_irqchip(chip)
            .map_err(Error::kvm("set an interrupt controller"))?;
    }
    // Its flags say what KVM gave, not what it takes.
    let clock = kvm_clock_data {
        clock: clock.clock,
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(Error::kvm("set the clock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_registers_come_behind_those_of_kvm_and_the_deadline_last() {
        assert_eq!(
            in_order(&[TSC_DEADLINE, 0x10, 0x1b], &[0x4b56_4d05, 0x10, 0x10a, 0x10a]),
            [0x10, 0x1b, 0x4b56_4d05, 0x10a, TSC_DEADLINE]
        );
        assert_eq!(in_order(&[], &[]), [0u32; 0]);
    }
}
