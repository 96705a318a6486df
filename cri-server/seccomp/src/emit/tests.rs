//! Every program is run beside a naive reading of its profile.

use proptest::prelude::*;

use super::*;
use crate::{
    compile, default_profile,
    policy::resolve,
    profile::{Profile, Rule, When},
};

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const KILL_PROCESS: u32 = 0x8000_0000;

/// Runs a program as a kernel would, on one call.
fn run(program: &Program, arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut at = 0usize;
    let mut accumulator = 0u32;
    loop {
        let Instruction {
            code,
            if_true,
            if_false,
            operand,
        } = program.instructions[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { if_true } else { if_false });
        match code {
            LOAD => {
                accumulator = match operand {
                    NUMBER => number,
                    ARCH => arch,
                    other => {
                        let offset = usize::try_from(other - ARGUMENTS).unwrap();
                        assert!(offset % 4 == 0 && offset < 48);
                        halves(arguments[offset / 8])[offset % 8 / 4]
                    }
                }
            }
            AND => accumulator &= operand,
            JUMP => at += usize::try_from(operand).unwrap(),
            JUMP_EQUAL => at += jump(accumulator == operand),
            JUMP_GREATER => at += jump(accumulator > operand),
            JUMP_GREATER_OR_EQUAL => at += jump(accumulator >= operand),
            RETURN => return operand,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn holds(condition: &Condition, arch: Arch, arguments: [u64; 6]) -> bool {
    let bits = if arch == Arch::X86 { 0xffff_ffff } else { u64::MAX };
    let argument = arguments[usize::from(condition.argument)] & bits;
    let value = condition.value & bits;
    match condition.compare {
        Compare::NotEqual => argument != value,
        Compare::Less => argument < value,
        Compare::LessOrEqual => argument <= value,
        Compare::Equal => argument == value,
        Compare::GreaterOrEqual => argument >= value,
        Compare::Greater => argument > value,
        Compare::Masked(mask) => argument & mask == value,
    }
}

/// What a profile says about one call, read from the top.
fn naive(profile: &Profile, arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let arch = match arch {
        0xc000_003e => Arch::X86_64,
        0x4000_0003 if profile.x86 => Arch::X86,
        _ => return KILL_PROCESS,
    };
    if arch == Arch::X86_64 && number >= X32_BIT {
        return ERRNO | ENOSYS;
    }
    let about = |rule: &&Rule| rule.names.iter().any(|name| arch.number(name) == Some(number));
    let rules: Vec<&Rule> = profile.rules.iter().filter(about).collect();
    if let Some(rule) = rules.iter().find(|rule| rule.conditions.is_empty()) {
        return answer(rule.action).operand;
    }
    for rule in rules {
        let twice = (0..6).any(|a| rule.conditions.iter().filter(|c| c.argument == a).count() > 1);
        let mut met = rule.conditions.iter().map(|c| holds(c, arch, arguments));
        if if twice {
            met.any(|met| met)
        } else {
            met.all(|met| met)
        } {
            return answer(rule.action).operand;
        }
    }
    let newest = profile
        .rules
        .iter()
        .flat_map(|rule| &rule.names)
        .filter_map(|name| arch.number(name))
        .max();
    if newest.is_some_and(|newest| number > newest) && profile.default_action == Action::Errno(1) {
        return ERRNO | ENOSYS;
    }
    answer(profile.default_action).operand
}

fn actions() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::KillProcess),
        Just(Action::KillThread),
        Just(Action::Trap),
        (0u16..4096).prop_map(Action::Errno),
        Just(Action::Errno(1)),
        (0u16..4096).prop_map(Action::Trace),
        Just(Action::Log),
        Just(Action::Allow),
    ]
}

/// Values around which comparisons change their minds.
fn values() -> impl Strategy<Value = u64> {
    prop_oneof![
        0u64..4,
        (0u64..4, 0u64..4).prop_map(|(high, low)| (high << 32) | low),
        Just(u64::MAX),
        Just(0xffff_ffff),
        Just(0x8000_0000_0000_0000),
        any::<u64>(),
    ]
}

fn conditions() -> impl Strategy<Value = Vec<Condition>> {
    let compare = prop_oneof![
        Just(Compare::NotEqual),
        Just(Compare::Less),
        Just(Compare::LessOrEqual),
        Just(Compare::Equal),
        Just(Compare::GreaterOrEqual),
        Just(Compare::Greater),
        values().prop_map(Compare::Masked),
    ];
    let condition = (0u8..6, compare, values()).prop_map(|(argument, compare, value)| Condition {
        argument,
        compare,
        value: match compare {
            Compare::Masked(mask) => value & mask,
            _ => value,
        },
    });
    proptest::collection::vec(condition, 0..7)
}

const NAMES: [&str; 12] = [
    "read",
    "write",
    "open",
    "socket",
    "socketcall",
    "clone",
    "personality",
    "ptrace",
    "exit_group",
    "clone3",
    "mseal",
    "no_such",
];

fn profiles() -> impl Strategy<Value = Profile> {
    let names = proptest::collection::vec(proptest::sample::select(NAMES.to_vec()), 1..5);
    let rule = (names, actions(), conditions()).prop_map(|(names, action, conditions)| Rule {
        field: "rule".into(),
        names: names.into_iter().map(str::to_owned).collect(),
        action,
        conditions,
        includes: When::default(),
        excludes: When::default(),
    });
    (actions(), any::<bool>(), proptest::collection::vec(rule, 0..40)).prop_map(
        |(default_action, x86, rules)| Profile {
            default_action,
            x86,
            rules,
            flags: 0,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 50 } else { 3000 }))]

    #[test]
    fn a_program_answers_what_its_profile_says(
        profile in profiles(),
        calls in proptest::collection::vec(
            (
                proptest::sample::select(vec![0xc000_003e, 0x4000_0003, 0x4000_0028]),
                prop_oneof![
                    proptest::sample::select(NAMES.to_vec()).prop_map(|name| Arch::X86_64.number(name).unwrap_or(0)),
                    proptest::sample::select(NAMES.to_vec()).prop_map(|name| Arch::X86.number(name).unwrap_or(0)),
                    0u32..470,
                    any::<u32>(),
                ],
                proptest::array::uniform6(values()),
            ),
            1..60,
        ),
    ) {
        // A denied name that nobody knows makes a profile unusable, which is tested elsewhere.
        if let Ok(policy) = resolve(&profile, &[]) {
            let program = program(&policy).unwrap();
            for (arch, number, arguments) in calls {
                prop_assert_eq!(
                    run(&program, arch, number, arguments),
                    naive(&profile, arch, number, arguments),
                    "arch {:#x} number {} arguments {:x?}", arch, number, arguments
                );
            }
        }
    }

    #[test]
    fn whatever_a_file_has_in_it_nothing_panics(text: String, json in json()) {
        let _ignored = compile(&text, &[]);
        let _ignored = compile(&json, &[]);
    }
}

/// Documents that look like profiles from afar.
fn json() -> impl Strategy<Value = String> {
    let word = proptest::sample::select(vec![
        "\"SCMP_ACT_ERRNO\"",
        "\"SCMP_ACT_ALLOW\"",
        "\"read\"",
        "[]",
        "{}",
        "null",
        "-1",
        "99999999999999999999",
        "\"\"",
    ]);
    let words = proptest::collection::vec(word, 4);
    words.prop_map(|w| {
        format!(
            r#"{{"defaultAction":{},"defaultErrnoRet":{},"syscalls":[{{"names":[{}],"action":{},"args":[{{"index":1,"value":1,"op":"SCMP_CMP_EQ"}}]}}]}}"#,
            w[0], w[1], w[2], w[3]
        )
    })
}

fn default(capabilities: &[&str]) -> Program {
    let capabilities: Vec<String> = capabilities.iter().map(|name| (*name).to_owned()).collect();
    default_profile(&capabilities).unwrap()
}

fn said(program: &Program, arch: Arch, name: &str, first: u64) -> u32 {
    run(
        program,
        arch.audit(),
        arch.number(name).unwrap(),
        [first, 0, 0, 0, 0, 0],
    )
}

#[test]
fn the_default_profile_lets_programs_work_and_keeps_them_from_the_rest() {
    let plain = default(&[]);
    assert!(plain.instructions.len() < 2000, "{}", plain.instructions.len());
    for arch in [Arch::X86_64, Arch::X86] {
        for name in [
            "read",
            "openat2",
            "execve",
            "futex",
            "ptrace",
            "memfd_create",
            "fchmodat2",
            "capset",
            "prctl",
        ] {
            assert_eq!(said(&plain, arch, name, 0), ALLOW, "{arch:?} {name}");
        }
        for name in [
            "mount",
            "setns",
            "unshare",
            "bpf",
            "keyctl",
            "reboot",
            "kexec_load",
            "io_uring_setup",
            "sethostname",
            "userfaultfd",
        ] {
            assert_eq!(said(&plain, arch, name, 0), ERRNO | 1, "{arch:?} {name}");
        }
        // So that a libc falls back to clone, whose flags can be seen.
        assert_eq!(said(&plain, arch, "clone3", 0), ERRNO | 38);
    }
    let new_user = 0x1000_0000;
    assert_eq!(said(&plain, Arch::X86_64, "clone", 0x11), ALLOW);
    assert_eq!(said(&plain, Arch::X86_64, "clone", new_user | 0x11), ERRNO | 1);
    assert_eq!(said(&plain, Arch::X86_64, "socket", 2), ALLOW);
    assert_eq!(said(&plain, Arch::X86_64, "socket", 40), ERRNO | 1);
    assert_eq!(said(&plain, Arch::X86_64, "personality", 0xffff_ffff), ALLOW);
    assert_eq!(said(&plain, Arch::X86_64, "personality", 0x0040_0000), ERRNO | 1);
    // Newer than the profile.
    assert_eq!(run(&plain, Arch::X86_64.audit(), 600, [0; 6]), ERRNO | 38);
    // x32, and another machine's calls.
    assert_eq!(run(&plain, Arch::X86_64.audit(), X32_BIT, [0; 6]), ERRNO | 38);
    assert_eq!(run(&plain, 0x4000_0028, 0, [0; 6]), KILL_PROCESS);
}

#[test]
fn capabilities_open_the_calls_that_they_are_for() {
    for (capability, name) in [
        ("CAP_SYS_ADMIN", "mount"),
        ("CAP_SYS_ADMIN", "clone3"),
        ("CAP_SYS_ADMIN", "sethostname"),
        ("CAP_SYS_BOOT", "reboot"),
        ("CAP_SYS_CHROOT", "chroot"),
        ("CAP_SYS_MODULE", "finit_module"),
        ("CAP_SYS_TIME", "clock_settime"),
        ("CAP_SYS_NICE", "mbind"),
        ("CAP_BPF", "bpf"),
        ("CAP_PERFMON", "perf_event_open"),
        ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
        ("CAP_SYS_RAWIO", "iopl"),
        ("CAP_SYS_PACCT", "acct"),
        ("CAP_SYS_TTY_CONFIG", "vhangup"),
        ("CAP_SYSLOG", "syslog"),
    ] {
        assert_ne!(said(&default(&[]), Arch::X86_64, name, 0), ALLOW, "{name}");
        assert_eq!(
            said(&default(&[capability]), Arch::X86_64, name, 0),
            ALLOW,
            "{capability} {name}"
        );
    }
    assert_eq!(
        said(&default(&["CAP_SYS_ADMIN"]), Arch::X86_64, "clone", 0x1000_0000),
        ALLOW
    );
}

#[test]
fn every_name_in_the_default_profile_is_a_system_call() {
    let profile = crate::profile::parse(crate::DEFAULT).unwrap();
    for name in profile.rules.iter().flat_map(|rule| &rule.names) {
        assert!(
            Arch::X86_64.number(name).is_some() || Arch::X86.number(name).is_some(),
            "{name}"
        );
    }
}

#[test]
fn a_list_of_denied_calls_denies_only_them() {
    let program = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod","fchmodat"],"action":"SCMP_ACT_ERRNO"}]}"#,
        &[],
    )
    .unwrap();
    assert_eq!(said(&program, Arch::X86_64, "chmod", 0), ERRNO | 1);
    assert_eq!(said(&program, Arch::X86_64, "fchmod", 0), ALLOW);
    assert_eq!(run(&program, Arch::X86_64.audit(), 9999, [0; 6]), ALLOW);
}

#[test]
fn a_profile_that_is_too_long_for_a_kernel_is_refused() {
    let args: String = (0..600)
        .map(|n| format!(r#"{{"names":["socket","read","write"],"action":"SCMP_ACT_ALLOW","args":[{{"index":0,"value":{n},"op":"SCMP_CMP_EQ"}}]}}"#))
        .collect::<Vec<_>>()
        .join(",");
    let error = compile(
        &format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{args}]}}"#),
        &[],
    )
    .unwrap_err();
    assert!(error.to_string().contains("a kernel takes 4096"), "{error}");
}

#[test]
fn bytes_are_those_of_struct_sock_filter() {
    let program = Program {
        instructions: vec![op(JUMP_EQUAL, 1, 2, 0x0403_0201)],
        flags: 0,
    };
    assert_eq!(program.to_bytes(), [0x15, 0, 1, 2, 1, 2, 3, 4]);
}
