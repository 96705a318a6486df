//! A plugin of the Node Resource Interface on the interface's own Go library, told what to do line by line.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{cache, eventually};

/// How long a plugin may take to tell something: what it tells of may wait for an emulated guest.
const TELL_LIMIT: Duration = Duration::from_secs(60);

/// A plugin that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct NriPlugin {
    process: Child,
    stdin: ChildStdin,
    told: Arc<Mutex<Vec<Value>>>,
}

impl NriPlugin {
    /// Starts one, and waits until it has been synchronized.
    pub async fn start(socket: &Path, index: &str, name: &str) -> Result<Self> {
        let plugin = Self::spawn(socket, index, name, &[])?;
        plugin
            .heard("synchronized", |told| told["Type"] == "synchronized")
            .await?;
        Ok(plugin)
    }

    /// Starts one with more flags, and waits for nothing.
    pub fn spawn(socket: &Path, index: &str, name: &str, more: &[&str]) -> Result<Self> {
        let mut process = Command::new(Self::program()?)
            .args(["-index", index, "-name", name, "-socket"])
            .arg(socket)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdin = process.stdin.take().context("no stdin")?;
        let stdout = process.stdout.take().context("no stdout")?;
        let told = Arc::<Mutex<Vec<Value>>>::default();
        let ours = told.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line) {
                    ours.lock().unwrap_or_else(PoisonError::into_inner).push(value);
                }
            }
        });
        Ok(Self { process, stdin, told })
    }

    /// Where it is, in the cache that `make nri-plugin` fills.
    pub fn program() -> Result<std::path::PathBuf> {
        let program = cache().join("bin/nri-plugin");
        ensure!(
            program.exists(),
            "{} is missing: run `make nri-plugin` first",
            program.display()
        );
        Ok(program)
    }

    /// Everything it has told so far.
    #[must_use]
    pub fn told(&self) -> Vec<Value> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The events it has told so far, of this pod or container.
    #[must_use]
    pub fn events(&self, id: &str) -> Vec<String> {
        let is = |event: &Value, key: &str| event[key].as_str() == Some(id);
        self.told()
            .iter()
            .filter(|told| told["Type"] == "event")
            .filter(|told| is(told, "Container") || (is(told, "Pod") && told["Container"].is_null()))
            .map(|told| told["Event"].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    /// Waits until it has told something.
    pub async fn heard(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        eventually(&format!("a plugin's word of {what}"), TELL_LIMIT, async || {
            self.told().into_iter().find(&wanted)
        })
        .await
        .with_context(|| format!("{:#?}", self.told()))
    }

    /// Waits until it has told an event.
    pub async fn event(&self, event: &str) -> Result<Value> {
        self.heard(event, |told| told["Type"] == "event" && told["Event"] == event)
            .await
    }

    /// Has it do something; what it says when that fails is the error.
    pub async fn obey(&mut self, line: &str) -> Result<()> {
        let done = |told: &[Value]| told.iter().filter(|told| told["Type"] == "done").count();
        let before = done(&self.told());
        writeln!(self.stdin, "{line}")?;
        let words = eventually(&format!("a plugin to {line}"), TELL_LIMIT, async || {
            let told = self.told();
            let last = told.iter().rfind(|told| told["Type"] == "done")?;
            (done(&told) > before).then(|| last["Words"].as_str().unwrap_or_default().to_owned())
        })
        .await?;
        ensure!(words.is_empty(), "{line}: {words}");
        Ok(())
    }

    /// Ends it, and waits for that.
    pub fn quit(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for NriPlugin {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _already_reaped = self.process.wait();
    }
}
