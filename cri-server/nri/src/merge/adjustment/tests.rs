use super::*;
use crate::v1alpha1::{
    KeyValue, LinuxContainerUpdate, LinuxCpu, LinuxMemory, LinuxResources, Mount, OptionalInt, OptionalInt64,
    OptionalUInt64,
};

fn creation() -> Creation {
    Creation::new(Container {
        id: "c".into(),
        env: vec!["PATH=/bin".into(), "A=1".into()],
        args: vec!["sh".into()],
        annotations: [("kept".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    })
}

fn env(pairs: &[(&str, &str)]) -> ContainerAdjustment {
    ContainerAdjustment {
        env: pairs
            .iter()
            .map(|(key, value)| KeyValue {
                key: (*key).into(),
                value: (*value).into(),
            })
            .collect(),
        ..Default::default()
    }
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment {
        linux: Some(linux),
        ..Default::default()
    }
}

fn limit(bytes: i64) -> LinuxResources {
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: Some(OptionalInt64 { value: bytes }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn update(id: &str, resources: LinuxResources, ignore_failure: bool) -> ContainerUpdate {
    ContainerUpdate {
        container_id: id.into(),
        linux: Some(LinuxContainerUpdate {
            resources: Some(resources),
        }),
        ignore_failure,
    }
}

#[test]
fn each_plugin_sees_what_those_before_it_have_asked() {
    let mut creation = creation();
    creation
        .add("00-a", Some(&env(&[("A", "2"), ("B", "3")])), vec![])
        .unwrap();
    assert_eq!(creation.container.env, ["PATH=/bin", "A=2", "B=3"]);
    let more = ContainerAdjustment {
        annotations: [
            ("x".to_owned(), "y".to_owned()),
            ("-kept".to_owned(), String::new()),
        ]
        .into(),
        args: vec!["true".into()],
        mounts: vec![Mount {
            destination: "/m".into(),
            ..Default::default()
        }],
        ..env(&[("-PATH", "")])
    };
    creation.add("10-b", Some(&more), vec![]).unwrap();
    assert_eq!(creation.container.env, ["A=2", "B=3"]);
    assert_eq!(creation.container.args, ["true"]);
    assert_eq!(creation.container.annotations.keys().collect::<Vec<_>>(), ["x"]);
    assert_eq!(creation.container.mounts.len(), 1);
    let (adjust, _) = creation.finish();
    let keys: Vec<_> = adjust.env.iter().map(|variable| variable.key.as_str()).collect();
    assert_eq!(keys, ["A", "B", "-PATH"]);
    assert_eq!(adjust.annotations.keys().collect::<Vec<_>>(), ["-kept", "x"]);
}

#[test]
fn two_plugins_that_change_one_thing_conflict_with_both_names() {
    for more in [
        env(&[("A", "2")]),
        ContainerAdjustment {
            args: vec!["x".into()],
            ..Default::default()
        },
        linux(LinuxContainerAdjustment {
            oom_score_adj: Some(OptionalInt { value: 1 }),
            ..Default::default()
        }),
        linux(LinuxContainerAdjustment {
            resources: Some(limit(1)),
            ..Default::default()
        }),
        linux(LinuxContainerAdjustment {
            sysctl: [("net.x".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }),
    ] {
        let mut creation = creation();
        creation.add("00-a", Some(&more), vec![]).unwrap();
        creation.add("00-a", Some(&more), vec![]).unwrap();
        let error = creation.add("10-b", Some(&more), vec![]).unwrap_err().to_string();
        assert!(error.contains("00-a") && error.contains("10-b"), "{error}");
    }
    let mut creation = creation();
    creation.add("00-a", Some(&env(&[("A", "2")])), vec![]).unwrap();
    let error = creation
        .add("10-b", Some(&env(&[("A", "3")])), vec![])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "NRI plugins 00-a and 10-b both change env \"A\" of container c"
    );
}

#[test]
fn who_takes_a_change_away_may_make_it_anew() {
    let mut creation = creation();
    creation.add("00-a", Some(&env(&[("A", "2")])), vec![]).unwrap();
    creation
        .add("10-b", Some(&env(&[("-A", ""), ("A", "3")])), vec![])
        .unwrap();
    let args = |words: &[&str]| ContainerAdjustment {
        args: words.iter().map(|word| (*word).to_owned()).collect(),
        ..Default::default()
    };
    creation.add("00-a", Some(&args(&["x"])), vec![]).unwrap();
    creation
        .add("10-b", Some(&args(&["", "y", "z"])), vec![])
        .unwrap();
    assert_eq!(creation.container.args, ["y", "z"]);
    let (_, _, owners) = creation.asked();
    let owners = &owners.owners["c"];
    assert_eq!(owners.simple[&(Field::Args as i32)], "10-b");
    assert_eq!(owners.compound[&(Field::Env as i32)].owners["A"], "10-b");
    let (adjust, _) = creation.finish();
    let last = adjust.env.last().unwrap();
    assert_eq!((last.key.as_str(), last.value.as_str()), ("A", "3"));
}

#[test]
fn different_resources_of_different_plugins_come_together() {
    let mut creation = creation();
    let shares = LinuxResources {
        cpu: Some(LinuxCpu {
            shares: Some(OptionalUInt64 { value: 7 }),
            ..Default::default()
        }),
        ..Default::default()
    };
    for (plugin, resources) in [("00-a", limit(5)), ("10-b", shares)] {
        let more = linux(LinuxContainerAdjustment {
            resources: Some(resources),
            ..Default::default()
        });
        creation.add(plugin, Some(&more), vec![]).unwrap();
    }
    let (adjust, _) = creation.finish();
    let resources = adjust.linux.unwrap().resources.unwrap();
    assert_eq!(resources.memory.unwrap().limit.unwrap().value, 5);
    assert_eq!(resources.cpu.unwrap().shares.unwrap().value, 7);
}

#[test]
fn an_update_that_may_fail_gives_way_and_one_of_the_new_container_is_an_error() {
    let mut creation = creation();
    creation
        .add("00-a", None, vec![update("other", limit(1), false)])
        .unwrap();
    creation
        .add("10-b", None, vec![update("other", limit(2), true)])
        .unwrap();
    let error = creation.add("10-b", None, vec![update("other", limit(2), false)]);
    assert!(matches!(error, Err(NriError::Conflict { .. })), "{error:?}");
    let error = creation.add("10-b", None, vec![update("c", limit(2), true)]);
    assert!(matches!(error, Err(NriError::SelfUpdate { .. })), "{error:?}");
    let (_, updates) = creation.finish();
    assert_eq!(updates, [update("other", limit(1), false)]);
}
