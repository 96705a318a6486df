//! The generator: from a resolved policy to classic BPF.
//!
//! For each architecture, a binary search over ranges of numbers with the same answer; the conditions of a call are inline in its leaf.
//! Jumps over more than 255 instructions go by an unconditional one, whose reach is 32 bits.

use crate::{
    error::SeccompError,
    policy::{Answer, ArchPolicy, Policy},
    profile::{Action, Compare, Condition},
    syscalls::Arch,
};

/// BPF_MAXINSNS of the kernel.
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Numbers of the x32 ABI have this bit; -1, which a tracer makes a skipped call, too.
const X32_BIT: u32 = 0x4000_0000;
const ENOSYS: u32 = 38;

/// One instruction, `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub if_true: u8,
    /// Instructions to skip when it does not.
    pub if_false: u8,
    /// Operand.
    pub operand: u32,
}

/// A filter, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// At most 4096.
    pub instructions: Vec<Instruction>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u32,
}

impl Program {
    /// As the guest protocol carries it: `struct sock_filter` in little-endian, eight bytes each.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.instructions.len() * 8);
        for instruction in &self.instructions {
            bytes.extend(instruction.code.to_le_bytes());
            bytes.extend([instruction.if_true, instruction.if_false]);
            bytes.extend(instruction.operand.to_le_bytes());
        }
        bytes
    }
}

const fn op(code: u16, if_true: u8, if_false: u8, operand: u32) -> Instruction {
    Instruction {
        code,
        if_true,
        if_false,
        operand,
    }
}

fn answer(action: Action) -> Instruction {
    let value = match action {
        Action::KillProcess => 0x8000_0000,
        Action::KillThread => 0,
        Action::Trap => 0x0003_0000,
        Action::Errno(errno) => 0x0005_0000 | u32::from(errno),
        Action::Trace(message) => 0x7ff0_0000 | u32::from(message),
        Action::Log => 0x7ffc_0000,
        Action::Allow => 0x7fff_0000,
    };
    op(RETURN, 0, 0, value)
}

/// Compiles a policy.
pub(crate) fn program(policy: &Policy) -> Result<Program, SeccompError> {
    let mut code = vec![op(LOAD, 0, 0, ARCH)];
    for arch in &policy.architectures {
        let body = arch_code(arch)?;
        code.push(op(JUMP_EQUAL, 1, 0, arch.arch.audit()));
        code.push(op(JUMP, 0, 0, length(&body)?));
        code.extend(body);
    }
    code.push(answer(Action::KillProcess));
    if code.len() > MAX_INSTRUCTIONS {
        return Err(SeccompError::TooLong(code.len()));
    }
    Ok(Program {
        instructions: code,
        flags: policy.flags,
    })
}

fn length(code: &[Instruction]) -> Result<u32, SeccompError> {
    u32::try_from(code.len()).map_err(|_| SeccompError::TooLong(code.len()))
}

fn arch_code(policy: &ArchPolicy) -> Result<Vec<Instruction>, SeccompError> {
    let mut code = vec![op(LOAD, 0, 0, NUMBER)];
    if policy.arch == Arch::X86_64 {
        code.push(op(JUMP_GREATER_OR_EQUAL, 0, 1, X32_BIT));
        code.push(op(RETURN, 0, 0, 0x0005_0000 | ENOSYS));
    }
    code.extend(search(&ranges(policy), policy.arch)?);
    Ok(code)
}

/// First number of each range with the same answer, from 0 on, ascending.
fn ranges(policy: &ArchPolicy) -> Vec<(u32, Answer)> {
    let plain = |action| Answer {
        cases: Vec::new(),
        otherwise: action,
    };
    let mut ranges: Vec<(u32, Answer)> = Vec::new();
    let mut push = |from: u32, answer: Answer| {
        if ranges.last().is_none_or(|(_, last)| *last != answer) {
            ranges.push((from, answer));
        }
    };
    let mut next = 0;
    for (number, answer) in &policy.calls {
        if *number > next {
            push(next, plain(policy.otherwise));
        }
        push(*number, answer.clone());
        next = number.saturating_add(1);
    }
    if policy.newer_from > next {
        push(next, plain(policy.otherwise));
    }
    push(policy.newer_from.max(next), plain(policy.newer));
    ranges
}

fn search(ranges: &[(u32, Answer)], arch: Arch) -> Result<Vec<Instruction>, SeccompError> {
    match ranges {
        [] => Ok(Vec::new()),
        [(_, answer)] => leaf(answer, arch),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let first = high.first().map_or(0, |(first, _)| *first);
            let below = search(low, arch)?;
            let mut code = match u8::try_from(below.len()) {
                Ok(skip) => vec![op(JUMP_GREATER_OR_EQUAL, skip, 0, first)],
                Err(_) => vec![
                    op(JUMP_GREATER_OR_EQUAL, 0, 1, first),
                    op(JUMP, 0, 0, length(&below)?),
                ],
            };
            code.extend(below);
            code.extend(search(high, arch)?);
            Ok(code)
        }
    }
}

fn leaf(decided: &Answer, arch: Arch) -> Result<Vec<Instruction>, SeccompError> {
    let mut code = Vec::new();
    for (conditions, action) in &decided.cases {
        let mut case = vec![answer(*action)];
        // From the last to the first: each has to know how far it is to the next case.
        for condition in conditions.iter().rev() {
            let mut check = check(condition, arch, case.len())?;
            check.extend(case);
            case = check;
        }
        code.extend(case);
    }
    code.push(answer(decided.otherwise));
    Ok(code)
}

/// Where a comparison leads.
#[derive(Debug, Clone, Copy)]
enum To {
    /// The next instruction of the check.
    Next,
    /// Behind the check: the condition holds.
    Holds,
    /// To the next case: it does not.
    Fails,
}

/// An instruction of a check whose jumps are not counted yet.
struct Step(u16, u32, To, To);

/// Falls through when the condition holds, else skips the `rest` instructions behind it too.
fn check(condition: &Condition, arch: Arch, rest: usize) -> Result<Vec<Instruction>, SeccompError> {
    let steps = steps(condition, arch);
    let count = steps.len();
    let distance = |at: usize, to: To| {
        let behind = count - 1 - at;
        let skip = match to {
            To::Next => 0,
            To::Holds => behind,
            To::Fails => behind + rest,
        };
        // No argument comes twice in a case: six checks of five instructions at most.
        u8::try_from(skip).map_err(|_| SeccompError::TooLong(skip))
    };
    steps
        .iter()
        .enumerate()
        .map(|(at, Step(code, operand, yes, no))| {
            Ok(op(*code, distance(at, *yes)?, distance(at, *no)?, *operand))
        })
        .collect()
}

fn steps(condition: &Condition, arch: Arch) -> Vec<Step> {
    use To::{Fails, Holds, Next};
    let [low, high] = halves(condition.value);
    let place = ARGUMENTS + 8 * u32::from(condition.argument);
    let load_low = Step(LOAD, place, Next, Next);
    // The upper halves of a 32-bit program's arguments do not exist.
    let wide = |steps: Vec<Step>| {
        let load_high = Step(LOAD, place + 4, Next, Next);
        match arch {
            Arch::X86_64 => [load_high].into_iter().chain(steps).collect(),
            Arch::X86 => Vec::new(),
        }
    };
    let (mut steps, end) = match condition.compare {
        Compare::Equal => (
            wide(vec![Step(JUMP_EQUAL, high, Next, Fails)]),
            vec![load_low, Step(JUMP_EQUAL, low, Holds, Fails)],
        ),
        Compare::NotEqual => (
            wide(vec![Step(JUMP_EQUAL, high, Next, Holds)]),
            vec![load_low, Step(JUMP_EQUAL, low, Fails, Holds)],
        ),
        Compare::Masked(mask) => {
            let [mask_low, mask_high] = halves(mask);
            (
                wide(vec![
                    Step(AND, mask_high, Next, Next),
                    Step(JUMP_EQUAL, high, Next, Fails),
                ]),
                vec![
                    load_low,
                    Step(AND, mask_low, Next, Next),
                    Step(JUMP_EQUAL, low, Holds, Fails),
                ],
            )
        }
        Compare::Greater | Compare::GreaterOrEqual | Compare::Less | Compare::LessOrEqual => {
            // Less is what is not greater or equal, and so on.
            let (code, above, below) = match condition.compare {
                Compare::Greater => (JUMP_GREATER, Holds, Fails),
                Compare::GreaterOrEqual => (JUMP_GREATER_OR_EQUAL, Holds, Fails),
                Compare::Less => (JUMP_GREATER_OR_EQUAL, Fails, Holds),
                _ => (JUMP_GREATER, Fails, Holds),
            };
            (
                wide(vec![
                    Step(JUMP_GREATER, high, above, Next),
                    Step(JUMP_EQUAL, high, Next, below),
                ]),
                vec![load_low, Step(code, low, above, below)],
            )
        }
    };
    steps.extend(end);
    steps
}

/// Lower and upper half.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

#[cfg(test)]
mod tests;
