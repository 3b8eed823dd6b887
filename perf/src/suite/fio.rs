//! fio job files for the cases of a matrix, so that others can measure the same with the tool that everybody knows.
//!
//! All of them include `engine.fio`, which says how fio reaches the namespace; it is the only file to change.

use std::fmt::Write;
use std::path::Path;

use super::matrix::{Case, Data, Matrix};

/// Writes a job per case, and what they include.
///
/// # Errors
/// When a file can not be written.
pub fn write(dir: &Path, matrix: &Matrix) -> Result<usize, String> {
    std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    put("engine.fio", ENGINE)?;
    for case in &matrix.cases {
        put(&format!("{}.fio", case.name()), &job(case, &matrix.data[&case.data], matrix))?;
    }
    Ok(matrix.cases.len())
}

const ENGINE: &str = "\
; How fio reaches the namespace; written by `cryptfold-perf suite --fio-jobs`, included by the jobs beside it.
; A namespace that the kernel has connected (nvme connect): FIO_DEVICE=/dev/nvme1n1 fio JOB.fio. ITS DATA IS OVERWRITTEN.
ioengine=io_uring
filename=${FIO_DEVICE}
direct=1
; Instead of these three, cryptfold's own initiator (perf/fio-engine):
;ioengine=external:libcryptfold_fio.so
;traddr=127.0.0.1
;trsvcid=4420
;subnqn=nqn.2024-01.io.example:disk
;thread=1
";

/// The job of a case.
fn job(case: &Case, data: &Data, matrix: &Matrix) -> String {
    let effort = &matrix.effort;
    let mut out = format!(
        "; {}: written by `cryptfold-perf suite --fio-jobs`. The path ({}) is the target's business,\n\
         ; not fio's: see `cryptfold-perf suite` for how the namespace is made.\n\
         [global]\ninclude engine.fio\ntime_based=1\ngroup_reporting=1\nnorandommap=1\nrandrepeat=0\n",
        case.name(),
        case.path.name()
    );
    // Writing to a String can not fail.
    let _ = writeln!(out, "runtime={}s\nramp_time={}s", up(effort.seconds), up(effort.warmup));
    let _ = writeln!(out, "size={}\n", effort.size.0);
    let _ = writeln!(out, "[{}]", case.name());
    let _ = writeln!(
        out,
        "rw={}\nbs={}\niodepth={}\nnumjobs={}",
        case.op.name(),
        case.bs,
        case.depth,
        case.cores
    );
    if case.cores > 1 && !case.op.name().starts_with("rand") {
        // As our load does it: each job has a part of its own.
        let _ = writeln!(out, "offset_increment={0}\nio_size={0}", effort.size.0 / u64::from(case.cores));
    }
    if case.op.mixed() {
        let _ = writeln!(out, "rwmixread={}", case.read_pct);
    }
    if case.op.read_pct(case.read_pct) < 100 {
        out += &buffers(data);
    }
    out
}

/// fio takes whole seconds.
fn up(seconds: f64) -> u64 {
    seconds.ceil() as u64
}

fn buffers(data: &Data) -> String {
    if let Some(tree) = &data.tree {
        return format!(
            "; fio has no way to write the files of {}: half-compressible data stands for them.\n\
             refill_buffers=1\nbuffer_compress_percentage=50\nbuffer_compress_chunk=4096\n",
            tree.display()
        );
    }
    let mut out = "refill_buffers=1\n".to_owned();
    if data.ratio() > 1.0 {
        let zeros = (100.0 * (1.0 - 1.0 / data.ratio())).round();
        let _ = writeln!(out, "buffer_compress_percentage={zeros}\nbuffer_compress_chunk=4096");
    }
    if let Some(pct) = data.dedupe_pct.filter(|p| *p > 0) {
        let _ = writeln!(
            out,
            "dedupe_percentage={pct}\ndedupe_mode=working_set\ndedupe_working_set_percentage=1"
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::matrix::{DEFAULT, Matrix};

    #[test]
    fn every_case_has_its_job() {
        let matrix = Matrix::parse("default", DEFAULT).expect("right");
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(super::write(dir.path(), &matrix), Ok(matrix.cases.len()));
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect(name);
        let job = read("pool-randrw70-4k-qd64-c1-unique.fio");
        for line in [
            "include engine.fio",
            "rw=randrw",
            "bs=4k",
            "iodepth=64",
            "rwmixread=70",
            "size=536870912",
            "buffer_compress_percentage=50",
            "runtime=3s",
        ] {
            assert!(job.lines().any(|l| l == line), "{line} is not in\n{job}");
        }
        assert!(!read("pool-read-128k-qd32-c1-unique.fio").contains("refill_buffers"));
        assert!(read("pool-write-128k-qd32-c1-duplicate.fio").contains("dedupe_percentage=90"));
        assert!(read("engine.fio").contains("ioengine="));
    }
}
