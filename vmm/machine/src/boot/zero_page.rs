//! The zero page (`boot_params`), by which the 64-bit entry is told of memory, initramfs and command line.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{Initramfs, KernelError, Loaded};
use crate::layout::{ACPI, COMMAND_LINE, Layout, ZERO_PAGE};

/// `type_of_loader`: not one of those that are registered.
const LOADER_UNDEFINED: u8 = 0xff;
/// The mark at the end of a boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// Kernels want their memory aligned to this, if their header says nothing else.
const ALIGNMENT: u32 = 0x20_0000;

pub(super) fn write(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    loaded: &Loaded,
    initramfs: Initramfs,
    command_line: usize,
) -> Result<(), KernelError> {
    let params = parameters(layout, loaded, initramfs, command_line);
    super::write(memory, "boot parameters", params.as_slice(), ZERO_PAGE)
}

fn parameters(layout: &Layout, loaded: &Loaded, initramfs: Initramfs, command_line: usize) -> boot_params {
    let mut params = boot_params {
        hdr: loaded.header.unwrap_or_default(),
        ..Default::default()
    };
    if loaded.header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = u32::from_le_bytes(*b"HdrS");
        params.hdr.kernel_alignment = ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // All of these are below 4 GiB: the layout sees to it.
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line as u32;
    params.hdr.ramdisk_image = initramfs.start as u32;
    params.hdr.ramdisk_size = initramfs.bytes as u32;
    params.acpi_rsdp_addr = ACPI.start;
    let map = layout.memory_map();
    params.e820_entries = map.len() as u8;
    for (entry, range) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.bytes,
            r#type: range.kind as u32,
        };
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let layout = Layout::new(4 << 30, 40).unwrap();
        let loaded = Loaded {
            entry64: Some(0),
            pvh: None,
            end: 0,
            initramfs_limit: 0,
            header: None,
        };
        let initramfs = Initramfs {
            start: 0xbff0_0000,
            bytes: 12345,
        };
        let params = parameters(&layout, &loaded, initramfs, 17);
        assert_eq!(size_of_val(&params), 4096);
        let header = params.hdr;
        assert_eq!({ header.ramdisk_image }, 0xbff0_0000);
        assert_eq!({ header.ramdisk_size }, 12345);
        assert_eq!({ header.cmdline_size }, 17);
        assert_eq!({ params.acpi_rsdp_addr }, ACPI.start);
        let table = params.e820_table;
        let ram: u64 = table[..usize::from(params.e820_entries)]
            .iter()
            .filter(|e| e.r#type == 1)
            .map(|e| e.size)
            .sum();
        assert!(
            ram > (4 << 30) - (1 << 20) && ram < 4 << 30,
            "all of it but what a PC has in its hole"
        );
    }
}
