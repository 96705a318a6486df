//! Plugins that the daemon starts: programs `NN-name` in a directory, each with one end of a socket pair.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::{NriError, error::JoinError, plugin::Identity};

/// Programs that are started.
const MAX_PROGRAMS: usize = 32;

/// Largest configuration of a plugin.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A plugin that can be started.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) identity: Identity,
    path: PathBuf,
    pub(crate) config: String,
}

/// A plugin's process. Killed when it is dropped, as it was spawned to be.
pub(crate) struct Process {
    _child: tokio::process::Child,
}

/// The programs of a directory, which need not be there. Files that cannot be executed are none.
pub(crate) fn programs(dir: &Path, config_dir: &Path) -> Result<Vec<Program>, NriError> {
    let refuse = |reason: String| NriError::Plugins {
        path: dir.to_owned(),
        reason,
    };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(refuse(error.to_string())),
    };
    let mut programs = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| refuse(error.to_string()))?.path();
        let is_program = path
            .metadata()
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0);
        if !is_program {
            continue;
        }
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let (index, base) = name.split_once('-').unwrap_or((&name, ""));
        let identity = Identity::new(index, base)
            .map_err(|_| refuse(format!("{name:?} is not named NN-name, two digits and a name")))?;
        let config = config(config_dir, &identity).map_err(|(path, error)| NriError::Plugins {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        programs.push(Program {
            identity,
            path,
            config,
        });
        if programs.len() > MAX_PROGRAMS {
            return Err(refuse(format!("there are more than {MAX_PROGRAMS}")));
        }
    }
    programs.sort_by(|one, other| one.identity.cmp(&other.identity));
    Ok(programs)
}

/// `NN-name.conf`, else `name.conf`, else nothing.
fn config(dir: &Path, identity: &Identity) -> Result<String, (PathBuf, io::Error)> {
    for name in [format!("{identity}.conf"), format!("{}.conf", identity.name)] {
        let path = dir.join(name);
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err((path, error)),
            Ok(found) if found.len() > MAX_CONFIG_BYTES => {
                let reason = format!("it is over {MAX_CONFIG_BYTES} bytes");
                return Err((path, io::Error::other(reason)));
            }
            Ok(_) => {}
        }
        return std::fs::read_to_string(&path).map_err(|error| (path, error));
    }
    Ok(String::new())
}

impl Program {
    /// Starts it. What it inherits is its end of the connection, as standard input, and the daemon's standard error.
    pub(crate) fn start(&self) -> Result<(tokio::net::UnixStream, Process), JoinError> {
        self.try_start().map_err(JoinError::Launch)
    }

    fn try_start(&self) -> io::Result<(tokio::net::UnixStream, Process)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let ours = UnixStream::from(ours);
        ours.set_nonblocking(true)?;
        let ours = tokio::net::UnixStream::from_std(ours)?;
        let child = self.spawn(theirs)?;
        Ok((ours, Process { _child: child }))
    }

    /// A shell's redirection would need a shell, and a hook before exec unsafe code: the descriptor is passed as standard input, whose
    /// number is told instead of 3. Plugins use the number that they are told.
    fn spawn(&self, theirs: OwnedFd) -> io::Result<tokio::process::Child> {
        let stdin = Stdio::from(theirs);
        tokio::process::Command::new(&self.path)
            .env_clear()
            .env("NRI_PLUGIN_NAME", &self.identity.name)
            .env("NRI_PLUGIN_IDX", &self.identity.index)
            .env("NRI_PLUGIN_SOCKET", io::stdin().as_raw_fd().to_string())
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .process_group(0)
            .spawn()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, mode: u32) {
        std::fs::write(path, "x").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn programs_come_in_the_order_of_their_indexes_with_their_own_configuration_first() {
        let dir = tempfile::tempdir().unwrap();
        let conf = tempfile::tempdir().unwrap();
        write(&dir.path().join("20-late"), 0o755);
        write(&dir.path().join("10-early"), 0o755);
        write(&dir.path().join("README"), 0o644);
        std::fs::write(conf.path().join("late.conf"), "common").unwrap();
        std::fs::write(conf.path().join("early.conf"), "common").unwrap();
        std::fs::write(conf.path().join("10-early.conf"), "own").unwrap();
        let found = programs(dir.path(), conf.path()).unwrap();
        let told: Vec<_> = found
            .iter()
            .map(|program| (program.identity.to_string(), program.config.as_str()))
            .collect();
        assert_eq!(told, [("10-early".into(), "own"), ("20-late".into(), "common")]);
        write(&dir.path().join("nonsense"), 0o755);
        let error = programs(dir.path(), conf.path()).unwrap_err().to_string();
        assert!(error.contains("nonsense"), "{error}");
        assert!(
            programs(&dir.path().join("none"), conf.path())
                .unwrap()
                .is_empty()
        );
    }
}
