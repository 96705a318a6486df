//! The seccomp filter that closes vsock to containers: `socket(AF_VSOCK, ...)` answers EAFNOSUPPORT, as on a machine without vsock.
//!
//! Installed with every profile, whatever the profile says. The x32 ABI is answered ENOSYS. A 32-bit program that still multiplexes
//! through socketcall(2) hides its arguments in memory, where no filter can see them; and an unconfined process has no filter at all,
//! as it can read in its own status. There the other barriers hold: the agent accepts the host's connections only, the guest has no
//! loopback transport, and the VM's transport refuses what the guest initiates.

use super::{At, StageError, seccomp};

const AF_VSOCK: u32 = 40;
const SOCKET_X86_64: u32 = 41;
const SOCKET_I386: u32 = 359;
const X32_BIT: u32 = 0x4000_0000;
const ARCH_X86_64: u32 = 0xc000_003e;
const ARCH_I386: u32 = 0x4000_0003;

const NUMBER: u32 = 0;
const ARCH: u32 = 4;
/// Low half of the first argument.
const ARGUMENT: u32 = 16;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_BITS: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Code, jump if true, jump if false, operand.
type Instruction = (u16, u8, u8, u32);

const PROGRAM: [Instruction; 13] = [
    (LOAD, 0, 0, ARCH),
    (JUMP_EQUAL, 3, 0, ARCH_X86_64),
    (JUMP_EQUAL, 0, 8, ARCH_I386),
    // 3: i386
    (LOAD, 0, 0, NUMBER),
    (JUMP_EQUAL, 3, 6, SOCKET_I386),
    // 5: x86_64
    (LOAD, 0, 0, NUMBER),
    (JUMP_BITS, 5, 0, X32_BIT),
    (JUMP_EQUAL, 0, 3, SOCKET_X86_64),
    // 8: the address family
    (LOAD, 0, 0, ARGUMENT),
    (JUMP_EQUAL, 0, 1, AF_VSOCK),
    (RETURN, 0, 0, ERRNO | libc::EAFNOSUPPORT.cast_unsigned()),
    // 11
    (RETURN, 0, 0, ALLOW),
    // 12
    (RETURN, 0, 0, ERRNO | libc::ENOSYS.cast_unsigned()),
];

/// Filters this process and all that come from it. Needs CAP_SYS_ADMIN.
pub(super) fn install() -> Result<(), StageError> {
    let code = PROGRAM
        .iter()
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    seccomp::load(code, 0).at(|| "closing vsock to the container")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would.
    fn verdict(arch: u32, number: u32, argument: u64) -> u32 {
        let (mut at, mut accumulator) = (0usize, 0u32);
        loop {
            let (code, yes, no, k) = PROGRAM[at];
            at += 1;
            let jump = |taken: bool| usize::from(if taken { yes } else { no });
            match code {
                LOAD => {
                    accumulator = match k {
                        ARCH => arch,
                        NUMBER => number,
                        ARGUMENT => u32::try_from(argument & 0xffff_ffff).unwrap(),
                        other => panic!("load of {other}"),
                    }
                }
                JUMP_EQUAL => at += jump(accumulator == k),
                JUMP_BITS => at += jump(accumulator & k != 0),
                RETURN => return k,
                other => panic!("instruction {other}"),
            }
        }
    }

    const REFUSED: u32 = ERRNO | 97;

    #[test]
    fn vsock_sockets_are_refused_in_both_abis() {
        assert_eq!(verdict(ARCH_X86_64, SOCKET_X86_64, 40), REFUSED);
        assert_eq!(verdict(ARCH_I386, SOCKET_I386, 40), REFUSED);
    }

    #[test]
    fn a_family_in_the_upper_half_does_not_hide_it() {
        assert_eq!(
            verdict(ARCH_X86_64, SOCKET_X86_64, 0xffff_ffff_0000_0028),
            REFUSED
        );
    }

    #[test]
    fn other_sockets_and_calls_pass() {
        for family in [1, 2, 10, 16, 17, 38] {
            assert_eq!(verdict(ARCH_X86_64, SOCKET_X86_64, family), ALLOW);
            assert_eq!(verdict(ARCH_I386, SOCKET_I386, family), ALLOW);
        }
        for number in [0, 40, 42, 53, 359, 462] {
            assert_eq!(verdict(ARCH_X86_64, number, 40), ALLOW, "{number}");
        }
        assert_eq!(verdict(ARCH_I386, 41, 40), ALLOW);
    }

    #[test]
    fn the_x32_abi_is_closed() {
        assert_eq!(verdict(ARCH_X86_64, X32_BIT | 41, 40), ERRNO | 38);
    }
}
