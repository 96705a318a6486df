//! crictl, built from its own sources: a client that is not ours, and knows every field of the CRI.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use crate::{daemon::Daemon, host::text};

/// crictl, pointed at one daemon.
#[derive(Debug)]
pub struct Crictl {
    binary: PathBuf,
    endpoint: String,
}

impl Crictl {
    /// Finds it in the cache that `make crictl` fills.
    pub fn new(daemon: &Daemon) -> Result<Self> {
        let cache = std::env::var_os("CAISSON_CACHE").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/caisson"),
            PathBuf::from,
        );
        let binary = cache.join("bin/crictl");
        ensure!(
            binary.exists(),
            "{} is missing: run `make crictl` first",
            binary.display()
        );
        Ok(Self {
            binary,
            endpoint: format!("unix://{}", daemon.socket().display()),
        })
    }

    /// The program itself.
    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// It with these arguments, to be run.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        // It waits two seconds by default; an emulated VM takes longer to boot.
        let common = [
            "-t",
            "60s",
            "-r",
            &self.endpoint,
            "-i",
            &self.endpoint,
            "--config",
            "/dev/null",
        ];
        let mut command = Command::new(&self.binary);
        command.args(common).args(arguments);
        command
    }

    /// Runs it; answers what it prints, without white space around.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        Ok(text(&mut self.command(arguments))?.trim().to_owned())
    }
}
