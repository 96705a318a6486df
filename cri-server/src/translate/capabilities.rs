//! Capabilities of a container: the OCI default set, what the pod adds and drops, and the ambient ones.

use caisson_cri_api::v1;
use caisson_sandbox::{capabilities::NAMES as ALL, guest};

use super::Refusals;

/// What a container has when it asks for nothing: the set that Docker, containerd and CRI-O agree on for years.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A request's list: whether it says ALL, and the single names.
struct Wanted {
    all: bool,
    names: Vec<&'static str>,
}

/// The sets a container runs with. ALL is applied before single names, adding before dropping.
pub(super) fn capabilities(
    config: Option<&v1::Capability>,
    privileged: bool,
    field: &str,
    refusals: &mut Refusals,
) -> guest::Capabilities {
    let absent = v1::Capability::default();
    let config = config.unwrap_or(&absent);
    let add = wanted(
        &config.add_capabilities,
        &format!("{field}.add_capabilities"),
        refusals,
    );
    let drop = wanted(
        &config.drop_capabilities,
        &format!("{field}.drop_capabilities"),
        refusals,
    );
    let ambient = wanted(
        &config.add_ambient_capabilities,
        &format!("{field}.add_ambient_capabilities"),
        refusals,
    );

    if privileged {
        return sets(ALL.to_vec(), expand(&ambient));
    }
    let mut set: Vec<&'static str> = match (add.all, drop.all) {
        (_, true) => Vec::new(),
        (true, false) => ALL.to_vec(),
        (false, false) => DEFAULT.to_vec(),
    };
    let ambient = expand(&ambient);
    for name in add.names.into_iter().chain(ambient.iter().copied()) {
        if !set.contains(&name) {
            set.push(name);
        }
    }
    set.retain(|name| !drop.names.contains(name));
    let ambient = ambient.into_iter().filter(|name| set.contains(name)).collect();
    sets(set, ambient)
}

fn expand(wanted: &Wanted) -> Vec<&'static str> {
    if wanted.all {
        ALL.to_vec()
    } else {
        wanted.names.clone()
    }
}

/// Nothing is inheritable but what is ambient: other inheritable sets let file capabilities grow (CVE-2022-24769).
fn sets(permitted: Vec<&'static str>, ambient: Vec<&'static str>) -> guest::Capabilities {
    let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    guest::Capabilities {
        bounding: own(&permitted),
        effective: own(&permitted),
        permitted: own(&permitted),
        inheritable: own(&ambient),
        ambient: own(&ambient),
    }
}

fn wanted(list: &[String], field: &str, refusals: &mut Refusals) -> Wanted {
    let mut wanted = Wanted {
        all: false,
        names: Vec::new(),
    };
    for (index, text) in list.iter().enumerate() {
        let upper = text.to_ascii_uppercase();
        if upper == "ALL" {
            wanted.all = true;
            continue;
        }
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        match ALL.iter().find(|known| known.strip_prefix("CAP_") == Some(short)) {
            Some(name) if !wanted.names.contains(name) => wanted.names.push(name),
            Some(_) => {}
            None => refusals.add(
                format!("{field}[{index}]"),
                format!("unknown capability {text:?}"),
            ),
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounding(add: &[&str], drop: &[&str], privileged: bool) -> Vec<String> {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        let config = v1::Capability {
            add_capabilities: own(add),
            drop_capabilities: own(drop),
            add_ambient_capabilities: vec![],
        };
        let mut refusals = Refusals::default();
        let sets = capabilities(Some(&config), privileged, "c", &mut refusals);
        refusals.settle(()).unwrap();
        assert!(sets.inheritable.is_empty() && sets.ambient.is_empty());
        assert_eq!(sets.bounding, sets.effective);
        sets.bounding
    }

    #[test]
    fn adding_and_dropping_follows_the_order_of_containerd() {
        assert_eq!(bounding(&[], &[], false).len(), DEFAULT.len());
        assert!(bounding(&["NET_ADMIN"], &[], false).contains(&"CAP_NET_ADMIN".into()));
        assert!(bounding(&["cap_sys_admin"], &[], false).contains(&"CAP_SYS_ADMIN".into()));
        assert!(!bounding(&[], &["CHOWN"], false).contains(&"CAP_CHOWN".into()));
        assert_eq!(bounding(&["ALL"], &[], false).len(), ALL.len());
        assert_eq!(bounding(&["ALL"], &["NET_RAW"], false).len(), ALL.len() - 1);
        assert!(bounding(&[], &["ALL"], false).is_empty());
        assert_eq!(bounding(&["NET_RAW"], &["ALL"], false), ["CAP_NET_RAW"]);
        assert_eq!(bounding(&[], &["ALL"], true).len(), ALL.len());
    }

    #[test]
    fn an_ambient_capability_is_in_every_set() {
        let config = v1::Capability {
            add_ambient_capabilities: vec!["NET_ADMIN".into()],
            ..Default::default()
        };
        let mut refusals = Refusals::default();
        let sets = capabilities(Some(&config), false, "c", &mut refusals);
        for set in [
            &sets.bounding,
            &sets.effective,
            &sets.permitted,
            &sets.inheritable,
            &sets.ambient,
        ] {
            assert!(set.contains(&"CAP_NET_ADMIN".to_owned()));
        }
        assert_eq!(sets.ambient.len(), 1);
    }

    #[test]
    fn an_unknown_capability_is_refused_by_its_place() {
        let config = v1::Capability {
            drop_capabilities: vec!["CHOWN".into(), "FLY".into()],
            ..Default::default()
        };
        let mut refusals = Refusals::default();
        let _ = capabilities(Some(&config), false, "c", &mut refusals);
        assert_eq!(
            refusals.to_string(),
            "c.drop_capabilities[1]: unknown capability \"FLY\""
        );
    }
}
