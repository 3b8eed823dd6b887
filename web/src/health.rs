//! Whether the target does its work.

use serde_json::{Value, json};

use crate::sample::{Sample, list};

/// What is wrong, one line each; nothing: healthy.
pub fn problems(s: &Sample) -> Vec<String> {
    if !s.is_running() {
        return vec!["not initialised".into()];
    }
    let failed = list(&s.pools).iter().filter(|p| !p["failed"].is_null());
    failed.map(|p| format!("pool {}: {}", name(&p["name"]), name(&p["failed"]))).collect()
}

fn name(v: &Value) -> String {
    v.as_str().map_or_else(|| v.to_string(), str::to_owned)
}

/// The answer's body.
pub fn body(problems: &[String]) -> String {
    let status = if problems.is_empty() { "ok" } else { "failing" };
    format!("{}\n", json!({"status": status, "problems": problems}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_that_stopped_is_a_problem_and_so_is_a_target_before_its_start() {
        let mut s = Sample::default();
        assert_eq!(problems(&s), ["not initialised"]);
        s.iostat = json!({"bdevs": []});
        assert!(problems(&s).is_empty());
        s.pools = json!([{"name": "p", "failed": null}, {"name": "q", "failed": "the device is gone"}]);
        assert_eq!(problems(&s), ["pool q: the device is gone"]);
        assert!(body(&problems(&s)).contains("\"failing\""));
    }
}
