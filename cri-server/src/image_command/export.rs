//! `caissond image export`: what is asked for, and where the archive goes.
//!
//! A file is whole or not there: it is written beside its place and gets its name at the end. A pipe cannot be written at positions, so what goes to
//! standard output waits in a temporary file.

use std::{
    fs::File,
    io::{self, IsTerminal, Seek},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use caisson_image::{Exported, Wanted};
use tempfile::NamedTempFile;
use tokio::signal::unix::{SignalKind, signal};

use super::Images;
use crate::{config::Config, status::chain};

/// Writes the archive; answers what is to be printed.
pub(super) async fn export(
    config: &Config,
    images: &Images,
    references: Vec<String>,
    file: &Path,
) -> anyhow::Result<String> {
    let mut wanted = Vec::new();
    for reference in references {
        let described = images.describe(reference.clone()).await?;
        wanted.push(Wanted {
            reference,
            id: described.id,
            repo_tags: described.repo_tags,
            config: described.config,
        });
    }
    let (exported, destination) = if file == Path::new("-") {
        let destination = Destination::output()?;
        let work = caisson_image::export(&config.images, &wanted, destination.file()?);
        (work.await, destination)
    } else {
        // An end by a signal would leave the file that is not whole.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let destination = Destination::beside(file)?;
        let work = caisson_image::export(&config.images, &wanted, destination.file()?);
        tokio::select! {
            exported = work => (exported, destination),
            _ = interrupt.recv() => bail!("interrupted: nothing was written"),
            _ = terminate.recv() => bail!("terminated: nothing was written"),
        }
    };
    let exported = exported.map_err(|error| anyhow::anyhow!("{}", chain(&error)))?;
    let said: String = wanted
        .iter()
        .zip(&exported)
        .map(|(wanted, exported)| as_text(&wanted.id, exported))
        .collect();
    destination.finish(said)
}

/// One line for an image, and one more when it has become another.
fn as_text(id: &str, exported: &Exported) -> String {
    let mut text = format!("{} {}\n", exported.id, exported.names.join(" "));
    if exported.id != id {
        let Exported { changed, layers, .. } = exported;
        text.push_str(&format!(
            "  another id than {id}, which it has here: {changed} of {layers} layers could not be made as they were\n"
        ));
    }
    text
}

/// Where the archive goes.
enum Destination {
    File { beside: NamedTempFile, path: PathBuf },
    Output { spool: File },
}

impl Destination {
    fn output() -> anyhow::Result<Self> {
        if io::stdout().is_terminal() {
            bail!("standard output is a terminal: name a file, or send it elsewhere");
        }
        let spool = tempfile::tempfile().context("cannot make a temporary file for the archive")?;
        Ok(Self::Output { spool })
    }

    fn beside(path: &Path) -> anyhow::Result<Self> {
        // What has this name is replaced, and a device must not be.
        match std::fs::metadata(path) {
            Ok(there) if !there.is_file() => bail!("{} is not a regular file", path.display()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot look at {}", path.display()));
            }
            _ => {}
        }
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let beside = tempfile::Builder::new()
            .prefix(".caisson-export-")
            .tempfile_in(directory)
            .with_context(|| format!("cannot make a file in {}", directory.display()))?;
        Ok(Self::File {
            beside,
            path: path.to_owned(),
        })
    }

    /// A handle to write to.
    fn file(&self) -> anyhow::Result<File> {
        let file = match self {
            Self::File { beside, .. } => beside.as_file(),
            Self::Output { spool } => spool,
        };
        Ok(file.try_clone()?)
    }

    /// Gives it to whom it is for; answers what is to be printed beside it.
    fn finish(self, said: String) -> anyhow::Result<String> {
        match self {
            Self::File { beside, path } => {
                let placing = || -> io::Result<()> {
                    beside.as_file().sync_all()?;
                    beside.persist(&path).map_err(|error| error.error)?;
                    Ok(())
                };
                placing().with_context(|| format!("cannot put the archive at {}", path.display()))?;
                Ok(said)
            }
            Self::Output { mut spool } => {
                let mut copying = || -> io::Result<()> {
                    spool.rewind()?;
                    io::copy(&mut spool, &mut io::stdout().lock())?;
                    Ok(())
                };
                copying().context("cannot write the archive to standard output")?;
                // What is for people must not be in it.
                eprint!("{said}");
                Ok(String::new())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_regular_file_is_not_replaced() {
        for path in ["/dev/null", "/"] {
            let error = Destination::beside(Path::new(path)).err().unwrap();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
        assert!(Destination::beside(Path::new("/nowhere/at/all.tar")).is_err());
    }

    #[test]
    fn a_file_gets_its_name_at_the_end_and_no_other_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("images.tar");
        let names = || std::fs::read_dir(directory.path()).unwrap().count();
        std::fs::write(&path, "before").unwrap();
        drop(Destination::beside(&path).unwrap());
        assert_eq!((std::fs::read(&path).unwrap(), names()), (b"before".to_vec(), 1));
        let destination = Destination::beside(&path).unwrap();
        io::Write::write_all(&mut destination.file().unwrap(), b"after").unwrap();
        assert_eq!(destination.finish("said".into()).unwrap(), "said");
        assert_eq!((std::fs::read(&path).unwrap(), names()), (b"after".to_vec(), 1));
    }

    #[test]
    fn an_image_that_has_become_another_is_told_of() {
        let exported = |id: &str, changed| Exported {
            id: id.into(),
            names: vec!["r.example/app:v1".into()],
            layers: 3,
            changed,
        };
        assert_eq!(
            as_text("sha256:1", &exported("sha256:1", 0)),
            "sha256:1 r.example/app:v1\n"
        );
        let said = as_text("sha256:1", &exported("sha256:2", 2));
        assert!(
            said.contains("sha256:1") && said.contains("2 of 3 layers"),
            "{said}"
        );
    }
}
