//! What the tests of this crate share: layers made with an independent tar writer, and a reader of EROFS images that was written from
//! the format's description and shares nothing with the writer.

#![allow(dead_code, reason = "every test binary uses another part")]

pub(crate) mod layer;
pub(crate) mod oracle;
pub(crate) mod reader;

use caisson_erofs::{Composer, ErofsError, ImageSummary, LayerSummary, Limits, convert_layer};
use std::fs::File;
use std::io::{Read, Seek};

/// Converts and composes layers one after the other, and puts the disk together as a hypervisor shows it to a guest.
pub(crate) struct ImageBuilder {
    limits: Limits,
    composer: Composer,
    parts: Vec<File>,
}

impl ImageBuilder {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            composer: Composer::new(limits),
            parts: Vec::new(),
        }
    }

    pub(crate) fn layer(&mut self, tar: impl Read) -> Result<LayerSummary, ErofsError> {
        let (mut file, summary) = convert_layer(tar, tempfile::tempfile().unwrap(), &self.limits)?;
        assert_eq!(file.metadata().unwrap().len(), summary.bytes);
        assert_eq!(self.composer.layer(&file)?, summary);
        file.rewind().unwrap();
        if summary.data_bytes > 0 {
            self.parts.push(file);
        }
        Ok(summary)
    }

    /// The parts of the disk, in order.
    pub(crate) fn finish(self) -> Result<(Vec<File>, ImageSummary), ErofsError> {
        let (mut metadata, summary) = self.composer.finish(tempfile::tempfile().unwrap())?;
        metadata.rewind().unwrap();
        let mut parts = vec![metadata];
        parts.extend(self.parts);
        let bytes: u64 = parts.iter().map(|part| part.metadata().unwrap().len()).sum();
        assert_eq!(bytes, summary.bytes);
        assert_eq!(summary.bytes % 4096, 0);
        Ok((parts, summary))
    }
}

/// The image made out of these layers.
pub(crate) fn build(layers: &[Vec<u8>]) -> Result<Vec<u8>, ErofsError> {
    build_with(layers, Limits::default())
}

/// The image made out of these layers within limits.
pub(crate) fn build_with(layers: &[Vec<u8>], limits: Limits) -> Result<Vec<u8>, ErofsError> {
    let mut builder = ImageBuilder::new(limits);
    for layer in layers {
        builder.layer(layer.as_slice())?;
    }
    let mut image = Vec::new();
    for mut part in builder.finish()?.0 {
        part.read_to_end(&mut image).unwrap();
    }
    Ok(image)
}

/// The files in the image made out of these layers.
pub(crate) fn files(layers: &[Vec<u8>]) -> reader::Files {
    reader::read(&build(layers).unwrap())
}
