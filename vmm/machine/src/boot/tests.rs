//! Loads made-up kernels, and the tuned one where it has been built.

use std::{io::Write, path::PathBuf};

use super::*;

const RAM: u64 = 64 << 20;

fn machine() -> (GuestMemoryMmap, Layout) {
    let layout = Layout::new(RAM, 40).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    (memory, layout)
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// An ELF file with one segment of `content` that wants to be at `place`.
fn elf_file(place: u64, content: &[u8], in_memory: u64) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    bytes[..4].copy_from_slice(&elf::MAGIC);
    bytes[4] = 2; // 64 bits
    bytes[5] = 1; // little endian
    bytes[18] = 62; // x86-64
    bytes[24..32].copy_from_slice(&place.to_le_bytes());
    bytes[32] = 64; // program headers
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64] = 1; // PT_LOAD
    bytes[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
    bytes[88..96].copy_from_slice(&place.to_le_bytes());
    bytes[96..104].copy_from_slice(&(content.len() as u64).to_le_bytes());
    bytes[104..112].copy_from_slice(&in_memory.to_le_bytes());
    bytes.extend(content);
    bytes
}

fn kernel(image: Vec<u8>, initramfs: Option<Vec<u8>>) -> Kernel {
    Kernel {
        image: file(&image),
        initramfs: initramfs.map(|content| file(&content)),
        command_line: "quiet".into(),
        entry: Entry::Any,
    }
}

const DESCRIBED: Described = Described {
    cpus: 1,
    serial: false,
};

#[test]
fn a_segment_is_where_it_wants_to_be_and_the_initramfs_at_the_end() {
    for backing in [Backing::Anonymous, Backing::Shared] {
        let (memory, layout) = machine();
        let kernel = kernel(elf_file(0x100_0000, &[7; 9000], 20_000), Some(vec![5; 5000]));
        let start = load(&memory, backing, &layout, &kernel, DESCRIBED).unwrap();
        assert_eq!(start.registers().rip, 0x100_0000);
        let read = |at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            (read(0x100_0000), read(0x100_0000 + 8999), read(0x100_0000 + 9000)),
            (7, 7, 0)
        );
        assert_eq!(
            (read(RAM - 8192), read(RAM - 8192 + 4999), read(RAM - 1)),
            (5, 5, 0)
        );
        assert_eq!(
            &memory.read_obj::<[u8; 6]>(GuestAddress(COMMAND_LINE)).unwrap(),
            b"quiet\0"
        );
        assert_eq!(
            &memory.read_obj::<[u8; 8]>(GuestAddress(ACPI.start)).unwrap(),
            b"RSD PTR "
        );
    }
}

#[test]
fn a_kernel_that_wants_a_place_that_is_taken_is_refused() {
    for (place, in_memory) in [(0x8_0000, 10), (RAM - 4096, 8192), (u64::MAX - 10, 100), (RAM, 1)] {
        let (memory, layout) = machine();
        let kernel = kernel(elf_file(place, &[7; 10], in_memory), None);
        let error = load(&memory, Backing::Anonymous, &layout, &kernel, DESCRIBED).unwrap_err();
        assert!(matches!(error, crate::Error::Kernel(_)), "{error}");
    }
}

#[test]
fn an_initramfs_that_would_lie_on_the_kernel_is_refused() {
    let (memory, layout) = machine();
    let kernel = kernel(elf_file(0x100_0000, &[7; 10], 40 << 20), Some(vec![1; 9 << 20]));
    let error = load(&memory, Backing::Anonymous, &layout, &kernel, DESCRIBED).unwrap_err();
    assert!(error.to_string().contains("does not fit beside"), "{error}");
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    let mut other = elf_file(0x100_0000, &[7; 10], 10);
    other[18] = 183;
    for (image, reason) in [
        (vec![0; 10], "too short"),
        (vec![0; 4096], "no header"),
        (other, "another architecture"),
        (elf::MAGIC.to_vec(), "headers"),
    ] {
        let (memory, layout) = machine();
        let error = load(
            &memory,
            Backing::Anonymous,
            &layout,
            &kernel(image, None),
            DESCRIBED,
        )
        .unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn an_entry_that_the_kernel_lacks_is_refused() {
    let (memory, layout) = machine();
    let mut kernel = kernel(elf_file(0x100_0000, &[7; 10], 10), None);
    kernel.entry = Entry::Pvh;
    let error = load(&memory, Backing::Anonymous, &layout, &kernel, DESCRIBED).unwrap_err();
    assert_eq!(error.to_string(), "the kernel has no PVH entry");
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let (memory, layout) = machine();
    let mut kernel = kernel(elf_file(0x100_0000, &[7; 10], 10), None);
    kernel.command_line = "x".repeat(COMMAND_LINE_BYTES);
    assert!(load(&memory, Backing::Anonymous, &layout, &kernel, DESCRIBED).is_err());
}

#[test]
fn the_tuned_kernel_can_be_loaded_by_every_entry() {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../guest/out/tuned");
    for (image, entry) in [
        ("vmlinux", Entry::Any),
        ("vmlinux", Entry::Pvh),
        ("vmlinux", Entry::Linux64),
        ("bzImage", Entry::Any),
    ] {
        let Ok(image) = File::open(built.join(image)) else {
            println!("skipped: {image} has not been built (make guest-tuned)");
            continue;
        };
        let layout = Layout::new(256 << 20, 40).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 256 << 20)]).unwrap();
        let kernel = Kernel {
            image,
            initramfs: None,
            command_line: String::new(),
            entry,
        };
        let start = load(&memory, Backing::Anonymous, &layout, &kernel, DESCRIBED).unwrap();
        let code: [u8; 16] = memory.read_obj(GuestAddress(start.registers().rip)).unwrap();
        assert_ne!(code, [0; 16], "{entry:?}: there is code at the entry");
    }
}
