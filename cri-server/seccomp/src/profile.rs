//! The profile as it is written: JSON of the OCI runtime specification or of Docker. No meaning is given to it here but that of words.

use serde::Deserialize;

use crate::error::SeccompError;

/// EPERM, what an errno action answers when the profile names no other.
pub(crate) const EPERM: u16 = 1;

/// Largest errno that a kernel passes on.
const MAX_ERRNO: u32 = 4095;

/// Most conditions and rules that are read; far above any profile there is.
const MAX_RULES: usize = 8192;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    arch_map: Vec<RawArchMap>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    listener_path: String,
    #[serde(default)]
    syscalls: Option<Vec<RawRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawArchMap {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRule {
    #[serde(default)]
    names: Vec<String>,
    /// Docker's older form.
    #[serde(default)]
    name: String,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<RawCondition>>,
    #[serde(default)]
    includes: RawWhen,
    #[serde(default)]
    excludes: RawWhen,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawCondition {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawWhen {
    #[serde(default)]
    caps: Vec<String>,
    #[serde(default)]
    arches: Vec<String>,
    #[serde(default)]
    min_kernel: String,
}

/// What a filter answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    KillProcess,
    KillThread,
    Trap,
    Errno(u16),
    Trace(u16),
    Log,
    Allow,
}

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compare {
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    /// Equal after the mask is applied.
    Masked(u64),
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Condition {
    /// 0 to 5.
    pub(crate) argument: u8,
    pub(crate) compare: Compare,
    pub(crate) value: u64,
}

/// A rule as written.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    /// Where it is, for errors.
    pub(crate) field: String,
    pub(crate) names: Vec<String>,
    pub(crate) action: Action,
    /// All must hold; those on one argument that repeats are alternatives instead (see [`crate::policy`]).
    pub(crate) conditions: Vec<Condition>,
    pub(crate) includes: When,
    pub(crate) excludes: When,
}

/// When a rule counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct When {
    pub(crate) capabilities: Vec<String>,
    pub(crate) architectures: Vec<String>,
    /// Major and minor.
    pub(crate) min_kernel: Option<(u32, u32)>,
}

/// A profile whose words are all known.
#[derive(Debug, Clone)]
pub(crate) struct Profile {
    pub(crate) default_action: Action,
    /// 32-bit programs are covered.
    pub(crate) x86: bool,
    pub(crate) rules: Vec<Rule>,
    /// SECCOMP_FILTER_FLAG_*.
    pub(crate) flags: u32,
}

pub(crate) fn parse(text: &str) -> Result<Profile, SeccompError> {
    let raw: Raw = serde_json::from_str(text)?;
    if !raw.listener_path.is_empty() {
        return Err(SeccompError::value(
            "listenerPath",
            "notifications are not possible: the listener would be on the host, the process in a VM",
        ));
    }
    if !raw.arch_map.is_empty() && !raw.architectures.is_empty() {
        return Err(SeccompError::value(
            "archMap",
            "architectures and archMap exclude each other",
        ));
    }
    let list = raw.syscalls.unwrap_or_default();
    let size: usize = list
        .iter()
        .map(|rule| 1 + rule.names.len() + rule.args.as_ref().map_or(0, Vec::len))
        .fold(0, usize::saturating_add);
    if size > MAX_RULES {
        return Err(SeccompError::value(
            "syscalls",
            format!("more than {MAX_RULES} names and conditions"),
        ));
    }
    let rules = list
        .into_iter()
        .enumerate()
        .map(|(index, raw)| rule(raw, format!("syscalls[{index}]")))
        .collect::<Result<_, _>>()?;
    Ok(Profile {
        default_action: action(&raw.default_action, raw.default_errno_ret, "defaultAction")?,
        x86: covers_x86(&raw.architectures, &raw.arch_map)?,
        rules,
        flags: flags(&raw.flags)?,
    })
}

/// Every architecture must be spelt as one that there is; only those of this machine matter.
fn covers_x86(list: &[String], map: &[RawArchMap]) -> Result<bool, SeccompError> {
    let known = |field: String, name: &str| match name.strip_prefix("SCMP_ARCH_") {
        Some(rest) if !rest.is_empty() => Ok(name == "SCMP_ARCH_X86"),
        _ => Err(SeccompError::value(
            field,
            format!("unknown architecture {name:?}"),
        )),
    };
    let mut covered = false;
    for (index, name) in list.iter().enumerate() {
        covered |= known(format!("architectures[{index}]"), name)?;
    }
    for (index, entry) in map.iter().enumerate() {
        let field = format!("archMap[{index}]");
        known(field.clone(), &entry.architecture)?;
        for sub in entry.sub_architectures.iter().flatten() {
            // Of another machine's: none of ours.
            covered |= known(field.clone(), sub)? && entry.architecture == "SCMP_ARCH_X86_64";
        }
    }
    Ok(covered)
}

fn flags(list: &[String]) -> Result<u32, SeccompError> {
    let mut flags = 0;
    for (index, name) in list.iter().enumerate() {
        flags |= match name.as_str() {
            // The process has a single thread when its filter is installed.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_LOG" => 2,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
            other => {
                return Err(SeccompError::value(
                    format!("flags[{index}]"),
                    format!("{other:?} is not possible"),
                ));
            }
        };
    }
    Ok(flags)
}

fn action(name: &str, errno: Option<u32>, field: &str) -> Result<Action, SeccompError> {
    let number = || {
        let errno = errno.unwrap_or(u32::from(EPERM));
        u16::try_from(errno)
            .ok()
            .filter(|_| errno <= MAX_ERRNO)
            .ok_or_else(|| SeccompError::value(field, format!("errno {errno} is over {MAX_ERRNO}")))
    };
    let action = match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_ERRNO" => return Ok(Action::Errno(number()?)),
        "SCMP_ACT_TRACE" => return Ok(Action::Trace(number()?)),
        "SCMP_ACT_LOG" => Action::Log,
        "SCMP_ACT_ALLOW" => Action::Allow,
        "SCMP_ACT_NOTIFY" => {
            return Err(SeccompError::value(
                field,
                "SCMP_ACT_NOTIFY is not possible: the listener would be on the host, the process in a VM",
            ));
        }
        other => return Err(SeccompError::value(field, format!("unknown action {other:?}"))),
    };
    if errno.is_some() {
        return Err(SeccompError::value(field, format!("{name} has no errno")));
    }
    Ok(action)
}

fn rule(raw: RawRule, field: String) -> Result<Rule, SeccompError> {
    let mut names = raw.names;
    if !raw.name.is_empty() {
        if !names.is_empty() {
            return Err(SeccompError::value(field, "name and names exclude each other"));
        }
        names.push(raw.name);
    }
    if names.is_empty() {
        return Err(SeccompError::value(field, "names no system call"));
    }
    let conditions = raw
        .args
        .unwrap_or_default()
        .iter()
        .enumerate()
        .map(|(index, raw)| condition(raw, &format!("{field}.args[{index}]")))
        .collect::<Result<_, _>>()?;
    Ok(Rule {
        action: action(&raw.action, raw.errno_ret, &format!("{field}.action"))?,
        conditions,
        includes: when(raw.includes, &format!("{field}.includes"))?,
        excludes: when(raw.excludes, &format!("{field}.excludes"))?,
        names,
        field,
    })
}

fn condition(raw: &RawCondition, field: &str) -> Result<Condition, SeccompError> {
    let argument = u8::try_from(raw.index)
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| SeccompError::value(field, format!("a system call has no argument {}", raw.index)))?;
    let (compare, value) = match raw.op.as_str() {
        "SCMP_CMP_NE" => (Compare::NotEqual, raw.value),
        "SCMP_CMP_LT" => (Compare::Less, raw.value),
        "SCMP_CMP_LE" => (Compare::LessOrEqual, raw.value),
        "SCMP_CMP_EQ" => (Compare::Equal, raw.value),
        "SCMP_CMP_GE" => (Compare::GreaterOrEqual, raw.value),
        "SCMP_CMP_GT" => (Compare::Greater, raw.value),
        "SCMP_CMP_MASKED_EQ" if raw.value_two & !raw.value != 0 => {
            return Err(SeccompError::value(
                field,
                "valueTwo has bits that the mask has not",
            ));
        }
        "SCMP_CMP_MASKED_EQ" => (Compare::Masked(raw.value), raw.value_two),
        other => {
            return Err(SeccompError::value(
                field,
                format!("unknown comparison {other:?}"),
            ));
        }
    };
    Ok(Condition {
        argument,
        compare,
        value,
    })
}

fn when(raw: RawWhen, field: &str) -> Result<When, SeccompError> {
    let min_kernel = if raw.min_kernel.is_empty() {
        None
    } else {
        let parsed = raw.min_kernel.split_once('.').and_then(|(major, minor)| {
            let minor = minor.split('.').next()?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        Some(parsed.ok_or_else(|| {
            SeccompError::value(field, format!("{:?} is not a kernel version", raw.min_kernel))
        })?)
    };
    Ok(When {
        capabilities: raw.caps,
        architectures: raw.arches,
        min_kernel,
    })
}
