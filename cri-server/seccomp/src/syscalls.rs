//! Numbers of system calls, by architecture.

use std::{collections::HashMap, sync::LazyLock};

/// An architecture whose programs an x86_64 kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arch {
    X86_64,
    X86,
}

impl Arch {
    /// AUDIT_ARCH_*, as `seccomp_data.arch` has it.
    pub(crate) fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
        }
    }

    /// Number of the call with this name; `None` when this architecture has no such call.
    pub(crate) fn number(self, name: &str) -> Option<u32> {
        let table = match self {
            Self::X86_64 => &*X86_64,
            Self::X86 => &*X86,
        };
        table.get(name).copied()
    }
}

type Table = HashMap<&'static str, u32>;

static X86_64: LazyLock<Table> = LazyLock::new(|| table(include_str!("../data/x86_64.tbl")));
static X86: LazyLock<Table> = LazyLock::new(|| table(include_str!("../data/i386.tbl")));

fn table(text: &'static str) -> Table {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(number, name)| Some((name, number.parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        for (name, x86_64, x86) in [
            ("read", Some(0), Some(3)),
            ("socket", Some(41), Some(359)),
            ("clone3", Some(435), Some(435)),
            ("socketcall", None, Some(102)),
            ("arch_prctl", Some(158), Some(384)),
            ("mseal", Some(462), Some(462)),
            ("no_such_call", None, None),
        ] {
            assert_eq!(Arch::X86_64.number(name), x86_64, "{name}");
            assert_eq!(Arch::X86.number(name), x86, "{name}");
        }
    }

    #[test]
    fn every_line_of_the_tables_is_read() {
        for (text, table) in [
            (include_str!("../data/x86_64.tbl"), &*X86_64),
            (include_str!("../data/i386.tbl"), &*X86),
        ] {
            assert_eq!(text.lines().count(), table.len());
        }
    }
}
