//! 4 KiB reads and writes through the driver over the simulated controller, for an instruction count of the driver alone
//! (scripts/nvme-cost): what a namespace's queue does in `submit`, and what a pair does in `poll`.

use std::time::Duration;

use cryptfold_bdev::{Access, Io, Op, Registry};
use cryptfold_bdev_null::NullOptions;
use cryptfold_bdev_nvme::sim::{SimController, SimOptions};
use cryptfold_bdev_nvme::{Options, attach, detach};
use cryptfold_reactor::Sim;
use cryptfold_reactor::memory::Buf;

const DEPTH: u64 = 32;

fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(500u64);
    let mut sim = Sim::new(1);
    let cores = sim.handles().to_vec();
    sim.run(move || async move {
        let registry = Registry::new();
        let options =
            NullOptions { name: "null".into(), num_blocks: 1 << 20, block_size_bytes: 4096, uuid: None };
        cryptfold_bdev_null::create(&registry, options).expect("a null device");
        let drive = SimController::new(SimOptions { queue_depth: 256, ..SimOptions::new("null") }, 1);
        drive.start(&registry).expect("a controller");
        let attached = attach(drive, "N".into(), registry.clone(), cores, Options::default()).await;
        let controller = attached.expect("it comes up");
        let channel =
            registry.open("Nn1", Access::ReadWrite, |_| ()).and_then(|d| d.channel()).expect("a channel");
        let data = Buf::alloc(4096);
        for round in 0..rounds {
            let all: Vec<_> = (0..DEPTH)
                .map(|n| {
                    let op = if n % 2 == 0 { Op::Read } else { Op::Write };
                    let mut io = Io::new(op, (round * DEPTH + n) % (1 << 20), 1);
                    io.data = if n % 2 == 0 { Buf::alloc(4096).into() } else { data.clone().into() };
                    channel.io(io)
                })
                .collect();
            for io in all {
                let io = io.await;
                assert!(io.status().is_ok());
                io.recycle();
            }
        }
        drop(channel);
        detach(&controller, Duration::from_secs(1)).await.expect("it ends");
    });
    println!("{} I/Os", rounds * DEPTH);
}
