//! Which devices a container's processes can open: an eBPF program on its cgroup.
//!
//! Containers keep CAP_MKNOD by default; without this, one could make a node for the pod's disks and read its neighbours' files. Making
//! nodes stays allowed, as every runtime does; using them is limited to what /dev holds. Privileged containers have no filter.
#![expect(unsafe_code, reason = "bpf(2) has no safe form")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::{AgentError, At};

/// struct bpf_insn: opcode, destination and source register, jump, immediate.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_ANY_BIT: u8 = 0x45;
const JUMP: u8 = 0x05;
const EXIT: u8 = 0x95;

/// Major and minor of the character devices that may be used; `None`: any minor.
const ALLOWED: [(i32, Option<i32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const READ: i32 = 2;
const WRITE: i32 = 4;
const READ_OR_WRITE: i32 = READ | WRITE;

const fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | (from << 4),
        offset,
        immediate,
    }
}

/// A device that a container may use besides the usual ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// A disk, no character device.
    pub(crate) block: bool,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// The program: r1 points to { access << 16 | type, major, minor }.
fn program(own: &[Allowed]) -> Vec<Instruction> {
    let mut code = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
        op(MOVE_REGISTER, 3, 2, 0, 0),
        op(AND, 3, 0, 0, 0xffff),
        op(SHIFT_RIGHT, 2, 0, 0, 16),
        op(AND, 2, 0, 0, READ_OR_WRITE),
        op(MOVE, 0, 0, 0, 1),
        // Making a node.
        op(JUMP_EQUAL, 2, 0, 1, 0),
        op(JUMP, 0, 0, 1, 0),
        op(EXIT, 0, 0, 0, 0),
    ];
    for device in own {
        let kind = if device.block { BLOCK } else { CHARACTER };
        let denied = (i32::from(!device.read) * READ) | (i32::from(!device.write) * WRITE);
        code.push(op(JUMP_NOT_EQUAL, 3, 0, 4, kind));
        code.push(op(JUMP_NOT_EQUAL, 4, 0, 3, device.major.cast_signed()));
        code.push(op(JUMP_NOT_EQUAL, 5, 0, 2, device.minor.cast_signed()));
        // What this one does not permit is left to the refusal at the end.
        code.push(op(JUMP_ANY_BIT, 2, 0, 1, denied));
        code.push(op(EXIT, 0, 0, 0, 0));
    }
    code.push(op(JUMP_EQUAL, 3, 0, 2, CHARACTER));
    code.push(op(MOVE, 0, 0, 0, 0));
    code.push(op(EXIT, 0, 0, 0, 0));
    for (major, minor) in ALLOWED {
        match minor {
            Some(minor) => {
                code.push(op(JUMP_NOT_EQUAL, 4, 0, 2, major));
                code.push(op(JUMP_NOT_EQUAL, 5, 0, 1, minor));
            }
            None => code.push(op(JUMP_NOT_EQUAL, 4, 0, 1, major)),
        }
        // r0 is still 1.
        code.push(op(EXIT, 0, 0, 0, 0));
    }
    code.push(op(MOVE, 0, 0, 0, 0));
    code.push(op(EXIT, 0, 0, 0, 0));
    code
}

/// Attributes of BPF_PROG_LOAD, as far as they are used.
#[derive(Debug, Default)]
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// Attributes of BPF_PROG_ATTACH, as far as they are used.
#[derive(Debug, Default)]
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Limits what processes in this cgroup can open, besides these devices. The filter lives as long as the cgroup.
pub(crate) fn attach(cgroup: &OwnedFd, own: &[Allowed]) -> Result<(), AgentError> {
    let code = program(own);
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(code.len())
            .map_err(std::io::Error::other)
            .at(|| "building the device filter")?,
        instructions: code.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        ..Load::default()
    };
    // SAFETY: `load`, the code and the license outlive the call, which copies them; the size is that of the structure.
    let program = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            std::ptr::from_ref(&load),
            size_of::<Load>(),
        )
    };
    let program = i32::try_from(program)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(std::io::Error::last_os_error)
        .at(|| "loading the device filter")?;
    // SAFETY: the kernel has just opened this descriptor for us, and nothing else owns it.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let attach = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` outlives the call, which copies it; the size is that of the structure.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            std::ptr::from_ref(&attach),
            size_of::<Attach>(),
        )
    };
    if answer == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error()).at(|| "attaching the device filter")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would; the answer is r0.
    fn verdict(kind: i64, access: i64, major: i64, minor: i64) -> i64 {
        verdict_with(&[], kind, access, major, minor)
    }

    fn verdict_with(own: &[Allowed], kind: i64, access: i64, major: i64, minor: i64) -> i64 {
        let context = [(access << 16) | kind, major, minor];
        let code = program(own);
        let mut registers = [0i64; 11];
        let mut at = 0usize;
        loop {
            let instruction = code[at];
            at += 1;
            let to = usize::from(instruction.registers & 15);
            let from = usize::from(instruction.registers >> 4);
            let immediate = i64::from(instruction.immediate);
            let jump = usize::try_from(instruction.offset).unwrap_or(0);
            match instruction.code {
                LOAD_WORD => registers[to] = context[jump / 4],
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = immediate,
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP => at += jump,
                JUMP_EQUAL if registers[to] == immediate => at += jump,
                JUMP_NOT_EQUAL if registers[to] != immediate => at += jump,
                JUMP_ANY_BIT if registers[to] & immediate != 0 => at += jump,
                JUMP_EQUAL | JUMP_NOT_EQUAL | JUMP_ANY_BIT => {}
                EXIT => return registers[0],
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    #[test]
    fn standard_nodes_and_terminals_can_be_used() {
        for (major, minor) in [
            (1, 3),
            (1, 5),
            (1, 7),
            (1, 8),
            (1, 9),
            (5, 0),
            (5, 1),
            (5, 2),
            (136, 0),
            (136, 77),
        ] {
            assert_eq!(verdict(2, 6, major, minor), 1, "{major}:{minor}");
            assert_eq!(verdict(2, 2, major, minor), 1, "{major}:{minor}");
        }
    }

    #[test]
    fn disks_memory_and_the_rest_cannot() {
        for (major, minor) in [
            (1, 1),
            (1, 2),
            (1, 4),
            (1, 11),
            (5, 3),
            (10, 200),
            (4, 0),
            (254, 0),
        ] {
            assert_eq!(verdict(2, 2, major, minor), 0, "{major}:{minor}");
        }
        for (major, minor) in [(254, 0), (1, 3), (136, 0), (8, 0)] {
            assert_eq!(verdict(1, 4, major, minor), 0, "block {major}:{minor}");
        }
    }

    #[test]
    fn the_container_s_own_disks_can_be_used_as_asked() {
        let disk = |minor, readonly: bool| Allowed {
            block: true,
            major: 254,
            minor,
            read: true,
            write: !readonly,
        };
        let disks = [disk(16, true), disk(32, false)];
        for (minor, access, may) in [
            (16, 2, 1),
            (16, 4, 0),
            (16, 6, 0),
            (32, 2, 1),
            (32, 4, 1),
            (32, 6, 1),
            (0, 2, 0),
        ] {
            assert_eq!(
                verdict_with(&disks, 1, access, 254, minor),
                may,
                "{minor} {access}"
            );
        }
        assert_eq!(verdict_with(&disks, 2, 2, 254, 32), 0);
        assert_eq!(verdict_with(&disks, 2, 2, 1, 3), 1);
    }

    #[test]
    fn a_device_of_the_guest_s_can_be_used_as_asked_by_its_kind() {
        let tun = |read, write| {
            [Allowed {
                block: false,
                major: 10,
                minor: 200,
                read,
                write,
            }]
        };
        for (own, access, may) in [
            (tun(true, true), 6, 1),
            (tun(true, false), 2, 1),
            (tun(true, false), 6, 0),
            (tun(false, true), 4, 1),
            (tun(false, true), 2, 0),
            (tun(false, false), 2, 0),
        ] {
            assert_eq!(verdict_with(&own, 2, access, 10, 200), may, "{own:?} {access}");
            assert_eq!(verdict_with(&own, 1, access, 10, 200), 0, "{own:?} {access}");
            assert_eq!(verdict_with(&own, 2, access, 10, 229), 0, "{own:?} {access}");
        }
    }

    #[test]
    fn nodes_can_be_made() {
        assert_eq!(verdict(1, 1, 254, 0), 1);
        assert_eq!(verdict(2, 1, 10, 200), 1);
        assert_eq!(verdict(1, 5, 254, 0), 0);
    }
}
