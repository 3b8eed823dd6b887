//! A simulated machine with a simulated controller in it.
#![allow(dead_code)]

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Registry};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_bdev_nvme::sim::{SimController, SimOptions};
use cryptfold_bdev_nvme::{Controller, NvmeError, Options, attach};
use cryptfold_reactor::{Handle, Sim};

pub struct Machine {
    pub registry: Arc<Registry>,
    pub cores: Vec<Handle>,
    pub seed: u64,
}

pub fn ram(registry: &Arc<Registry>, name: &str, block_size_bytes: u32, num_blocks: u64) {
    let options =
        MallocOptions { name: name.into(), num_blocks, block_size_bytes, uuid: None, optimal_io_boundary: 0 };
    cryptfold_bdev_malloc::create(registry, options).unwrap();
}

/// Time-outs that a test sees the end of.
pub fn quick() -> Options {
    Options {
        io_timeout: Duration::from_millis(200),
        admin_timeout: Duration::from_millis(400),
        look_period: Duration::from_millis(500),
        ..Options::default()
    }
}

/// Runs `test` on a machine of `cores` virtual cores.
pub fn machine<Fut: Future<Output = ()> + 'static>(
    seed: u64,
    cores: usize,
    test: impl FnOnce(Rc<Machine>) -> Fut + 'static,
) {
    let mut sim = Sim::new(seed).cores(cores);
    let machine = Rc::new(Machine { registry: Registry::new(), cores: sim.handles().to_vec(), seed });
    sim.run(move || test(machine));
}

impl Machine {
    /// A controller with `options`, running, not attached.
    pub fn controller(&self, options: SimOptions) -> Arc<SimController> {
        let drive = SimController::new(options, self.seed.wrapping_mul(77) + 5);
        drive.start(&self.registry).unwrap();
        drive
    }

    pub async fn try_attach(
        &self,
        drive: &Arc<SimController>,
        options: Options,
    ) -> Result<Arc<Controller>, NvmeError> {
        attach(drive.clone(), "N".into(), self.registry.clone(), self.cores.clone(), options).await
    }

    pub async fn attach(&self, drive: &Arc<SimController>) -> Arc<Controller> {
        self.try_attach(drive, quick()).await.unwrap()
    }

    pub fn open(&self, name: &str) -> Channel {
        self.registry.open(name, Access::ReadWrite, |_| ()).unwrap().channel().unwrap()
    }

    /// A RAM disk of 4 MiB behind a controller, attached.
    pub async fn usual(&self) -> (Arc<SimController>, Arc<Controller>) {
        ram(&self.registry, "ram", 4096, 1024);
        let drive = self.controller(SimOptions::new("ram"));
        let controller = self.attach(&drive).await;
        (drive, controller)
    }
}
