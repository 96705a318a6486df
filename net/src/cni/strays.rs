//! Plugins that run on although the daemon that started them has died.
//!
//! A DEL beside an ADD that still runs would leave what the ADD makes after it. Plugins, and those they delegate to, are known by the
//! CNI_CONTAINERID and CNI_NETNS in their environment: an id may come again on another node of the same kernel, a path of ours not.

use std::{fs, io, path::Path, thread, time::Duration};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How often to look again, and how long to wait in between: what is killed may take a moment, and may have started another.
const ROUNDS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// Kills every process of a plugin that works for `container_id`, and waits until there is none.
pub(crate) fn kill(container_id: &str, netns: &Path) -> io::Result<()> {
    let marks = [
        format!("CNI_CONTAINERID={container_id}").into_bytes(),
        format!("CNI_NETNS={}", netns.display()).into_bytes(),
    ];
    for round in 0..ROUNDS {
        if round > 0 {
            thread::sleep(PAUSE);
        }
        let mut found = false;
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name
                .to_str()
                .and_then(|name| name.parse().ok())
                .and_then(Pid::from_raw)
            else {
                continue;
            };
            found |= kill_if_marked(pid, &marks);
        }
        if !found {
            return Ok(());
        }
    }
    Err(io::Error::other("its processes don't end after SIGKILL"))
}

/// Whether `pid` was one, and had not ended.
fn kill_if_marked(pid: Pid, marks: &[Vec<u8>]) -> bool {
    // The environment is read while the descriptor pins the process, so that no signal hits a stranger.
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    // Empty for one that is only not waited for.
    let Ok(environment) = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())) else {
        return false;
    };
    let has = |mark: &Vec<u8>| environment.split(|byte| *byte == 0).any(|entry| entry == mark);
    if !marks.iter().all(has) {
        return false;
    }
    tracing::info!(
        pid = pid.as_raw_nonzero(),
        "CNI plugin of an earlier daemon killed"
    );
    pidfd_send_signal(&pidfd, Signal::KILL).is_ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_what_carries_the_mark_is_killed() {
        let ours = format!("stray-{}", std::process::id());
        let start = |id: &str| {
            Command::new("sleep")
                .arg("1000")
                .env("CNI_CONTAINERID", id)
                .env("CNI_NETNS", "/n")
                .spawn()
                .unwrap()
        };
        let (mut marked, mut other) = (start(&ours), start(&format!("{ours}-other")));
        // Until exec(), a child has its parent's environment.
        while !fs::read(format!("/proc/{}/environ", marked.id()))
            .unwrap()
            .windows(ours.len())
            .any(|part| part == ours.as_bytes())
        {
            thread::yield_now();
        }
        kill(&ours, Path::new("/n")).unwrap();
        assert!(!marked.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        kill(&ours, Path::new("/n")).unwrap();
    }
}
