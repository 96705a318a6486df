//! A converted layer that a converter wrote which had been taken over, or that a disk spoiled: composed, or made an archive
//! of, it may fail, and nothing else.
#![no_main]

use std::{fs::File, io::Write};

use caisson_erofs::{Composer, Limits, ModeBits, restore_layer};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits {
    max_image_bytes: 16 << 20,
    max_entries: 1000,
    max_path_bytes: 4096,
    max_xattr_bytes: 4096,
};
const BLOCK: usize = 4096;
const MAGIC: &[u8] = b"caisson layer 1\n";

fuzz_target!(|input: &[u8]| {
    // Records in the first block, one chunk of them in the table, a footer that finds it: what is mutated is behind all checks of form.
    let mut layer = vec![0; 3 * BLOCK];
    let records = &input[..input.len().min(BLOCK)];
    layer[..records.len()].copy_from_slice(records);
    layer[BLOCK + 4..BLOCK + 8].copy_from_slice(&(records.len() as u32).to_le_bytes());
    layer[2 * BLOCK..2 * BLOCK + MAGIC.len()].copy_from_slice(MAGIC);
    let footer = 2 * BLOCK + MAGIC.len();
    layer[footer..footer + 4].copy_from_slice(&1u32.to_le_bytes());
    layer[footer + 4..footer + 8].copy_from_slice(&u32::from(!records.is_empty()).to_le_bytes());
    layer[footer + 16] = 1;
    let mut file =
        File::from(rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&layer).unwrap();
    let mut composer = Composer::new(LIMITS);
    if composer.layer(&file).is_ok() {
        let (metadata, image) = composer.finish(Vec::new()).unwrap();
        assert_eq!(metadata.len() as u64, image.metadata_bytes);
    }
    if let Ok((archive, restored)) = restore_layer(&[file], Vec::new(), ModeBits::FileType, &LIMITS) {
        assert_eq!(archive.len() as u64, restored.bytes);
    }
});
