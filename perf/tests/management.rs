//! `cryptfold-perf management` from outside: every method of its mix is called and answered while a volume is loaded. How
//! fast is no matter of this test.

use std::process::Command;

use serde_json::Value;

#[test]
fn every_call_is_answered_beside_the_load() {
    let out = Command::new(env!("CARGO_BIN_EXE_cryptfold-perf"))
        .args(["management", "--disk-size", "512M", "--volume-size", "64M", "--json"])
        .args(["--rw", "randrw", "--iodepth", "16", "--runtime", "2", "--ramp-time", "0", "--verify"])
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(report["load"]["ios"].as_u64() > Some(0) && report["load"]["errors"] == 0, "{report}");
    assert!(report["load"]["verify"]["checked"].as_u64() > Some(0), "{report}");
    let rounds = report["rounds"].as_u64().expect("a number");
    let methods = report["methods"].as_object().expect("an object");
    for (method, per_round) in [
        ("bdev_malloc_create", 1),
        ("bdev_malloc_delete", 1),
        ("nvmf_create_subsystem", 1),
        ("nvmf_delete_subsystem", 1),
        ("nvmf_subsystem_add_ns", 2),
        ("nvmf_subsystem_remove_ns", 2),
        ("bdev_lvol_create", 1),
        ("bdev_lvol_snapshot", 1),
        ("bdev_lvol_delete", 2),
        ("sock_impl_set_options", 1),
        ("bdev_nvme_set_options", 1),
        ("bdev_get_bdevs", 1),
    ] {
        assert_eq!(methods[method]["calls"], per_round * rounds, "{method}");
    }
    let calls: u64 = methods.values().filter_map(|m| m["calls"].as_u64()).sum();
    assert_eq!(report["all"]["calls"], calls);
}
