//! `cryptfold-perf steady` in virtual time.

use std::process::Command;

fn steady(seed: &str) -> String {
    let args = ["steady", "--modelled", "--size", "256M", "--memory", "24M", "--minutes", "0.1", "--json"];
    let run = Command::new(env!("CARGO_BIN_EXE_cryptfold-perf")).args(args).args(["--seed", seed]).output();
    let run = run.expect("the program starts");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).expect("JSON")
}

#[test]
fn a_full_pool_collects_and_an_emptier_one_does_not() {
    let report: serde_json::Value = serde_json::from_str(&steady("7")).expect("JSON");
    let phase = |name: &str| {
        let phases = report["phases"].as_array().expect("phases");
        phases.iter().find(|phase| phase["name"] == name).unwrap_or_else(|| panic!("no phase {name}")).clone()
    };
    let (paced, alone) = (phase("paced"), phase("paced, no collection"));
    assert!(paced["moved_bytes"].as_u64() > Some(0), "{paced}");
    assert_eq!(alone["moved_bytes"].as_u64(), Some(0), "{alone}");
    assert!(paced["write_amplification"].as_f64() > Some(1.5), "{paced}");
    assert!(report["verified_blocks"].as_u64() > Some(10_000), "{report}");
}
