//! `OnlineCpus`: CPUs that the hypervisor has made runnable are brought online. Blocking.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use caisson_agent_api::v1;

use crate::{
    error::{AgentError, At},
    hello,
};

const CPUS: &str = "/sys/devices/system/cpu";

/// How often a CPU that does not come in time is asked.
const TRIES: u32 = 4;

/// More than any kernel has.
const MAX_CPUS: u32 = 8192;

/// Brings the first `count` CPUs online.
pub(crate) fn online(request: v1::OnlineCpusRequest) -> Result<v1::OnlineCpusReply, AgentError> {
    let count = request.count;
    if count == 0 || count > MAX_CPUS {
        return Err(AgentError::invalid(
            "count",
            format!("{count} CPUs make no sense"),
        ));
    }
    for cpu in 0..count {
        start(Path::new(CPUS), cpu).at(|| format!("bringing CPU {cpu} online"))?;
    }
    Ok(v1::OnlineCpusReply {
        online: hello::online_cpus(),
    })
}

/// The kernel gives a CPU ten seconds to report, which is little where the host is busy. It may be asked again, and goes on where it was.
fn bring_up(switch: &Path) -> io::Result<()> {
    for _ in 1..TRIES {
        match fs::write(switch, "1") {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            other => return other,
        }
    }
    fs::write(switch, "1")
}

/// The first CPU has no switch: it is always online.
fn start(cpus: &Path, cpu: u32) -> io::Result<()> {
    let switch: PathBuf = cpus.join(format!("cpu{cpu}/online"));
    match fs::read_to_string(&switch) {
        Ok(state) if state.trim() == "1" => Ok(()),
        Ok(_) => bring_up(&switch),
        Err(error) if error.kind() == io::ErrorKind::NotFound && cpu == 0 => Ok(()),
        Err(error) => Err(error),
    }
}
