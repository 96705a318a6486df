//! caissond: reads the command line and the configuration, then serves, checks or asks.

#![expect(
    unsafe_code,
    reason = "mallopt has no safe wrapper; one call, before any thread exists"
)]

use std::{io::IsTerminal, process::ExitCode};

use anyhow::Context;
use caissond::{
    check,
    cli::{Cli, Command},
    config::Config,
    daemon, image_command, inquiry,
};
use clap::Parser;
use tracing_subscriber::EnvFilter;

/// The daemon waits nearly always; two workers keep one slow call from holding up all others.
const WORKERS: usize = 2;

/// Threads for blocking file work, image conversion among it.
const MAX_BLOCKING: usize = 32;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            // The chain once, as one line.
            eprintln!("caissond: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    few_arenas();
    let config = Config::load(cli.config.as_deref(), &cli.overrides)?;
    match cli.command.clone().unwrap_or(Command::Serve) {
        Command::Serve => {
            log_to_stderr(&config.daemon.log)?;
            runtime()?.block_on(daemon::serve(config))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { json } => {
            let report = runtime()?.block_on(check::check(&config));
            print!("{}", if json { report.json() } else { report.text() });
            Ok(if report.pods_can_run() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Status { json } => {
            let answer = runtime()?.block_on(inquiry::ask(&config.daemon.socket))?;
            print!("{}", if json { answer.json() } else { answer.text() });
            Ok(ExitCode::SUCCESS)
        }
        Command::Image(command) => {
            log_to_stderr("warn")?;
            print!("{}", runtime()?.block_on(image_command::run(&config, command))?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(MAX_BLOCKING)
        .thread_name("caissond")
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).context("cannot read the log filter")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// glibc gives each thread its own arena, and a daemon with many short-lived threads keeps them all: two are enough.
fn few_arenas() {
    // SAFETY: mallopt only sets a number of the allocator; no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}
