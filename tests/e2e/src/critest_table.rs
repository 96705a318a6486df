//! critest's report as the table of docs/conformance.md: one line for each group of specs. What stands there for other runtimes is kept.

use std::collections::BTreeMap;

use serde_json::Value;

/// First line of the table.
const HEAD: &str = "| specs | of | Caisson | containerd |\n|---|---|---|---|\n";

/// Groups whose parts are not told apart.
const WHOLE: [&str; 3] = ["AppArmor", "Idempotence", "Multiple Containers"];

/// How the specs of a group went.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// The table of a report in ginkgo's JSON; `before` is the page that has the one before.
#[must_use]
pub fn table(report: &Value, before: &str) -> String {
    let mut groups: BTreeMap<String, Count> = BTreeMap::new();
    let mut all = Count::default();
    let specs = report[0]["SpecReports"].as_array().into_iter().flatten();
    for spec in specs.filter(|spec| spec["LeafNodeType"] == "It") {
        let group = groups.entry(group(spec)).or_default();
        for count in [group, &mut all] {
            match spec["State"].as_str() {
                Some("passed") => count.passed += 1,
                Some("skipped" | "pending") => count.skipped += 1,
                _ => count.failed += 1,
            }
        }
    }
    let mut text = HEAD.to_owned();
    for (name, count) in &groups {
        text += &line(name, *count, other(before, name));
    }
    text + &line("**all**", all, other(before, "**all**"))
}

fn group(spec: &Value) -> String {
    let words: Vec<&str> = spec["ContainerHierarchyTexts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let first = words.first().copied().unwrap_or("others");
    let first = first
        .trim_start_matches("[k8s.io] ")
        .trim_end_matches(" [Conformance]");
    let second = words.get(1).copied().unwrap_or_default();
    let second = second
        .trim_start_matches("runtime should support ")
        .trim_start_matches("runtime should ");
    if second.is_empty() || WHOLE.contains(&first) {
        first.to_owned()
    } else {
        format!("{first}: {second}")
    }
}

fn line(name: &str, count: Count, other: &str) -> String {
    let Count {
        passed,
        failed,
        skipped,
    } = count;
    let of = passed + failed + skipped;
    let mut words = vec![format!("{passed} passed")];
    if failed > 0 {
        words.push(format!("{failed} failed"));
    }
    if skipped > 0 {
        words.push(format!("{skipped} skipped"));
    }
    if passed == 0 {
        words.remove(0);
    }
    format!("| {name} | {of} | {} | {other} |\n", words.join(", "))
}

/// What the page says in the last column of a group's line.
fn other<'a>(page: &'a str, name: &str) -> &'a str {
    page.lines()
        .find_map(|line| line.strip_prefix(&format!("| {name} |")))
        .and_then(|rest| rest.trim_end_matches('|').rsplit('|').next())
        .map_or("", str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(words: &[&str], state: &str) -> Value {
        json!({"LeafNodeType": "It", "ContainerHierarchyTexts": words, "LeafNodeText": "does", "State": state})
    }

    #[test]
    fn groups_are_counted_and_what_others_have_stays() {
        let report = json!([{"SpecReports": [
            {"LeafNodeType": "BeforeSuite"},
            spec(&["[k8s.io] Networking", "runtime should support networking"], "passed"),
            spec(&["[k8s.io] Networking", "runtime should support networking"], "failed"),
            spec(&["[k8s.io] AppArmor", "runtime should support apparmor field"], "skipped"),
            spec(&["[k8s.io] AppArmor", "runtime should prefer new apparmor field"], "skipped"),
        ]}]);
        let before = "# Page\n| Networking: networking | 9 | 1 passed | 2 passed |\n";
        assert_eq!(
            table(&report, before),
            "| specs | of | Caisson | containerd |\n|---|---|---|---|\n\
             | AppArmor | 2 | 2 skipped |  |\n\
             | Networking: networking | 2 | 1 passed, 1 failed | 2 passed |\n\
             | **all** | 4 | 1 passed, 1 failed, 2 skipped |  |\n"
        );
    }
}
