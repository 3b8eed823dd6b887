//! The harness on stacks without a state of their own: those must pass, liars must be caught.

use std::rc::Rc;

use cryptfold_bdev::Status;
use cryptfold_bdev_passthru::PassthruOptions;
use cryptfold_bdev_sim::harness::{
    LocalFuture, Machine, Options, Recording, Stack, Summary, every_point, life, seeds,
};

/// Two pass-through layers.
struct Layers;

impl Stack for Layers {
    fn create(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        self.open(machine)
    }

    fn open(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        Box::pin(async move {
            for (name, base) in [("lower", machine.disk.as_str()), ("upper", "lower")] {
                let options = PassthruOptions { name: name.into(), base_bdev_name: base.into(), uuid: None };
                cryptfold_bdev_passthru::create(&machine.registry, options).map_err(|e| e.to_string())?;
            }
            Ok(())
        })
    }

    fn volumes(&self) -> Vec<String> {
        vec!["upper".into()]
    }

    fn check(&self, _: Machine) -> LocalFuture<Result<(), String>> {
        Box::pin(async { Ok(()) })
    }

    fn close(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        Box::pin(async move {
            let upper = machine.registry.open("upper", cryptfold_bdev::Access::ReadOnly, |_| ());
            let channel = upper.and_then(|d| d.channel()).map_err(|e| e.to_string())?;
            channel.flush().await.map_err(|e| e.to_string())
        })
    }
}

fn layers() -> Rc<dyn Stack> {
    Rc::new(Layers)
}

/// 2 MiB with 512-byte blocks: without anything that makes 4 KiB atomic, a disk's sector is what survives whole.
fn options() -> Options {
    let mut options = Options::new(2 << 20);
    options.disk.block_bytes = 512;
    options
}

const AGAIN: &str = "cargo test -p cryptfold-bdev-sim --test stacks pass_through";

#[test]
fn pass_through_survives() {
    seeds(AGAIN, 40, |seed| life(&layers, &options(), seed));
}

#[test]
fn pass_through_survives_at_every_point() {
    let mut options = options();
    options.ops = 8;
    let points = every_point(&layers, &options, &Recording::new(1), 1, 12).unwrap();
    assert!(points.events > 40 && points.surfaces > 200, "{points:?}");
}

#[test]
fn the_seed_decides_everything() {
    let run = |seed| {
        let s: Summary = life(&layers, &options(), seed).unwrap();
        (s.cuts, s.nested, s.recoveries, s.time)
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

/// How many of 20 seeds fail, and one failure.
fn failures(options: &Options) -> (usize, String) {
    let all: Vec<String> = (0..20).filter_map(|seed| life(&layers, options, seed).err()).collect();
    (all.len(), all.first().cloned().unwrap_or_default())
}

#[test]
fn a_disk_that_ignores_flush_is_caught() {
    let (n, what) = failures(&Options { ignore_flush: true, ..options() });
    assert!(n > 10, "{n} of 20 seeds");
    assert!(what.contains("older version"), "{what}");
}

#[test]
fn a_disk_that_ignores_fua_is_caught() {
    let (n, what) = failures(&Options { ignore_fua: true, ..options() });
    assert!(n > 5, "{n} of 20 seeds");
    assert!(what.contains("recovery of upper"), "{what}");
}

#[test]
fn mixtures_are_caught() {
    // The same disk sold as one with 4 KiB blocks, which it tears.
    let (n, what) = failures(&Options::new(2 << 20));
    assert!(n > 5, "{n} of 20 seeds");
    assert!(what.contains("nobody's content"), "{what}");
}

#[test]
fn hangs_and_errors_are_caught() {
    let options = Options { step_limit: 100, ..options() };
    let what = life(&layers, &options, 1).unwrap_err();
    assert!(what.contains("not done after 100 steps"), "{what}");
    let mut options = self::options();
    options.disk.unmap = false;
    options.mix.unmap = 50;
    let what = life(&layers, &options, 1).unwrap_err();
    assert!(what.contains("unmap of upper") && what.contains("opcode"), "{what}");
    options.allowed = |status| status == Status::INVALID_OPCODE.do_not_retry();
    life(&layers, &options, 1).unwrap();
}
