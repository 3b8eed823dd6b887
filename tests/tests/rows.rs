//! The table of `README.md` against the code: 19 classes, and every file and test that it names exists and runs.

use std::path::Path;

#[test]
fn every_test_of_the_table_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("tests/README.md")).expect("the table");
    let rows: Vec<&str> = text.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| #")).collect();
    assert_eq!(rows.len(), 19);
    let mut named = 0;
    for (n, row) in (1..).zip(rows) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        assert_eq!((cells.len(), cells[0]), (3, n.to_string().as_str()), "{row}");
        // Between back quotes: a file, then tests in it; or the name of a fuzz target.
        let mut file = String::new();
        for name in cells[2].split('`').skip(1).step_by(2) {
            if name.contains('/') {
                file = std::fs::read_to_string(root.join(name))
                    .unwrap_or_else(|e| panic!("row {n}: {name}: {e}"));
            } else if cells[2].contains(&format!("fuzz target `{name}`")) {
                let target = format!("fuzz_targets/{name}.rs");
                let found = ["spec", "auth", "target", "control"]
                    .iter()
                    .any(|room| root.join("nvmf-target").join(room).join("fuzz").join(&target).is_file());
                assert!(found, "row {n}: there is no fuzz target {name}");
            } else {
                if let Err(why) = runs(&file, name) {
                    panic!("row {n}: {name}: {why}");
                }
                named += 1;
            }
        }
    }
    assert!(named > 30, "{named} tests are named");
}

/// Whether a Rust file has a test of this name that runs without being asked for.
fn runs(file: &str, name: &str) -> Result<(), &'static str> {
    let lines: Vec<&str> = file.lines().map(str::trim).collect();
    let head = format!("fn {name}(");
    let at = lines.iter().position(|l| l.starts_with(&head)).ok_or("there is no such test")?;
    // What stands above it, up to the end of the item before.
    let above = lines[..at].iter().rev().take_while(|l| !l.is_empty() && **l != "}");
    let attributes: Vec<&&str> = above.filter(|l| l.starts_with("#[")).collect();
    if attributes.iter().any(|a| a.starts_with("#[ignore") || a.starts_with("#[cfg")) {
        return Err("it is ignored, so nobody runs it");
    }
    match attributes.iter().any(|a| **a == "#[test]") {
        true => Ok(()),
        false => Err("it is no test"),
    }
}

#[test]
fn only_tests_that_run_count() {
    let file = "#[test]\nfn good() {\n}\n\n/// Slow.\n#[test]\n#[ignore = \"slow\"]\nfn slow() {\n}\n\n\
                #[ignore]\n#[test]\nfn also() {\n}\n\nfn helper() {\n}\n#[cfg(any())]\n#[test]\nfn gone() {}\n";
    assert_eq!(runs(file, "good"), Ok(()));
    for (name, why) in [
        ("slow", "ignored"),
        ("also", "ignored"),
        ("gone", "ignored"),
        ("helper", "no test"),
        ("none", "no such"),
    ] {
        assert!(runs(file, name).unwrap_err().contains(why), "{name}");
    }
}
