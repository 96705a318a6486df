//! Makes an image out of layer archives: `convert image.erofs base.tar upper.tar ...`, bottom first.

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};

use caisson_erofs::{Composer, Limits, convert_layer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let image = arguments
        .next()
        .map(PathBuf::from)
        .ok_or("usage: convert image.erofs layer.tar...")?;
    let limits = Limits::default();
    let mut composer = Composer::new(limits);
    let mut parts = Vec::new();
    for (number, layer) in arguments.enumerate() {
        let place = image.with_extension(format!("layer{number}"));
        let (mut converted, summary) = convert_layer(File::open(&layer)?, create(&place)?, &limits)?;
        std::fs::remove_file(&place)?;
        composer.layer(&converted)?;
        println!("{}: {summary:?}", PathBuf::from(layer).display());
        if summary.data_bytes > 0 {
            converted.rewind()?;
            parts.push(converted);
        }
    }
    let (mut output, summary) = composer.finish(create(&image)?)?;
    for mut part in parts {
        io::copy(&mut part, &mut output)?;
    }
    println!("{summary:?}");
    Ok(())
}

fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}
