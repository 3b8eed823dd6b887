//! What a reader of the figures has to know before them; the page and the terminal say the same.

use super::record::Record;

/// In whole sentences. `old`: an earlier run to compare with.
pub fn warnings(record: &Record, old: Option<&Record>) -> Vec<String> {
    let mut all = Vec::new();
    if !record.complete {
        all.push(format!(
            "This run did not finish: {} of {} rounds are whole. What is shown is what was measured until then.",
            record.rounds_done, record.matrix.effort.rounds
        ));
    }
    if record.machine.load_before > 0.5 {
        all.push(format!(
            "The machine was not idle when it began: load average {:.2}.",
            record.machine.load_before
        ));
    }
    if let Some(shared) = &record.cpus.shared {
        all.push(format!("Target and load slow each other: {shared}."));
    }
    if record.other.is_some() && !record.overwrite {
        all.push(
            "The other target was read as it was found, without --overwrite: blocks that were never written, or other data, \
             may be read faster or slower than the data of these cases."
                .into(),
        );
    }
    for left in record.left_out.iter().filter(|l| l.failed) {
        all.push(format!("{} failed: {}", left.name, left.why));
    }
    if let Some(old) = old {
        all.extend(differences(record, old));
    }
    all
}

/// What else than the code may make two runs differ.
fn differences(record: &Record, old: &Record) -> Vec<String> {
    let (m, o) = (&record.machine, &old.machine);
    let same =
        |a: &str, b: &str, what: &str| (a != b).then(|| format!("The earlier run had another {what}: {b}."));
    let mut all = Vec::new();
    all.extend(same(&m.cpu, &o.cpu, "processor"));
    all.extend(same(&m.kernel, &o.kernel, "kernel"));
    if record.matrix.effort != old.matrix.effort {
        all.push("The earlier run had other times, rounds or sizes.".into());
    }
    let (now, then) = (&record.cpus, &old.cpus);
    if !then.host.is_empty() && (&now.target, &now.host) != (&then.target, &then.host) {
        all.push(format!("The earlier run had other CPUs: {}.", then.text()));
    }
    let of_both = record.cases.iter().filter(|c| old.cases.iter().any(|o| o.name == c.name));
    let changed: Vec<&str> =
        of_both.filter(|c| record.before(old, c).is_none()).map(|c| c.name.as_str()).collect();
    if !changed.is_empty() {
        all.push(format!(
            "Not compared, as their data was something else in the earlier run: {}.",
            changed.join(", ")
        ));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::cpus::Cpus;
    use super::super::machine::Description;
    use super::super::matrix::{Matrix, QUICK};
    use super::super::record::{FORMAT, Measured};
    use super::*;

    fn record() -> Record {
        let machine = Description {
            cpu: "a".into(),
            cpus: 4,
            features: Vec::new(),
            kernel: "6".into(),
            memory_bytes: 0,
            governor: "none".into(),
            virtual_machine: false,
            nics: Vec::new(),
            load_before: 0.0,
            load_after: 0.0,
            target: "t".into(),
            version: "v".into(),
            commit: "c".into(),
        };
        let matrix = Matrix::parse("built-in", QUICK).expect("a matrix");
        let measured = |case| Measured::new(case, Vec::new());
        Record {
            format: FORMAT,
            complete: true,
            rounds_done: 3,
            started_s: 0,
            took_s: 0.0,
            command: String::new(),
            machine,
            cases: matrix.cases.iter().map(measured).collect(),
            matrix,
            other: None,
            overwrite: false,
            cpus: Cpus { target: vec![0], host: vec![1], shared: None },
            left_out: Vec::new(),
        }
    }

    #[test]
    fn another_target_that_is_read_as_it_was_found() {
        let mut record = record();
        assert_eq!(warnings(&record, None), [""; 0]);
        record.other = Some("there".into());
        assert!(warnings(&record, None).concat().contains("without --overwrite"));
        record.overwrite = true;
        assert_eq!(warnings(&record, None), [""; 0]);
    }

    #[test]
    fn cpus_that_disturb_each_other_or_were_others() {
        let (mut record, mut old) = (record(), record());
        assert_eq!(warnings(&record, Some(&old)), [""; 0]);
        record.cpus.shared = Some("both have CPU 0".into());
        old.cpus.target = vec![7];
        let said = warnings(&record, Some(&old)).concat();
        assert!(said.contains("both have CPU 0") && said.contains("7 for the target"), "{said}");
        // A file that does not say.
        old.cpus = Cpus::default();
        assert!(!warnings(&record, Some(&old)).concat().contains("earlier run"));
    }

    #[test]
    fn the_same_name_with_other_data_is_not_compared() {
        let (record, mut old) = (record(), record());
        let case = &record.cases[0];
        assert!(record.before(&old, case).is_some());
        old.matrix.data.get_mut(&case.case.data).expect("its data").dedupe_pct = Some(77);
        assert!(record.before(&old, case).is_none());
        let said = warnings(&record, Some(&old)).concat();
        assert!(said.contains("Not compared") && said.contains(&case.name), "{said}");
    }
}
