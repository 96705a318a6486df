//! What the tests of this crate share: layers made with an independent tar writer, and a reader of EROFS images that was written from
//! the format's description and shares nothing with the writer.

#![allow(dead_code, reason = "every test binary uses another part")]

pub(crate) mod layer;
pub(crate) mod oracle;
pub(crate) mod reader;

use caisson_erofs::{ErofsError, ImageBuilder, Limits};
use std::io::{Read, Seek};

/// The image made out of these layers.
pub(crate) fn build(layers: &[Vec<u8>]) -> Result<Vec<u8>, ErofsError> {
    build_with(layers, Limits::default())
}

/// The image made out of these layers within limits.
pub(crate) fn build_with(layers: &[Vec<u8>], limits: Limits) -> Result<Vec<u8>, ErofsError> {
    let mut builder = ImageBuilder::new(tempfile::tempfile().unwrap(), limits)?;
    for layer in layers {
        builder.layer(layer.as_slice())?;
    }
    let mut summary = builder.finish()?;
    let mut image = Vec::new();
    summary.file.rewind().unwrap();
    summary.file.read_to_end(&mut image).unwrap();
    assert_eq!(summary.bytes, image.len() as u64);
    assert_eq!(summary.bytes % 4096, 0);
    Ok(image)
}

/// The files in the image made out of these layers.
pub(crate) fn files(layers: &[Vec<u8>]) -> reader::Files {
    reader::read(&build(layers).unwrap())
}
