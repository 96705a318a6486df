//! Kernel parameters by the names that sysctl(8) prints.

use std::{fs, path::PathBuf};

use crate::error::{AgentError, At};

/// Where a parameter is. Dots separate; when a slash comes first, slashes separate and dots belong to names (eth0.1).
fn path(name: &str) -> Result<PathBuf, AgentError> {
    let bad = || AgentError::invalid("sysctls", format!("{name:?} is not a kernel parameter"));
    let separator = name
        .chars()
        .find(|letter| matches!(letter, '.' | '/'))
        .ok_or_else(bad)?;
    let parts: Vec<String> = name
        .split(separator)
        .map(|part| {
            if separator == '.' {
                part.replace('/', ".")
            } else {
                part.to_owned()
            }
        })
        .collect();
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'@');
    let fine = |part: &String| !part.is_empty() && part != "." && part != ".." && part.bytes().all(word);
    if name.len() > 256 || !parts.iter().all(fine) {
        return Err(bad());
    }
    Ok([PathBuf::from("/proc/sys")]
        .into_iter()
        .chain(parts.into_iter().map(PathBuf::from))
        .collect())
}

/// Checks a name without setting anything.
pub(crate) fn check(name: &str) -> Result<(), AgentError> {
    path(name).map(|_| ())
}

/// Sets a parameter.
pub(crate) fn set(name: &str, value: &str) -> Result<(), AgentError> {
    fs::write(path(name)?, value).at(|| format!("setting sysctl {name} to {value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn dots_and_slashes_are_read_as_sysctl_reads_them() {
        assert_eq!(
            path("net.ipv4.ip_forward").unwrap(),
            Path::new("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.rp_filter").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/rp_filter")
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/rp_filter").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/rp_filter")
        );
    }

    #[test]
    fn names_that_leave_the_tree_are_refused() {
        for bad in [
            "",
            "x",
            "../etc/passwd",
            "net..ipv4",
            "a/../b",
            "net.//.x",
            "kernel.a b",
            "/kernel/x",
        ] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_names_the_parameter() {
        let error = set("kernel.caisson_no_such", "1").unwrap_err();
        assert!(error.to_string().contains("kernel.caisson_no_such"));
    }
}
