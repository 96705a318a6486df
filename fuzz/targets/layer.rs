//! Layers as a registry may send them: the archive's parser, conversion, and composition of what comes out, twice on top of itself.
//!
//! Checksums of headers are put right first, or no input would get past them. What is composed has to be whole blocks within its limits.
#![no_main]

use std::{fs::File, io::Seek};

use caisson_erofs::{Composer, Limits, convert_layer};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits {
    max_image_bytes: 1 << 20,
    max_entries: 1000,
    max_path_bytes: 4096,
    max_xattr_bytes: 4096,
};
const BLOCK: usize = 512;

fn fix_checksums(archive: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + BLOCK) {
        if header.iter().any(|byte| *byte != 0) {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let size = header[124..136]
            .iter()
            .filter(|byte| byte.is_ascii_digit())
            .fold(0usize, |size, byte| {
                size.saturating_mul(8).saturating_add(usize::from(byte - b'0'))
            });
        at = at.saturating_add(BLOCK).saturating_add(size.min(1 << 20).next_multiple_of(BLOCK));
    }
}

fn file() -> File {
    File::from(rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

fuzz_target!(|input: &[u8]| {
    let mut archive = input.to_vec();
    fix_checksums(&mut archive);
    let Ok((mut converted, summary)) = convert_layer(archive.as_slice(), file(), &LIMITS) else {
        return;
    };
    assert_eq!(converted.metadata().unwrap().len(), summary.bytes);
    assert!(summary.bytes <= LIMITS.max_image_bytes);
    converted.rewind().unwrap();
    let mut composer = Composer::new(LIMITS);
    for _ in 0..2 {
        if composer.layer(&converted).is_err() {
            return;
        }
    }
    if let Ok((metadata, image)) = composer.finish(file()) {
        assert_eq!(metadata.metadata().unwrap().len(), image.metadata_bytes);
        assert!(image.bytes <= LIMITS.max_image_bytes && image.inodes > 0);
    }
});
