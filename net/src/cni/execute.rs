//! One execution of one plugin: environment, standard streams, deadline.
//!
//! A plugin is somebody else's program: it may hang, crash, answer garbage or without end. It gets its own process group, an
//! environment that holds what CNI says and nothing of the daemon's, a deadline, and a cap on what it may say.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

use crate::error::{Execution, NetError};

/// A result is a few kilobytes; the largest real ones have some hundred routes.
const STDOUT_LIMIT: usize = 1024 * 1024;
/// Of what is kept of standard error; the rest is read and dropped.
const STDERR_LIMIT: usize = 64 * 1024;
/// Of output that is quoted in an error.
const QUOTE_LIMIT: usize = 1024;
/// Given to plugins when the daemon has no PATH of its own: they call iptables and the like.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Another thread's fork can hold a just-installed plugin open for writing for an instant.
const BUSY_RETRIES: u32 = 5;

/// What is the same for all plugins of one attachment.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    pub(crate) container_id: String,
    /// Empty on DEL when the namespace is gone.
    pub(crate) netns: PathBuf,
    pub(crate) interface: String,
    /// CNI_ARGS.
    pub(crate) args: String,
    pub(crate) plugin_dirs: Vec<PathBuf>,
    pub(crate) deadline: Duration,
}

/// Where a plugin is.
pub(crate) fn find(plugin_dirs: &[PathBuf], kind: &str) -> Option<PathBuf> {
    plugin_dirs
        .iter()
        .map(|directory| directory.join(kind))
        .find(|path| path.is_file())
}

/// Runs the plugin at `path` and answers its standard output.
pub(crate) async fn run(
    path: &Path,
    execution: Execution,
    environment: &Environment,
    input: &Value,
) -> Result<Vec<u8>, NetError> {
    let child = start(path, &execution, environment).await;
    let mut child = match child {
        Ok(child) => child,
        Err(source) => {
            return Err(NetError::PluginStart {
                execution,
                path: path.to_owned(),
                source,
            });
        }
    };
    let mut group = ProcessGroup::of(&child);
    let input = input.to_string().into_bytes();
    let deadline = environment.deadline;
    let Ok(outcome) = tokio::time::timeout(deadline, converse(&mut child, &input)).await else {
        group.kill();
        return Err(NetError::PluginDeadline { execution, deadline });
    };
    match outcome {
        Ok(output) => {
            group.disarm();
            judge(execution, output)
        }
        Err(error) => {
            group.kill();
            Err(NetError::PluginBroken {
                execution,
                problem: error.to_string(),
            })
        }
    }
}

async fn start(path: &Path, execution: &Execution, environment: &Environment) -> io::Result<Child> {
    let mut command = Command::new(path);
    command
        .env_clear()
        .env(
            "PATH",
            std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()),
        )
        .env("CNI_COMMAND", execution.command)
        .env("CNI_CONTAINERID", &environment.container_id)
        .env("CNI_NETNS", &environment.netns)
        .env("CNI_IFNAME", &environment.interface)
        .env("CNI_ARGS", &environment.args)
        .env("CNI_PATH", join_path(&environment.plugin_dirs))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut attempt = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && attempt < BUSY_RETRIES => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => return other,
        }
    }
}

fn join_path(directories: &[PathBuf]) -> OsString {
    let mut joined = OsString::new();
    for directory in directories {
        if !joined.is_empty() {
            joined.push(":");
        }
        joined.push(directory);
    }
    joined
}

/// The plugin and all that it has started. Killed when the execution is dropped before its end.
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    fn of(child: &Child) -> Self {
        Self(
            child
                .id()
                .and_then(|id| i32::try_from(id).ok())
                .map(Pid::from_raw),
        )
    }

    /// Only called while the plugin has not been waited for, so that its id cannot belong to another process.
    fn kill(&mut self) {
        if let Some(id) = self.0.take()
            && let Err(error) = killpg(id, Signal::SIGKILL)
        {
            tracing::debug!(group = id.as_raw(), %error, "cannot kill a CNI plugin");
        }
    }

    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Output {
    status: std::process::ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Feeds and drains the plugin, and waits for its end last.
async fn converse(child: &mut Child, input: &[u8]) -> io::Result<Output> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(io::Error::other("its standard streams are missing"));
    };
    let feed = async move {
        match stdin.write_all(input).await {
            // A plugin need not read its input.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            _ => Ok(()),
        }
    };
    let ((), stdout, stderr) = futures::try_join!(feed, read_all(stdout), read_start(stderr))?;
    Ok(Output {
        status: child.wait().await?,
        stdout,
        stderr,
    })
}

async fn read_all(stream: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream
        .take(STDOUT_LIMIT as u64 + 1)
        .read_to_end(&mut bytes)
        .await?;
    if bytes.len() > STDOUT_LIMIT {
        return Err(io::Error::other(format!(
            "answered more than {STDOUT_LIMIT} bytes, killed"
        )));
    }
    Ok(bytes)
}

async fn read_start(mut stream: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    (&mut stream)
        .take(STDERR_LIMIT as u64)
        .read_to_end(&mut bytes)
        .await?;
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    Ok(bytes)
}

fn judge(execution: Execution, output: Output) -> Result<Vec<u8>, NetError> {
    if !output.stderr.is_empty() {
        let text = quote(&output.stderr);
        tracing::debug!(
            plugin = execution.plugin,
            command = execution.command,
            text,
            "CNI plugin's standard error"
        );
    }
    if output.status.success() {
        return Ok(output.stdout);
    }
    let answer: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    let field = |name: &str| answer.as_ref().and_then(|answer| answer.get(name));
    if let Some(code) = field("code").and_then(Value::as_u64) {
        let text = |name| quote(field(name).and_then(Value::as_str).unwrap_or_default().as_bytes());
        return Err(NetError::PluginRefused {
            execution,
            code,
            message: text("msg"),
            details: text("details"),
        });
    }
    let mut problem = format!("ended with {} and no CNI error", output.status);
    for (name, bytes) in [
        ("standard output", &output.stdout),
        ("standard error", &output.stderr),
    ] {
        if !bytes.is_empty() {
            problem = format!("{problem}; {name}: {}", quote(bytes));
        }
    }
    Err(NetError::PluginBroken { execution, problem })
}

/// Output as it may stand in an error: bounded, one line, no control characters.
pub(crate) fn quote(bytes: &[u8]) -> String {
    let end = bytes.len().min(QUOTE_LIMIT);
    let text = String::from_utf8_lossy(&bytes[..end]);
    let mut line: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if end < bytes.len() {
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_output_is_one_bounded_line() {
        assert_eq!(quote(b" a\nb\x1b[1m\n"), "a b [1m");
        let long = quote(&[b'x'; 5000]);
        assert_eq!(long.len(), QUOTE_LIMIT + 3);
        assert_eq!(quote(&[0xff, b'a']), "\u{fffd}a");
    }
}
