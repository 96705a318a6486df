//! What a profile means for one container: for each architecture, what each system call is answered.

use std::collections::BTreeMap;

use crate::{
    error::SeccompError,
    profile::{Action, Condition, EPERM, Profile, Rule, When},
    syscalls::Arch,
};

/// Version of the kernel that guests run, for `minKernel`.
const GUEST_KERNEL: (u32, u32) = (6, 12);

const ENOSYS: u16 = 38;

/// A profile, resolved.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) architectures: Vec<ArchPolicy>,
    pub(crate) flags: u32,
}

/// One architecture's part.
#[derive(Debug)]
pub(crate) struct ArchPolicy {
    pub(crate) arch: Arch,
    /// By number; a call that is not here is answered `otherwise`.
    pub(crate) calls: BTreeMap<u32, Answer>,
    pub(crate) otherwise: Action,
    /// Calls from this number on are newer than the profile; answered `newer`.
    pub(crate) newer_from: u32,
    pub(crate) newer: Action,
}

/// What one call is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The first whose conditions all hold decides.
    pub(crate) cases: Vec<(Vec<Condition>, Action)>,
    /// No case has decided.
    pub(crate) otherwise: Action,
}

pub(crate) fn resolve(profile: &Profile, capabilities: &[String]) -> Result<Policy, SeccompError> {
    let has = |name: &String| capabilities.contains(name);
    let rules: Vec<&Rule> = profile
        .rules
        .iter()
        .filter(|rule| counts(&rule.includes, &rule.excludes, has))
        .collect();
    for rule in &rules {
        known(rule, profile.default_action)?;
    }
    let mut architectures = vec![arch_policy(Arch::X86_64, profile, &rules)];
    if profile.x86 {
        architectures.push(arch_policy(Arch::X86, profile, &rules));
    }
    Ok(Policy {
        architectures,
        flags: profile.flags,
    })
}

fn counts(includes: &When, excludes: &When, has: impl Fn(&String) -> bool) -> bool {
    let here = |name: &String| matches!(name.as_str(), "amd64" | "x86_64" | "SCMP_ARCH_X86_64");
    let included = includes.capabilities.iter().all(&has)
        && (includes.architectures.is_empty() || includes.architectures.iter().any(here))
        && includes.min_kernel.is_none_or(|least| GUEST_KERNEL >= least);
    let excluded = excludes.capabilities.iter().any(&has)
        || excludes.architectures.iter().any(here)
        || excludes.min_kernel.is_some_and(|least| GUEST_KERNEL >= least);
    included && !excluded
}

/// A call that nobody knows is no loss in a list of what is allowed. In a list of what is denied, it would be allowed by a slip of the
/// pen.
fn known(rule: &Rule, default: Action) -> Result<(), SeccompError> {
    if severity(rule.action) <= severity(default) {
        return Ok(());
    }
    let unknown = rule
        .names
        .iter()
        .find(|name| Arch::X86_64.number(name).is_none() && Arch::X86.number(name).is_none());
    match unknown {
        Some(name) => Err(SeccompError::value(
            format!("{}.names", rule.field),
            format!("{name:?} is not a system call that is known here, so it cannot be denied"),
        )),
        None => Ok(()),
    }
}

/// As a kernel orders actions: of several filters, the most severe answer wins.
fn severity(action: Action) -> u8 {
    match action {
        Action::Allow => 0,
        Action::Log => 1,
        Action::Trace(_) => 2,
        Action::Errno(_) => 3,
        Action::Trap => 4,
        Action::KillThread => 5,
        Action::KillProcess => 6,
    }
}

fn arch_policy(arch: Arch, profile: &Profile, rules: &[&Rule]) -> ArchPolicy {
    let mut calls: BTreeMap<u32, Answer> = BTreeMap::new();
    let mut final_answers: BTreeMap<u32, Action> = BTreeMap::new();
    for rule in rules {
        for number in rule.names.iter().filter_map(|name| arch.number(name)) {
            let answer = calls.entry(number).or_insert_with(|| Answer {
                cases: Vec::new(),
                otherwise: profile.default_action,
            });
            if rule.conditions.is_empty() {
                final_answers.entry(number).or_insert(rule.action);
            } else if repeats(&rule.conditions) {
                let single = |condition: &Condition| (vec![*condition], rule.action);
                answer.cases.extend(rule.conditions.iter().map(single));
            } else {
                answer.cases.push((rule.conditions.clone(), rule.action));
            }
        }
    }
    for (number, action) in final_answers {
        let answer = Answer {
            cases: Vec::new(),
            otherwise: action,
        };
        calls.insert(number, answer);
    }
    let newest = calls.keys().next_back().copied();
    let newer = match profile.default_action {
        Action::Errno(EPERM) => Action::Errno(ENOSYS),
        other => other,
    };
    ArchPolicy {
        arch,
        calls,
        otherwise: profile.default_action,
        newer_from: newest.map_or(0, |number| number.saturating_add(1)),
        // A profile that names no call at all says nothing about how old it is.
        newer: if newest.is_none() {
            profile.default_action
        } else {
            newer
        },
    }
}

/// Whether an argument comes twice: then the conditions are alternatives, as in runc.
fn repeats(conditions: &[Condition]) -> bool {
    conditions.iter().enumerate().any(|(at, one)| {
        conditions
            .iter()
            .skip(at + 1)
            .any(|other| other.argument == one.argument)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::parse;

    fn policy(text: &str, capabilities: &[&str]) -> Result<Policy, SeccompError> {
        let capabilities: Vec<String> = capabilities.iter().map(|name| (*name).to_owned()).collect();
        resolve(&parse(text)?, &capabilities)
    }

    fn answer(text: &str, capabilities: &[&str], name: &str) -> Answer {
        let policy = policy(text, capabilities).unwrap();
        let arch = &policy.architectures[0];
        let number = Arch::X86_64.number(name).unwrap();
        arch.calls.get(&number).cloned().unwrap_or(Answer {
            cases: vec![],
            otherwise: arch.otherwise,
        })
    }

    #[test]
    fn a_rule_counts_by_capability_architecture_and_kernel() {
        let profile = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
            {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
            {"names":["clone"],"action":"SCMP_ACT_ERRNO","errnoRet":38,"excludes":{"caps":["CAP_SYS_ADMIN"]}},
            {"names":["ptrace"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
            {"names":["bpf"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"7.0"}},
            {"names":["arch_prctl"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64","x32"]}},
            {"names":["breakpoint","reboot"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"]}}]}"#;
        let said = |capabilities: &[&str], name| answer(profile, capabilities, name).otherwise;
        assert_eq!(said(&[], "mount"), Action::Errno(1));
        assert_eq!(said(&["CAP_SYS_ADMIN"], "mount"), Action::Allow);
        assert_eq!(said(&[], "clone"), Action::Errno(38));
        assert_eq!(said(&["CAP_SYS_ADMIN"], "clone"), Action::Errno(1));
        assert_eq!(said(&[], "ptrace"), Action::Allow);
        assert_eq!(said(&[], "bpf"), Action::Errno(1));
        assert_eq!(said(&[], "arch_prctl"), Action::Allow);
        assert_eq!(said(&[], "reboot"), Action::Errno(1));
    }

    #[test]
    fn a_rule_without_conditions_replaces_those_with() {
        let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["socket"],"action":"SCMP_ACT_ERRNO","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
            {"names":["socket"],"action":"SCMP_ACT_KILL"},
            {"names":["socket"],"action":"SCMP_ACT_TRAP"}]}"#;
        let answer = answer(profile, &[], "socket");
        assert_eq!((answer.cases.len(), answer.otherwise), (0, Action::KillThread));
    }

    #[test]
    fn conditions_on_one_argument_are_alternatives_on_several_they_must_all_hold() {
        let profile = |second: u8| {
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["personality"],"action":"SCMP_ACT_ERRNO","args":[
                {{"index":0,"value":1,"op":"SCMP_CMP_EQ"}},{{"index":{second},"value":2,"op":"SCMP_CMP_EQ"}}]}}]}}"#
            )
        };
        assert_eq!(answer(&profile(0), &[], "personality").cases.len(), 2);
        assert_eq!(answer(&profile(1), &[], "personality").cases.len(), 1);
    }

    #[test]
    fn a_denied_call_must_be_known_an_allowed_one_need_not() {
        let profile = |default: &str, action: &str| {
            format!(
                r#"{{"defaultAction":"{default}","syscalls":[{{"names":["sethostnam"],"action":"{action}"}}]}}"#
            )
        };
        policy(&profile("SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW"), &[]).unwrap();
        let error = policy(&profile("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"), &[]).unwrap_err();
        assert!(error.to_string().contains("\"sethostnam\""), "{error}");
    }

    #[test]
    fn what_is_newer_than_the_profile_is_not_there() {
        let policy = policy(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["close_range"],"action":"SCMP_ACT_ALLOW"}]}"#,
            &[],
        )
        .unwrap();
        let arch = &policy.architectures[0];
        assert_eq!(arch.newer_from, 437);
        assert_eq!(
            (arch.newer, arch.otherwise),
            (Action::Errno(ENOSYS), Action::Errno(EPERM))
        );
    }

    #[test]
    fn words_that_mean_nothing_are_errors_that_name_their_place() {
        let rule = |rule: &str| format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#);
        let cases = [
            ("{".to_owned(), "malformed"),
            ("{}".to_owned(), "malformed"),
            (
                r#"{"defaultAction":"SCMP_ACT_SHRUG"}"#.to_owned(),
                "defaultAction: unknown action",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":5000}"#.to_owned(),
                "errno 5000",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","defaultErrnoRet":1}"#.to_owned(),
                "has no errno",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#.to_owned(),
                "SCMP_ACT_NOTIFY is not possible",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/l"}"#.to_owned(),
                "listenerPath",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["amd64"]}"#.to_owned(),
                "architectures[0]: unknown architecture",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}"#
                    .to_owned(),
                "flags[0]",
            ),
            (rule(r#"{"action":"SCMP_ACT_KILL"}"#), "syscalls[0]: names no"),
            (
                rule(r#"{"name":"read","names":["read"],"action":"SCMP_ACT_KILL"}"#),
                "exclude each other",
            ),
            (
                rule(
                    r#"{"names":["read"],"action":"SCMP_ACT_KILL","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}"#,
                ),
                "syscalls[0].args[0]: a system call has no argument 6",
            ),
            (
                rule(
                    r#"{"names":["read"],"action":"SCMP_ACT_KILL","args":[{"index":0,"value":0,"op":"=="}]}"#,
                ),
                "unknown comparison",
            ),
            (
                rule(r#"{"names":["read"],"action":"SCMP_ACT_KILL","includes":{"minKernel":"new"}}"#),
                "syscalls[0].includes: \"new\"",
            ),
        ];
        for (text, words) in cases {
            let error = policy(&text, &[]).unwrap_err();
            assert!(error.to_string().contains(words), "{words} is not in: {error}");
        }
    }
}
