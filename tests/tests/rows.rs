//! The table of `README.md` against the code: 19 classes, and every file and test that it names exists.

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
                assert!(file.contains(&format!("fn {name}(")), "row {n}: there is no test {name}");
                named += 1;
            }
        }
    }
    assert!(named > 30, "{named} tests are named");
}
