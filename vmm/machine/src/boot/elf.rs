//! An ELF `vmlinux`: its segments are put where it says.
//!
//! Code is copied, since a kernel writes to nearly every page of its own code while it boots (return thunks, retpolines and alternatives
//! are patched in place): mapped, each of these pages is three faults of the guest and one copy by the host, and shared by nobody in the
//! end. Everything else is a private mapping of the file: a third of it is never touched, and much of the rest never changed.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD,
    PT_NOTE, SHF_EXECINSTR, SHT_PROGBITS,
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{KernelError, Loaded, check_place};
use crate::{
    layout::{HIGH_MEMORY, Layout, PAGE},
    memory::{self, Backing},
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
    let code = code_sections(image, &header)?;
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
            end = end.max(load_segment(memory, backing, layout, image, &segment, &code)?);
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
    code: &[Range<u64>],
) -> Result<u64, KernelError> {
    let start = segment.p_paddr;
    let end = start
        .checked_add(segment.p_memsz.max(segment.p_filesz))
        .ok_or(KernelError::Image("a segment beyond all addresses"))?;
    check_place(layout, start, end)?;
    let file_end = segment
        .p_offset
        .checked_add(segment.p_filesz)
        .ok_or(KernelError::Image("a segment beyond its end"))?;
    for piece in pieces(segment.p_offset..file_end, code) {
        let place = start + (piece.range.start - segment.p_offset);
        let bytes = piece.range.end - piece.range.start;
        let done = match backing {
            Backing::Anonymous if !piece.is_code => {
                memory::map_file(memory, image, piece.range.start, GuestAddress(place), bytes)
            }
            // A private mapping would be invisible to those that the memory is shared with.
            _ => memory::copy_file(memory, image, piece.range.start, GuestAddress(place), bytes),
        };
        done.map_err(|source| KernelError::Load {
            what: "kernel's segments",
            source,
        })?;
    }
    Ok(end)
}

/// Part of a segment, as a range of the file.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    range: Range<u64>,
    is_code: bool,
}

/// Takes a segment apart into what has code in it and what has none, by whole pages. `code` is in order.
fn pieces(segment: Range<u64>, code: &[Range<u64>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = segment.start;
    for section in code {
        let start = (section.start - section.start % PAGE).clamp(at, segment.end);
        let end = section.end.next_multiple_of(PAGE).clamp(start, segment.end);
        for (range, is_code) in [(at..start, false), (start..end, true)] {
            if !range.is_empty() {
                pieces.push(Piece { range, is_code });
            }
        }
        at = end;
    }
    if at < segment.end {
        pieces.push(Piece {
            range: at..segment.end,
            is_code: false,
        });
    }
    pieces
}

/// Where in the file there is code, in order. A kernel without section headers has none, as far as this is concerned.
fn code_sections(image: &File, header: &Elf64_Ehdr) -> Result<Vec<Range<u64>>, KernelError> {
    const SECTION_HEADER: u16 = 64;
    if header.e_shnum == 0 || header.e_shentsize != SECTION_HEADER {
        return Ok(Vec::new());
    }
    let mut table = vec![0; usize::from(header.e_shnum) * usize::from(SECTION_HEADER)];
    image
        .read_exact_at(&mut table, header.e_shoff)
        .map_err(|source| KernelError::Load {
            what: "kernel's section headers",
            source,
        })?;
    let mut code: Vec<Range<u64>> = table
        .chunks_exact(SECTION_HEADER.into())
        .filter_map(code_section)
        .collect();
    code.sort_by_key(|range| range.start);
    Ok(code)
}

/// The file's range of a section, if there is code in it (ELF-64, "Sections": type, flags, offset and size).
fn code_section(entry: &[u8]) -> Option<Range<u64>> {
    let word = |at: usize| Some(u64::from_le_bytes(entry.get(at..at + 8)?.try_into().ok()?));
    let kind = u32::from_le_bytes(entry.get(4..8)?.try_into().ok()?);
    let (flags, offset, size) = (word(8)?, word(24)?, word(32)?);
    // The last page of the largest file is no code.
    let end = offset.checked_add(size).filter(|end| *end <= u64::MAX - PAGE)?;
    (kind == SHT_PROGBITS && flags & SHF_EXECINSTR != 0).then_some(offset..end)
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

    #[test]
    fn a_segment_is_taken_apart_where_its_code_begins_and_ends() {
        let piece = |range, is_code| Piece { range, is_code };
        let code = [0x2000..0x2a00, 0x2b00..0x4100, 0x9000..0xa000];
        assert_eq!(
            pieces(0x1000..0x7000, &code),
            [
                piece(0x1000..0x2000, false),
                piece(0x2000..0x3000, true),
                piece(0x3000..0x5000, true),
                piece(0x5000..0x7000, false)
            ]
        );
        assert_eq!(pieces(0x1000..0x1800, &[]), [piece(0x1000..0x1800, false)]);
        assert_eq!(pieces(0x9100..0x9200, &code), [piece(0x9100..0x9200, true)]);
    }

    proptest! {
        #[test]
        fn the_pieces_of_a_segment_are_the_segment(
            start in 0u64..0x8000,
            size in 0u64..0x8000,
            mut code in prop::collection::vec((0u64..0x10000, 0u64..0x3000), 0..6),
        ) {
            code.sort_unstable();
            let code: Vec<_> = code.into_iter().map(|(start, size)| start..start + size).collect();
            let mut at = start;
            for piece in pieces(start..start + size, &code) {
                prop_assert_eq!(piece.range.start, at);
                prop_assert!(piece.range.end > at);
                at = piece.range.end;
            }
            prop_assert_eq!(at, start + size);
        }

        #[test]
        fn no_notes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            find_pvh_entry(&bytes);
        }
    }
}
