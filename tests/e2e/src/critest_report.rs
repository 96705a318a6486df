//! critest's reports: each spec's name and state, and tables of them, group by group.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};
use serde_json::Value;

/// Groups whose specs are about several things.
const SPLIT: [&str; 3] = ["Container", "PodSandbox", "Security Context"];

/// How a spec ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// As it should.
    Passed,
    /// Not as it should.
    Failed,
    /// By critest itself.
    Skipped,
}

/// One spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// All of its texts, as critest prints them.
    pub name: String,
    /// What it is about.
    pub group: String,
    /// How it ended.
    pub state: State,
    /// How often it was tried.
    pub attempts: u64,
}

/// The specs of a JSON report.
pub fn read(path: &Path) -> Result<Vec<Spec>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let report: Value = serde_json::from_slice(&bytes)?;
    let specs = report[0]["SpecReports"]
        .as_array()
        .context("a report without specs")?;
    Ok(specs
        .iter()
        .filter(|spec| spec["LeafNodeType"] == "It")
        .map(spec)
        .collect())
}

fn spec(report: &Value) -> Spec {
    let texts: Vec<&str> = report["ContainerHierarchyTexts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let leaf = report["LeafNodeText"].as_str().unwrap_or_default();
    Spec {
        name: [&texts[..], &[leaf]].concat().join(" "),
        group: group(&texts),
        state: match report["State"].as_str() {
            Some("passed") => State::Passed,
            Some("skipped" | "pending") => State::Skipped,
            _ => State::Failed,
        },
        attempts: report["NumAttempts"].as_u64().unwrap_or(1),
    }
}

fn group(texts: &[&str]) -> String {
    let plain = |text: &str| {
        text.replace("[k8s.io] ", "")
            .replace(" [Conformance]", "")
            .replace("runtime should support ", "")
    };
    let first = texts.first().map(|text| plain(text)).unwrap_or_default();
    match texts.get(1) {
        Some(second) if second.starts_with("benchmark") => "benchmarks".into(),
        Some(second) if SPLIT.contains(&first.as_str()) => format!("{first}: {}", plain(second)),
        _ => first,
    }
}

/// A Markdown table: a line for each group, and for each runtime how many of it passed, failed, and were skipped.
#[must_use]
pub fn table(runtimes: &[(String, Vec<Spec>)]) -> String {
    let mut groups: BTreeMap<&str, Vec<[usize; 3]>> = BTreeMap::new();
    for (column, (_, specs)) in runtimes.iter().enumerate() {
        for spec in specs {
            for group in [spec.group.as_str(), "~"] {
                let counts = groups
                    .entry(group)
                    .or_insert_with(|| vec![[0; 3]; runtimes.len()]);
                counts[column][spec.state as usize] += 1;
            }
        }
    }
    let names: String = runtimes.iter().map(|(name, _)| format!(" {name} |")).collect();
    let mut text = format!(
        "| group (passed/failed/skipped) |{names}\n|---|{}\n",
        "---:|".repeat(runtimes.len())
    );
    for (group, counts) in groups {
        let cells: String = counts
            .iter()
            .map(|[passed, failed, skipped]| format!(" {passed}/{failed}/{skipped} |"))
            .collect();
        let group = if group == "~" { "**all**" } else { group };
        text.push_str(&format!("| {group} |{cells}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_counted_by_what_they_are_about() {
        let spec = |texts: &[&str], state: &str| {
            super::spec(&serde_json::json!({
                "ContainerHierarchyTexts": texts, "LeafNodeText": "works", "State": state,
            }))
        };
        let ours = vec![
            spec(&["[k8s.io] Container", "runtime should support log"], "passed"),
            spec(
                &["[k8s.io] Container", "benchmark about operations on Container"],
                "skipped",
            ),
            spec(
                &[
                    "[k8s.io] Streaming",
                    "runtime should support streaming interfaces",
                ],
                "failed",
            ),
        ];
        assert_eq!(
            ours[0].name,
            "[k8s.io] Container runtime should support log works"
        );
        let text = table(&[
            ("ours".into(), ours.clone()),
            ("theirs".into(), ours[..1].to_vec()),
        ]);
        for line in [
            "| Container: log | 1/0/0 | 1/0/0 |",
            "| benchmarks | 0/0/1 | 0/0/0 |",
            "| Streaming | 0/1/0 | 0/0/0 |",
            "| **all** | 1/1/1 | 1/0/0 |",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
