//! In which state the first vCPU begins (Intel SDM volume 3, chapters 3 to 5; the two boot protocols).

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryMmap;

use super::KernelError;
use crate::layout::{GDT, PAGE, PAGE_TABLES, PVH_INFO, ZERO_PAGE};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of the flags that is always set.
const FLAGS: u64 = 2;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;

/// How the first vCPU starts.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    regs: kvm_regs,
    segments: Segments,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
}

#[derive(Debug, Clone, Copy)]
struct Segments {
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
    table: kvm_dtable,
}

impl Start {
    pub(crate) fn registers(&self) -> kvm_regs {
        self.regs
    }

    /// Puts the special registers into `now`, which holds those of a vCPU after its reset.
    pub(crate) fn set_special(&self, now: &mut kvm_sregs) {
        let Segments {
            code,
            data,
            task,
            table,
        } = self.segments;
        now.cs = code;
        for segment in [&mut now.ds, &mut now.es, &mut now.fs, &mut now.gs, &mut now.ss] {
            *segment = data;
        }
        now.tr = task;
        now.gdt = table;
        now.cr0 = self.cr0;
        now.cr3 = self.cr3;
        now.cr4 = self.cr4;
        now.efer = self.efer;
    }
}

/// The 64-bit entry: long mode, the first GiB mapped one to one, the zero page in RSI.
pub(super) fn prepare_64(memory: &GuestMemoryMmap, entry: u64) -> Result<Start, KernelError> {
    let [pml4, pdpt, pd] = [PAGE_TABLES, PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE];
    super::write(
        memory,
        "page tables",
        &(pdpt | PRESENT_WRITABLE).to_le_bytes(),
        pml4,
    )?;
    super::write(
        memory,
        "page tables",
        &(pd | PRESENT_WRITABLE).to_le_bytes(),
        pdpt,
    )?;
    let entries: Vec<u8> = (0..512)
        .flat_map(|i| ((i * LARGE_PAGE) | LARGE | PRESENT_WRITABLE).to_le_bytes())
        .collect();
    super::write(memory, "page tables", &entries, pd)?;
    // Selectors 0x10 and 0x18 are part of the protocol (__BOOT_CS and __BOOT_DS).
    let segments = write_segments(memory, true)?;
    Ok(Start {
        regs: kvm_regs {
            rip: entry,
            rsi: ZERO_PAGE,
            rflags: FLAGS,
            ..Default::default()
        },
        segments,
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: pml4,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
    })
}

/// PVH: protected mode without paging, the start information in EBX.
pub(super) fn prepare_pvh(memory: &GuestMemoryMmap, entry: u64) -> Result<Start, KernelError> {
    let segments = write_segments(memory, false)?;
    Ok(Start {
        regs: kvm_regs {
            rip: entry,
            rbx: PVH_INFO,
            rflags: FLAGS,
            ..Default::default()
        },
        segments,
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
    })
}

/// Flat segments, as a table in memory and as what a CPU makes of it.
fn write_segments(memory: &GuestMemoryMmap, long: bool) -> Result<Segments, KernelError> {
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    const BUSY_TASK: u8 = 0xb;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        selector: 0x10,
        type_: CODE,
        l: u8::from(long),
        db: u8::from(!long),
        ..flat
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: DATA,
        db: 1,
        ..flat
    };
    let task = kvm_segment {
        selector: 0x20,
        limit: 0x67,
        type_: BUSY_TASK,
        present: 1,
        ..Default::default()
    };
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    super::write(memory, "segment descriptors", &bytes, GDT)?;
    Ok(Segments {
        code,
        data,
        task,
        table: kvm_dtable {
            base: GDT,
            limit: bytes.len() as u16 - 1,
            ..Default::default()
        },
    })
}

/// A segment as it stands in the table (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let access = segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7;
    let flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3;
    u64::from(limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 0xf) << 48
        | u64::from(flags) << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn descriptors_are_those_that_every_kernel_uses() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let long = prepare_64(&memory, 0x100_0000).unwrap();
        let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(read(GDT + 0x10), 0x00af_9b00_0000_ffff, "64-bit code");
        assert_eq!(read(GDT + 0x18), 0x00cf_9300_0000_ffff, "data");
        assert_eq!(read(long.cr3) & !0xfff, PAGE_TABLES + PAGE);
        assert_eq!(
            read(PAGE_TABLES + 2 * PAGE + 8 * 511),
            ((1 << 30) - LARGE_PAGE) | 0x83
        );
        prepare_pvh(&memory, 0x100_0000).unwrap();
        assert_eq!(read(GDT + 0x10), 0x00cf_9b00_0000_ffff, "32-bit code");
    }
}
