//! The end-to-end harness: a scratch host, a real registry, the real daemon, and a CRI client that reads like prose.
//!
//! Owns how tests see the product from outside: its socket, its files, and what is left on the host. Must not use any of the
//! product's crates: an error in them would hide in both places.

pub mod aftermath;
pub mod containerd;
pub mod cri;
pub mod crictl;
pub mod critest_benchmark;
pub mod critest_images;
pub mod critest_report;
pub mod daemon;
pub mod figures;
pub mod host;
pub mod image;
pub mod kubelet;
pub mod node;
pub mod nri_plugin;
pub mod registry;
pub mod tls_front;
pub mod volumes;

use std::{
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

/// The checkout.
#[must_use]
pub fn checkout() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .and_then(|tests| tests.parent())
        .map(PathBuf::from)
        .unwrap_or(here)
}

/// Where slow things are kept between runs: CAISSON_CACHE, or ~/.cache/caisson.
#[must_use]
pub fn cache() -> PathBuf {
    std::env::var_os("CAISSON_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/caisson"),
        PathBuf::from,
    )
}

/// Says why a test cannot run here, past the test harness, which hides what a passing test prints.
pub fn skipped(reason: &str) {
    let _nobody_listens = writeln!(std::io::stderr(), "skipped: {reason}");
}

/// Waits until `condition` answers something, asking often at first; the error says what was waited for.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut condition: F) -> anyhow::Result<T>
where
    F: AsyncFnMut() -> Option<T>,
{
    let limit = limit * patience();
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        anyhow::ensure!(start.elapsed() < limit, "{what} did not happen within {limit:?}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// How many times longer than on a usual machine a condition may take: `CAISSON_TEST_PATIENCE`, 1 without it.
fn patience() -> u32 {
    let said = std::env::var("CAISSON_TEST_PATIENCE").ok();
    said.and_then(|factor| factor.parse().ok()).unwrap_or(1).max(1)
}

/// Runs an asynchronous test on the thread that entered a scratch host: its namespaces are that thread's.
pub fn run<T>(test: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(test)
}
