//! Makes an image out of layer archives: `convert image.erofs base.tar upper.tar ...`, bottom first.

use std::fs::File;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let image = arguments
        .next()
        .ok_or("usage: convert image.erofs layer.tar...")?;
    let output = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(image)?;
    let mut builder = caisson_erofs::ImageBuilder::new(output, caisson_erofs::Limits::default())?;
    for layer in arguments {
        let summary = builder.layer(File::open(&layer)?)?;
        println!(
            "{}: {} entries, {} bytes",
            layer.display(),
            summary.entries,
            summary.data_bytes
        );
    }
    let summary = builder.finish()?;
    println!("{} inodes, {} bytes", summary.inodes, summary.bytes);
    Ok(())
}
