//! The exit record: the process's last words, also when it panics.

use std::{
    fs::File,
    os::fd::OwnedFd,
    panic::PanicHookInfo,
    sync::{Mutex, OnceLock, PoisonError},
    time::Instant,
};

use caisson_vmm_api::exit::{Cause, ExitRecord};

/// Longest text of a panic that is recorded, bytes.
const PANIC_TEXT_MAX: usize = 4096;

static RECORD: OnceLock<Record> = OnceLock::new();

struct Record {
    file: File,
    /// When the guest began to run.
    began: OnceLock<Instant>,
    written: Mutex<bool>,
}

/// From now on, there is a record to write.
pub(crate) fn open(file: OwnedFd) {
    let record = Record {
        file: file.into(),
        began: OnceLock::new(),
        written: Mutex::new(false),
    };
    // Called once; a second file would not be used.
    drop(RECORD.set(record));
}

/// The guest begins to run now.
pub(crate) fn begin() {
    if let Some(record) = RECORD.get() {
        record.began.get_or_init(Instant::now);
    }
}

/// Writes the record; only the first call counts.
pub(crate) fn write(cause: Cause, exits: Vec<(String, u64)>) {
    let Some(record) = RECORD.get() else { return };
    // A thread that panicked while it wrote has written.
    let mut written = record.written.lock().unwrap_or_else(PoisonError::into_inner);
    if std::mem::replace(&mut *written, true) {
        return;
    }
    let ran = record.began.get().map(Instant::elapsed).unwrap_or_default();
    let text = ExitRecord {
        cause,
        ran_ms: u64::try_from(ran.as_millis()).unwrap_or(u64::MAX),
        exits,
    };
    let written = text.encode().map_err(std::io::Error::other);
    if let Err(e) = written.and_then(|bytes| std::io::Write::write_all(&mut &record.file, &bytes)) {
        eprintln!("caisson-vmm: cannot write the exit record: {e}");
    }
}

/// A mistake in any thread ends the process and is on record: a VM that lost a thread would look alive and do nothing.
pub(crate) fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        write(
            Cause::Panic {
                message: text(info),
                location,
            },
            Vec::new(),
        );
        std::process::abort();
    }));
}

fn text(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_default().chars().take(PANIC_TEXT_MAX).collect()
}
