//! Which ids and names a request may carry: they become file names, so they are checked before anything is done.

use crate::error::AgentError;

/// Most bytes of an id.
const MAX_ID: usize = caisson_agent_api::stream::MAX_ID;

/// An id of the daemon's choice: letters, digits, `_`, `.`, `-`; begins with a letter or digit; 128 bytes at most.
pub(crate) fn id(field: &'static str, id: &str) -> Result<(), AgentError> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let first = id.bytes().next();
    if id.len() <= MAX_ID && first.is_some_and(|byte| byte.is_ascii_alphanumeric()) && id.bytes().all(word) {
        return Ok(());
    }
    Err(AgentError::invalid(
        field,
        format!("{id:?} is not an id of 1 to {MAX_ID} letters, digits, '_', '.', '-'"),
    ))
}

/// A virtio serial: an id of at most the 20 bytes that virtio-blk has for it.
pub(crate) fn serial(field: &'static str, serial: &str) -> Result<(), AgentError> {
    id(field, serial)?;
    if serial.len() > 20 {
        return Err(AgentError::invalid(
            field,
            format!("{serial:?} is over the 20 bytes of a virtio serial"),
        ));
    }
    Ok(())
}

/// A path of the container's: absolute, without NUL or `..`, shorter than PATH_MAX.
pub(crate) fn absolute(field: &'static str, path: &str) -> Result<(), AgentError> {
    let bad = !path.starts_with('/')
        || path.len() > 4095
        || path.contains('\0')
        || path.split('/').any(|part| part == "..");
    if bad {
        return Err(AgentError::invalid(
            field,
            format!("{path:?} is not an absolute path without \"..\""),
        ));
    }
    Ok(())
}

/// A host name: up to 64 bytes of letters, digits, `-`, `.`, `_`.
pub(crate) fn hostname(name: &str) -> Result<(), AgentError> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if name.len() <= 64 && name.bytes().all(word) {
        return Ok(());
    }
    Err(AgentError::invalid(
        "hostname",
        format!("{name:?} is not a host name of at most 64 bytes"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_be_paths_are_refused() {
        for bad in ["", ".", "..", "a/b", "-a", "a b", "a\0", "é", &"a".repeat(129)] {
            assert!(id("id", bad).is_err(), "{bad:?}");
        }
        for good in ["a", "0a.b_c-d", &"a".repeat(128)] {
            assert!(id("id", good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn container_paths_are_absolute_and_without_dots() {
        for bad in ["", "a", "/a/../b", "/a\0"] {
            assert!(absolute("path", bad).is_err(), "{bad:?}");
        }
        assert!(absolute("path", "/a/..b/c").is_ok());
    }

    #[test]
    fn a_serial_fits_into_virtio() {
        assert!(serial("serial", &"s".repeat(20)).is_ok());
        assert!(serial("serial", &"s".repeat(21)).is_err());
    }
}
