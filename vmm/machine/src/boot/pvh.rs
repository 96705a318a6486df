//! `hvm_start_info`, by which the PVH entry is told of memory, initramfs and command line (Xen, `public/arch-x86/hvm/start_info.h`).

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{Initramfs, KernelError};
use crate::layout::{ACPI, COMMAND_LINE, Layout, PVH_INFO};

const MODULES: u64 = PVH_INFO + size_of::<hvm_start_info>() as u64;
const MEMORY_MAP: u64 = MODULES + size_of::<hvm_modlist_entry>() as u64;

pub(super) fn write(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    initramfs: Initramfs,
) -> Result<(), KernelError> {
    let map: Vec<_> = layout
        .memory_map()
        .into_iter()
        .map(|range| hvm_memmap_table_entry {
            addr: range.start,
            size: range.bytes,
            type_: range.kind as u32,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initramfs.bytes > 0),
        modlist_paddr: MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI.start,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let module = hvm_modlist_entry {
        paddr: initramfs.start,
        size: initramfs.bytes,
        ..Default::default()
    };
    let mut bytes = [info.as_slice(), module.as_slice()].concat();
    for entry in &map {
        bytes.extend(entry.as_slice());
    }
    super::write(memory, "start information", &bytes, PVH_INFO)
}
