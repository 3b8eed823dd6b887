//! The pool on the driver on a simulated controller on a simulated disk that loses power: the pool's own suite, one layer up. In
//! half of the lives the controller fails under the pool in ways that the driver has to mend.

mod common;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_bdev_nvme::sim::{Fault, SimController, SimOptions};
use cryptfold_bdev_nvme::{Controller, Options as NvmeOptions, attach, detach};
use cryptfold_bdev_sim::Rng;
use cryptfold_bdev_sim::harness::{LocalFuture, Machine, Options, Stack, life, seeds};
use cryptfold_reduce::{CreateOptions, KeySource, LocalPool, VolumeOptions};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 24 * MIB;
const VOLUMES: [(&str, u64, u32); 3] = [("a", 4 * MIB, 4096), ("b", 3 * MIB, 4096), ("small", MIB, 512)];

fn key() -> KeySource {
    KeySource::Bytes((0..32).collect())
}

type Parts = (LocalPool, Arc<Controller>, Arc<SimController>);

#[derive(Clone, Default)]
struct NvmeStack {
    seed: u64,
    parts: Rc<RefCell<Option<Parts>>>,
}

/// A controller over the machine's disk, of a kind that the seed draws.
async fn drive(seed: u64, machine: &Machine) -> Result<(Arc<Controller>, Arc<SimController>), String> {
    let mut rng = Rng::new(seed ^ 0xd21e);
    let options = SimOptions {
        pairs: 1 + rng.below(4) as u16,
        queue_depth: [4, 16, 64, 256][rng.below(4) as usize],
        mdts: [1, 3, 5, 0][rng.below(4) as usize],
        sgl: rng.one_in(2),
        shadow: rng.one_in(2),
        ..SimOptions::new(&machine.disk)
    };
    let sim = SimController::new(options, seed);
    sim.start(&machine.registry).map_err(|e| e.to_string())?;
    let options = NvmeOptions { io_timeout: Duration::from_millis(60), ..NvmeOptions::default() };
    let controller =
        attach(sim.clone(), "N".into(), machine.registry.clone(), machine.cores.clone(), options);
    let controller = controller.await.map_err(|e| e.to_string())?;
    if seed % 2 == 1 {
        let faults = [
            Fault::Drop,
            Fault::Lose,
            Fault::WrongCid,
            Fault::Duplicate,
            Fault::Late(Duration::from_secs(1)),
        ];
        for _ in 0..3 {
            sim.inject(faults[rng.below(5) as usize], 1 + rng.below(300));
        }
    }
    Ok((controller, sim))
}

impl NvmeStack {
    fn current(&self) -> Result<LocalPool, String> {
        self.parts.borrow().as_ref().map(|p| p.0.clone()).ok_or_else(|| "no pool is open".into())
    }
}

impl Stack for NvmeStack {
    fn create(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let this = self.clone();
        Box::pin(async move {
            let (controller, sim) = drive(this.seed, &machine).await?;
            let mut options = CreateOptions::new(key());
            options.force = true;
            options.segment_bytes = Some(MIB as u32);
            options.memory_budget = Some(MEMORY);
            let pool = LocalPool::create(&machine.registry, "Nn1", "pool", &options);
            let pool = pool.await.map_err(|e| e.to_string())?;
            *this.parts.borrow_mut() = Some((pool.clone(), controller, sim));
            for (name, size_bytes, block) in VOLUMES {
                let options = VolumeOptions {
                    name: name.into(),
                    size_bytes,
                    block_size: Some(block),
                    ..VolumeOptions::default()
                };
                pool.create_volume(&options).await.map_err(|e| e.to_string())?;
            }
            Ok(())
        })
    }

    fn open(&self, machine: Machine) -> LocalFuture<Result<(), String>> {
        let this = self.clone();
        Box::pin(async move {
            let (controller, sim) = drive(this.seed, &machine).await?;
            let pool = LocalPool::open(&machine.registry, "Nn1", &key(), Some(MEMORY)).await;
            let pool = pool.map_err(|e| e.to_string())?.ok_or("no pool on the drive")?;
            *this.parts.borrow_mut() = Some((pool, controller, sim));
            Ok(())
        })
    }

    fn volumes(&self) -> Vec<String> {
        VOLUMES.iter().map(|(name, ..)| format!("pool/{name}")).collect()
    }

    fn check(&self, _: Machine) -> LocalFuture<Result<(), String>> {
        let pool = self.current();
        Box::pin(async move {
            let report = pool?.check(true).await.map_err(|status| status.to_string())?;
            if report.is_clean() { Ok(()) } else { Err(format!("{:?}", report.problems)) }
        })
    }

    fn close(&self, _: Machine) -> LocalFuture<Result<(), String>> {
        let parts = self.parts.borrow_mut().take();
        Box::pin(async move {
            let (pool, controller, sim) = parts.ok_or("no pool is open")?;
            pool.close().await.map_err(|e| e.to_string())?;
            detach(&controller, Duration::from_secs(20)).await.map_err(|e| e.to_string())?;
            match sim.offences() {
                none if none.is_empty() => Ok(()),
                some => Err(format!("against the specification: {some:?}")),
            }
        })
    }
}

fn options(seed: u64) -> Options {
    let mut options = Options::new(40 * MIB);
    options.step_limit = 6_000_000;
    options.allowed = |status| status == Status::LBA_OUT_OF_RANGE;
    options.disk.block_bytes = if seed.is_multiple_of(3) { 512 } else { 4096 };
    options
}

#[test]
fn power_cuts_under_the_driver() {
    seeds("cargo test --release -p cryptfold-bdev-nvme --test pool", 16, |seed| {
        let make = || -> Rc<dyn Stack> { Rc::new(NvmeStack { seed, ..NvmeStack::default() }) };
        life(&make, &options(seed), seed)
    });
}

/// The suite sees through the driver: a disk that ignores flushes is caught.
#[test]
fn a_disk_that_ignores_flush_is_caught() {
    let failures = |ignore_flush: bool| {
        let run = |seed: u64| {
            let make = || -> Rc<dyn Stack> { Rc::new(NvmeStack { seed: seed * 2, ..NvmeStack::default() }) };
            life(&make, &Options { ignore_flush, ..options(1) }, seed).err()
        };
        (0..8).filter_map(run).collect::<Vec<String>>()
    };
    assert_eq!(failures(false), Vec::<String>::new(), "an honest disk");
    assert!(failures(true).len() >= 3);
}
