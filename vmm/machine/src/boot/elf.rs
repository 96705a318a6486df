//! An ELF `vmlinux`: its segments are put where it says, mapped from the file rather than copied.

use std::{fs::File, io, os::unix::fs::FileExt};

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD,
    PT_NOTE,
};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{KernelError, Loaded, check_place, put};
use crate::{
    layout::{HIGH_MEMORY, Layout},
    memory::Backing,
};

/// What an ELF file begins with.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

/// A kernel has a handful of segments.
const MAX_SEGMENTS: u16 = 64;
/// The notes of a kernel are some hundred bytes.
const MAX_NOTES: u64 = 64 << 10;
/// XEN_ELFNOTE_PHYS32_ENTRY: where PVH enters.
const NOTE_PVH_ENTRY: u32 = 18;

pub(super) fn load(
    memory: &GuestMemoryMmap,
    backing: Backing,
    layout: &Layout,
    image: &File,
) -> Result<Loaded, KernelError> {
    let header: Elf64_Ehdr = read(image, 0)?;
    let ident = header.e_ident;
    if ident[EI_CLASS] != ELFCLASS64 || ident[EI_DATA] != ELFDATA2LSB || header.e_machine != EM_X86_64 {
        return Err(KernelError::Image("an ELF file of another architecture"));
    }
    if header.e_phnum > MAX_SEGMENTS || usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(KernelError::Image("an ELF file with strange program headers"));
    }
    let mut end = 0;
    let mut pvh = None;
    for index in 0..header.e_phnum {
        let offset = u64::from(index) * size_of::<Elf64_Phdr>() as u64;
        let offset = header.e_phoff.checked_add(offset);
        let segment: Elf64_Phdr = read(image, offset.ok_or(KernelError::Image("headers beyond its end"))?)?;
        if segment.p_type == PT_NOTE {
            pvh = pvh.or(pvh_entry(image, &segment)?);
        }
        if segment.p_type == PT_LOAD {
            end = end.max(load_segment(memory, backing, layout, image, &segment)?);
        }
    }
    if end == 0 {
        return Err(KernelError::Image("an ELF file with nothing to load"));
    }
    let inside = |entry: &u64| (HIGH_MEMORY..end).contains(entry);
    Ok(Loaded {
        entry64: Some(header.e_entry).filter(inside),
        pvh: pvh.filter(inside),
        end,
        initramfs_limit: u64::from(u32::MAX),
        header: None,
    })
}

/// Loads one segment: its end in memory, with what is zero at its end. Memory is zero already.
fn load_segment(
    memory: &GuestMemoryMmap,
    backing: Backing,
    layout: &Layout,
    image: &File,
    segment: &Elf64_Phdr,
) -> Result<u64, KernelError> {
    let start = segment.p_paddr;
    let end = start
        .checked_add(segment.p_memsz.max(segment.p_filesz))
        .ok_or(KernelError::Image("a segment beyond all addresses"))?;
    check_place(layout, start, end)?;
    put(memory, backing, image, segment.p_offset, start, segment.p_filesz).map_err(|source| {
        KernelError::Load {
            what: "kernel's segments",
            source,
        }
    })?;
    Ok(end)
}

/// Looks for the PVH entry among the notes of a segment.
fn pvh_entry(image: &File, segment: &Elf64_Phdr) -> Result<Option<u64>, KernelError> {
    let size = usize::try_from(segment.p_filesz.min(MAX_NOTES)).unwrap_or_default();
    let mut notes = vec![0; size];
    image
        .read_exact_at(&mut notes, segment.p_offset)
        .map_err(|source| KernelError::Load {
            what: "kernel's notes",
            source,
        })?;
    Ok(find_pvh_entry(&notes))
}

fn find_pvh_entry(mut notes: &[u8]) -> Option<u64> {
    const ALIGNMENT: usize = 4;
    loop {
        let (header, rest) = notes.split_at_checked(size_of::<Elf64_Nhdr>())?;
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(header);
        let name_size = (note.n_namesz as usize).checked_next_multiple_of(ALIGNMENT)?;
        let content_size = (note.n_descsz as usize).checked_next_multiple_of(ALIGNMENT)?;
        let (name, rest) = rest.split_at_checked(name_size)?;
        if note.n_type == NOTE_PVH_ENTRY && name.starts_with(b"Xen\0") {
            // 4 or 8 bytes, in which the upper half is zero: the entry is a 32-bit address.
            let entry = rest.get(..4)?.try_into().ok()?;
            return Some(u64::from(u32::from_le_bytes(entry)));
        }
        notes = rest.split_at_checked(content_size)?.1;
    }
}

fn read<T: ByteValued + Default>(image: &File, offset: u64) -> Result<T, KernelError> {
    let mut value = T::default();
    image
        .read_exact_at(value.as_mut_slice(), offset)
        .map_err(|source: io::Error| KernelError::Load {
            what: "kernel's headers",
            source,
        })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn note(kind: u32, name: &[u8], content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [name.len() as u32, content.len() as u32, kind] {
            bytes.extend(word.to_le_bytes());
        }
        for part in [name, content] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_pvh_entry_is_found_among_other_notes() {
        let notes = [
            note(3, b"GNU\0", &[1; 20]),
            note(18, b"Not\0", &[9; 4]),
            note(0, b"Linux\0", &[2; 1]),
            note(18, b"Xen\0", &0x100_0150u64.to_le_bytes()),
        ]
        .concat();
        assert_eq!(find_pvh_entry(&notes), Some(0x100_0150));
        assert_eq!(find_pvh_entry(&notes[..notes.len() - 9]), None);
    }

    proptest! {
        #[test]
        fn no_notes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            find_pvh_entry(&bytes);
        }
    }
}
