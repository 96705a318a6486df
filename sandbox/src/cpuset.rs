//! CPUs and memory nodes of the host that a pod's VM may use, as kubelet's static managers give them to containers: the VM gets what any
//! of its containers has been given. The guest numbers its own CPUs and never sees these.
//!
//! Where: in the pod's leaf with cgroup v2; in a leaf of the cpuset hierarchy with v1, which is made when it is first needed. What the host
//! does not give is an error, not a wish. Must not know which container runs where inside the guest.

use std::{collections::BTreeSet, fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    SandboxError,
    cgroup::{self, Place},
};

/// Highest number of a CPU or node, as far as kernels are built.
const HIGHEST: u32 = 8191;

/// What may be used; an empty list does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuset {
    /// CPUs, as in `0-3,8`.
    pub cpus: String,
    /// Memory nodes.
    pub mems: String,
}

impl Cpuset {
    /// Nothing is said.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cpus.is_empty() && self.mems.is_empty()
    }

    /// What `change` says, and this where it says nothing.
    #[must_use]
    pub fn changed(&self, change: &Self) -> Self {
        let pick = |new: &String, old: &String| if new.is_empty() { old } else { new }.clone();
        Self {
            cpus: pick(&change.cpus, &self.cpus),
            mems: pick(&change.mems, &self.mems),
        }
    }
}

/// Why a list is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a list of numbers and ranges up to {HIGHEST}")]
pub struct NoList(String);

/// The numbers in a list of cpuset(7).
pub fn parse(list: &str) -> Result<BTreeSet<u32>, NoList> {
    let bad = || NoList(list.to_owned());
    let number = |text: &str| {
        let number = text.trim().parse::<u32>().map_err(|_| bad())?;
        (number <= HIGHEST).then_some(number).ok_or_else(bad)
    };
    let mut all = BTreeSet::new();
    for part in list.trim().split(',').filter(|_| !list.trim().is_empty()) {
        match part.split_once('-') {
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from > to {
                    return Err(bad());
                }
                all.extend(from..=to);
            }
            None => drop(all.insert(number(part)?)),
        }
    }
    Ok(all)
}

/// The list of some numbers, as the kernel prints it.
fn print(numbers: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let text: Vec<_> = ranges
        .into_iter()
        .map(|(from, to)| {
            if from == to {
                from.to_string()
            } else {
                format!("{from}-{to}")
            }
        })
        .collect();
    text.join(",")
}

/// What any of `sets` has. Lists that are none have been refused before they came here.
pub(crate) fn union<'a>(sets: impl Iterator<Item = &'a Cpuset>) -> Cpuset {
    let (mut cpus, mut mems) = (BTreeSet::new(), BTreeSet::new());
    for set in sets {
        cpus.extend(parse(&set.cpus).unwrap_or_default());
        mems.extend(parse(&set.mems).unwrap_or_default());
    }
    Cpuset {
        cpus: print(&cpus),
        mems: print(&mems),
    }
}

/// Has the processes of a VM use `wanted` only, or whatever the pod may use where it says nothing. Blocking.
pub(crate) fn pin(place: &Place, processes: &[i32], wanted: &Cpuset, id: &str) -> Result<(), SandboxError> {
    let what = || format!("pin the VM of pod sandbox {id} to {}", describe(wanted));
    match place {
        Place::Unified { root, leaf } => unified(root, leaf, wanted, what),
        Place::Legacy(leaf) if wanted.is_empty() && !leaf.exists() => Ok(()),
        Place::Legacy(leaf) => legacy(leaf, processes, wanted, what),
        Place::Nowhere if wanted.is_empty() => Ok(()),
        Place::Nowhere => Err(SandboxError::Unmet {
            what: what(),
            reason: "the pod has no cgroup on this host with a cpuset controller".into(),
        }),
    }
}

fn describe(wanted: &Cpuset) -> String {
    let part = |name: &str, list: &str| match list {
        "" => format!("any {name}"),
        list => format!("{name} {list}"),
    };
    format!(
        "{} and {}",
        part("CPUs", &wanted.cpus),
        part("memory nodes", &wanted.mems)
    )
}

fn unified(root: &Path, leaf: &Path, wanted: &Cpuset, what: impl Fn() -> String) -> Result<(), SandboxError> {
    cgroup::enable(root, leaf, "cpuset")?;
    let mut changed = Vec::new();
    for (file, list) in [("cpuset.cpus", &wanted.cpus), ("cpuset.mems", &wanted.mems)] {
        let before = read(&leaf.join(file)).map_err(SandboxError::io(what()))?;
        if same(&before, list) {
            continue;
        }
        changed.push((file, before));
        let refused = match give(leaf, file, list) {
            Ok(None) => continue,
            Ok(Some(given)) => SandboxError::Unmet {
                what: what(),
                reason: format!("of {file} {list}, {} gives {given}", leaf.display()),
            },
            // What no CPU of any host has as its number.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::RANGE.raw_os_error()) => {
                SandboxError::Unmet {
                    what: what(),
                    reason: format!("{file} {list} is more than {} can have", leaf.display()),
                }
            }
            Err(error) => SandboxError::io(what())(error),
        };
        // All of it or nothing.
        for (file, before) in changed {
            write(&leaf.join(file), &before).map_err(SandboxError::io(what()))?;
        }
        return Err(refused);
    }
    Ok(())
}

/// Writes a list; what there is instead when that is not it: the kernel takes what it cannot give, and gives what the group above has.
fn give(leaf: &Path, file: &str, list: &str) -> io::Result<Option<String>> {
    match write(&leaf.join(file), list) {
        // A group with processes in it cannot go back to a list of its own that is empty: all that the group above has is the same.
        Err(error) if list.is_empty() && error.kind() == io::ErrorKind::StorageFull => {
            let above = leaf.parent().unwrap_or(leaf).join(format!("{file}.effective"));
            write(&leaf.join(file), &read(&above)?)?;
        }
        written => written?,
    }
    let given = read(&leaf.join(format!("{file}.effective")))?;
    Ok((!list.is_empty() && !same(&given, list)).then_some(given))
}

fn legacy(
    leaf: &Path,
    processes: &[i32],
    wanted: &Cpuset,
    what: impl Fn() -> String,
) -> Result<(), SandboxError> {
    let io = |error| SandboxError::io(what())(error);
    match fs::create_dir(leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io(error)),
        _ => {}
    }
    let above = leaf.parent().unwrap_or(leaf);
    let mut lists = Vec::new();
    for (file, list) in [("cpuset.cpus", &wanted.cpus), ("cpuset.mems", &wanted.mems)] {
        let may = read(&above.join(file)).map_err(io)?;
        let list = if list.is_empty() {
            may.clone()
        } else {
            list.clone()
        };
        if !parse(&list)
            .unwrap_or_default()
            .is_subset(&parse(&may).unwrap_or_default())
        {
            return Err(SandboxError::Unmet {
                what: what(),
                reason: format!("of {file} {list}, {} gives {may}", above.display()),
            });
        }
        lists.push((file, list));
    }
    for (file, list) in lists {
        write(&leaf.join(file), &list).map_err(io)?;
    }
    for pid in processes {
        match fs::write(leaf.join("cgroup.procs"), pid.to_string()) {
            // It ends at this moment, and the VM with it.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.map_err(io)?,
        }
    }
    Ok(())
}

fn read(file: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(file)?.trim().to_owned())
}

/// An empty list takes a line of its own to be written.
fn write(file: &Path, list: &str) -> io::Result<()> {
    fs::write(file, format!("{list}\n"))
}

fn same(one: &str, other: &str) -> bool {
    parse(one) == parse(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn lists_are_read_and_printed_as_the_kernel_does() {
        for (list, printed) in [
            ("", ""),
            ("0", "0"),
            ("0-3,8", "0-3,8"),
            ("3,2,1,7-7", "1-3,7"),
            ("0-1,1-4\n", "0-4"),
        ] {
            assert_eq!(print(&parse(list).unwrap()), printed, "{list:?}");
        }
        for bad in ["a", "1-", "-1", "4-2", "0,,1", "8192", "0-4294967295", "1-2-3"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_vm_may_use_what_any_container_may() {
        let set = |cpus: &str, mems: &str| Cpuset {
            cpus: cpus.into(),
            mems: mems.into(),
        };
        let sets = [set("0-1", ""), set("", ""), set("4", "0")];
        assert_eq!(union(sets.iter()), set("0-1,4", "0"));
        assert_eq!(union([].iter()), Cpuset::default());
        assert_eq!(set("1", "0").changed(&set("2", "")), set("2", "0"));
    }

    /// A directory with the files of a v1 group.
    fn group(above: &Path, name: &str, cpus: &str) -> PathBuf {
        let group = above.join(name);
        fs::create_dir(&group).unwrap();
        fs::write(group.join("cpuset.cpus"), cpus).unwrap();
        fs::write(group.join("cpuset.mems"), "0\n").unwrap();
        group
    }

    #[test]
    fn a_leaf_of_the_older_hierarchy_has_what_is_wanted_or_what_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = group(dir.path(), "root", "0-3\n");
        let pod = group(&root, "pod", "0-3\n");
        let leaf = group(&pod, "leaf", "");
        let place = Place::Legacy(leaf.clone());
        let wanted = |cpus: &str| Cpuset {
            cpus: cpus.into(),
            mems: String::new(),
        };
        let cpus = || read(&leaf.join("cpuset.cpus")).unwrap();
        pin(&place, &[77], &wanted("1-2"), "p").unwrap();
        assert_eq!(
            (cpus().as_str(), read(&leaf.join("cgroup.procs")).unwrap()),
            ("1-2", "77".into())
        );
        let error = pin(&place, &[77], &wanted("2-5"), "p").unwrap_err();
        assert!(error.to_string().contains("of cpuset.cpus 2-5"), "{error}");
        // One list that cannot be had leaves the other as it was, too.
        let both = Cpuset {
            cpus: "3".into(),
            mems: "7".into(),
        };
        let error = pin(&place, &[77], &both, "p").unwrap_err();
        assert!(error.to_string().contains("of cpuset.mems 7"), "{error}");
        assert_eq!(cpus(), "1-2");
        pin(&place, &[77], &wanted(""), "p").unwrap();
        assert_eq!(cpus(), "0-3");
    }

    #[test]
    fn without_a_group_only_nothing_can_be_wanted() {
        pin(&Place::Nowhere, &[], &Cpuset::default(), "p").unwrap();
        let wanted = Cpuset {
            cpus: "0".into(),
            mems: String::new(),
        };
        let error = pin(&Place::Nowhere, &[], &wanted, "p").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot pin the VM of pod sandbox p to CPUs 0 and any memory nodes"),
            "{error}"
        );
    }
}
