//! The three things the process can do.

use std::{
    error::Error,
    fs::File,
    io::{self, BufReader, BufWriter},
};

use caisson_erofs::{Composer, ErofsError, ErrorKind, Limits, convert_layer, restore_layer};

use crate::{
    decompression::{Uncompressed, decoder},
    failed,
    protocol::{Composed, Converted, Fault, HashAlgorithm, JobLimits, ModeBits, Reply, Restored},
    verity::Measured,
};

const INPUT_BUFFER_BYTES: usize = 256 << 10;
const OUTPUT_BUFFER_BYTES: usize = 256 << 10;

/// What a failure is answered with.
type Outcome = Result<Reply, Reply>;

fn limits(limits: JobLimits) -> Limits {
    Limits {
        max_image_bytes: limits.max_image_bytes,
        ..Limits::default()
    }
}

/// Converts the layer that comes out of the first descriptor into the second.
pub(crate) fn convert(files: Vec<File>, job: JobLimits, diff_id: HashAlgorithm) -> Outcome {
    let Ok([input, output]) = <[File; 2]>::try_from(files) else {
        return Err(misused());
    };
    let input = BufReader::with_capacity(INPUT_BUFFER_BYTES, input);
    let decoder = decoder(input).map_err(|error| failed(Fault::Layer, 0, &error))?;
    let mut archive = Uncompressed::new(decoder, diff_id, job.max_image_bytes);
    let converted = convert_layer(&mut archive, Measured::new(output), &limits(job))
        .and_then(|converted| {
            // What follows the archive's end counts for the digest.
            io::copy(&mut archive, &mut io::sink())
                .map_err(|source| ErofsError::Input { offset: 0, source })?;
            Ok(converted)
        })
        .map_err(|error| match archive.exceeded() {
            true => failed(Fault::TooLarge, 0, &error),
            false => failed(fault(&error), 0, &error),
        })?;
    let (output, summary) = converted;
    let (diff_id, uncompressed_bytes) = archive.finish();
    Ok(Reply::Converted(Converted {
        diff_id,
        uncompressed_bytes,
        entries: summary.entries,
        data_bytes: summary.data_bytes,
        bytes: summary.bytes,
        verity: output.digest(),
    }))
}

/// Composes the layers behind the first descriptor into it.
pub(crate) fn compose(files: Vec<File>, job: JobLimits) -> Outcome {
    let mut files = files.into_iter();
    let output = files.next().ok_or_else(misused)?;
    let mut composer = Composer::new(limits(job));
    let mut count = 0;
    for (index, layer) in files.enumerate() {
        composer
            .layer(&layer)
            .map_err(|error| failed(fault(&error), index, &error))?;
        count = index;
    }
    let (output, summary) = composer
        .finish(Measured::new(output))
        .map_err(|error| failed(fault(&error), count, &error))?;
    Ok(Reply::Composed(Composed {
        bytes: summary.metadata_bytes,
        inodes: summary.inodes,
        verity: output.digest(),
    }))
}

/// Writes the archive of the last layer to the first descriptor.
pub(crate) fn restore(files: Vec<File>, job: JobLimits, modes: ModeBits) -> Outcome {
    let (output, layers) = files.split_first().ok_or_else(misused)?;
    let last = layers.len().checked_sub(1).ok_or_else(misused)?;
    let output = BufWriter::with_capacity(OUTPUT_BUFFER_BYTES, output);
    let modes = match modes {
        ModeBits::Permissions => caisson_erofs::ModeBits::Permissions,
        ModeBits::FileType => caisson_erofs::ModeBits::FileType,
    };
    let (_, restored) = restore_layer(layers, output, modes, &limits(job))
        .map_err(|error| failed(fault(&error), last, &error))?;
    Ok(Reply::Restored(Restored {
        bytes: restored.bytes,
        entries: restored.entries,
    }))
}

fn misused() -> Reply {
    let error = io::Error::new(io::ErrorKind::InvalidInput, "the request lacks descriptors");
    failed(Fault::Host, 0, &error)
}

fn fault(error: &ErofsError) -> Fault {
    match error.kind() {
        ErrorKind::Limit => Fault::Limit,
        // The reader is a decompressor: what it cannot read is the layer's fault.
        ErrorKind::Layer | ErrorKind::Input => Fault::Layer,
        ErrorKind::Host if is_storage_full(error) => Fault::Full,
        ErrorKind::Host => Fault::Host,
    }
}

fn is_storage_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && matches!(
                io.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        {
            return true;
        }
        next = cause.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    const LIMITS: JobLimits = JobLimits {
        max_image_bytes: 1 << 20,
    };

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    }

    fn archive(name: &str, content: &[u8]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        // Not append_data: that refuses what we want to see refused.
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, content).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn a_converted_layer_is_told_by_its_digests_and_composes() {
        let layer = archive("file", b"content");
        let mut output = tempfile::tempfile().unwrap();
        let files = vec![file(&layer), output.try_clone().unwrap()];
        let Ok(Reply::Converted(converted)) = convert(files, LIMITS, HashAlgorithm::Sha256) else {
            panic!("not converted");
        };
        assert_eq!(converted.uncompressed_bytes, layer.len() as u64);
        assert_eq!((converted.entries, converted.data_bytes), (1, 7));
        output.rewind().unwrap();
        let measured = crate::verity::measure(&output).unwrap();
        assert_eq!(measured, (converted.verity, converted.bytes));
        let mut again = tempfile::tempfile().unwrap();
        let files = vec![again.try_clone().unwrap(), output.try_clone().unwrap()];
        let Ok(Reply::Restored(restored)) = restore(files, LIMITS, ModeBits::Permissions) else {
            panic!("not restored");
        };
        let mut bytes = Vec::new();
        again.rewind().unwrap();
        again.read_to_end(&mut bytes).unwrap();
        assert_eq!((restored.entries, restored.bytes), (1, bytes.len() as u64));
        assert!(bytes.windows(7).any(|window| window == b"content"));
        let metadata = tempfile::tempfile().unwrap();
        let files = vec![metadata.try_clone().unwrap(), output];
        let Ok(Reply::Composed(composed)) = compose(files, LIMITS) else {
            panic!("not composed");
        };
        assert_eq!(composed.inodes, 2);
        assert_eq!(composed.bytes, metadata.metadata().unwrap().len());
    }

    #[test]
    fn failures_name_whose_fault_they_are() {
        let fault_of = |input: &[u8]| {
            let files = vec![file(input), tempfile::tempfile().unwrap()];
            match convert(files, LIMITS, HashAlgorithm::Sha256) {
                Err(Reply::Failed { fault, .. }) => fault,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(fault_of(&[1; 600]), Fault::Layer);
        assert_eq!(fault_of(&archive("../out", b"x")), Fault::Layer);
        assert_eq!(fault_of(&archive("large", &[1; 2 << 20])), Fault::Limit);
        let bomb = zstd::encode_all(io::repeat(0).take(8 << 20), 3).unwrap();
        assert_eq!(fault_of(&bomb), Fault::TooLarge);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let files = vec![file(&archive("file", b"content")), full];
        assert!(matches!(
            convert(files, LIMITS, HashAlgorithm::Sha256),
            Err(Reply::Failed {
                fault: Fault::Full,
                ..
            })
        ));
        assert!(matches!(
            compose(vec![tempfile::tempfile().unwrap(), file(b"no layer")], LIMITS),
            Err(Reply::Failed {
                fault: Fault::Host,
                layer: 0,
                ..
            })
        ));
        assert!(matches!(
            restore(
                vec![tempfile::tempfile().unwrap(), file(b"no layer")],
                LIMITS,
                ModeBits::FileType
            ),
            Err(Reply::Failed {
                fault: Fault::Host,
                ..
            })
        ));
        assert!(convert(Vec::new(), LIMITS, HashAlgorithm::Sha512).is_err());
        assert!(restore(vec![tempfile::tempfile().unwrap()], LIMITS, ModeBits::FileType).is_err());
    }
}
