//! Filters of system calls, as they arrive: programs that the daemon has compiled. Nothing here knows what is in them.
#![expect(unsafe_code, reason = "seccomp has no safe form")]

use caisson_agent_api::v1;

use super::{At, StageError};

/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// SECCOMP_FILTER_FLAG_LOG and SECCOMP_FILTER_FLAG_SPEC_ALLOW.
const FLAGS: u32 = 2 | 4;

/// The program in a request; the error says what is wrong with it.
pub(crate) fn decode(filter: &v1::SeccompFilter) -> Result<Vec<libc::sock_filter>, String> {
    let (instructions, rest) = filter.program.as_chunks::<8>();
    if instructions.is_empty() || instructions.len() > MAX_INSTRUCTIONS || !rest.is_empty() {
        return Err(format!(
            "{} bytes are not 1 to {MAX_INSTRUCTIONS} instructions",
            filter.program.len()
        ));
    }
    if filter.flags & !FLAGS != 0 {
        return Err(format!("flags {:#x} are not possible", filter.flags));
    }
    let instruction = |bytes: &[u8; 8]| {
        let [code, code_high, jt, jf, a, b, c, d] = *bytes;
        libc::sock_filter {
            code: u16::from_le_bytes([code, code_high]),
            jt,
            jf,
            k: u32::from_le_bytes([a, b, c, d]),
        }
    };
    Ok(instructions.iter().map(instruction).collect())
}

/// Installs the filter that a container asked for.
pub(super) fn install(filter: &v1::SeccompFilter) -> Result<(), StageError> {
    let code = decode(filter).map_err(|reason| StageError::Invalid(format!("seccomp filter: {reason}")))?;
    load(code, filter.flags).at(|| "installing the seccomp filter")
}

/// Filters this process and all that come from it. Needs CAP_SYS_ADMIN or no_new_privileges.
pub(super) fn load(mut code: Vec<libc::sock_filter>, flags: u32) -> std::io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).map_err(std::io::Error::other)?,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: `program` and the code it points to outlive the call, which copies them.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(&program),
        )
    };
    if answer == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_whole_instructions_and_not_too_many() {
        let filter = |bytes: usize, flags| v1::SeccompFilter {
            program: vec![0x15; bytes],
            flags,
        };
        for bytes in [0, 7, 9, 4097 * 8] {
            assert!(decode(&filter(bytes, 0)).is_err(), "{bytes}");
        }
        assert!(decode(&filter(8, 8)).is_err());
        let code = decode(&filter(16, 6)).unwrap();
        assert_eq!((code.len(), code[1].code, code[1].k), (2, 0x1515, 0x1515_1515));
    }
}
