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
fn bring_up(mut ask: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 1..TRIES {
        match ask() {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            other => return other,
        }
    }
    ask()
}

/// The first CPU has no switch: it is always online.
fn start(cpus: &Path, cpu: u32) -> io::Result<()> {
    let switch: PathBuf = cpus.join(format!("cpu{cpu}/online"));
    match fs::read_to_string(&switch) {
        Ok(state) if state.trim() == "1" => Ok(()),
        Ok(_) => bring_up(|| fs::write(&switch, "1")),
        Err(error) if error.kind() == io::ErrorKind::NotFound && cpu == 0 => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Answers what is asked with these errors in turn, and well after them; how often it was asked.
    fn asked(errors: &[i32]) -> (io::Result<()>, usize) {
        let mut count = 0;
        let outcome = bring_up(|| {
            let answer = errors
                .get(count)
                .map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(*code)));
            count += 1;
            answer
        });
        (outcome, count)
    }

    #[test]
    fn a_cpu_that_is_late_is_asked_again_but_not_for_ever() {
        let (outcome, count) = asked(&[]);
        assert!(outcome.is_ok() && count == 1);
        let (outcome, count) = asked(&[libc::EIO, libc::EIO]);
        assert!(outcome.is_ok() && count == 3);
        let (outcome, count) = asked(&[libc::EIO; 10]);
        assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(count, TRIES as usize);
        let (outcome, count) = asked(&[libc::EBUSY]);
        assert!(
            outcome.is_err() && count == 1,
            "only lateness is worth another try"
        );
    }

    #[test]
    fn the_first_cpu_has_no_switch_and_those_that_are_online_stay() {
        let dir = tempfile::tempdir().unwrap();
        let switch = |cpu: u32| dir.path().join(format!("cpu{cpu}/online"));
        for (cpu, state) in [(1, "0\n"), (2, "1\n")] {
            fs::create_dir(dir.path().join(format!("cpu{cpu}"))).unwrap();
            fs::write(switch(cpu), state).unwrap();
        }
        for cpu in 0..3 {
            start(dir.path(), cpu).unwrap();
        }
        assert_eq!(fs::read(switch(1)).unwrap(), b"1");
        assert_eq!(fs::read(switch(2)).unwrap(), b"1\n", "it was not asked");
        assert!(start(dir.path(), 3).is_err());
    }
}
