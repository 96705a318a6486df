//! The agent's words on the VM's console, for whoever has to find out why a VM did not come up.
//!
//! Every byte costs an exit on some hosts: only what went wrong is written, never what went well.

use std::io::Write;

/// Writes one line. A console that cannot be written to is nobody's concern.
pub(crate) fn complain(what: &str) {
    let line = format!("caisson-agent: {what}\n");
    if std::io::stderr().write_all(line.as_bytes()).is_err() {
        // There is no other place to say it.
    }
}
