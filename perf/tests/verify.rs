//! `--verify` against devices that lie.

use std::cell::Cell;
use std::time::Duration;

use cryptfold_bdev::{Access, Channel, Io, Op, Registry, Status};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_perf::load::{DataSource, Plan, Sink, WorkerReport, read_back, run_worker};
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

const SLOTS: u64 = 64;
const SEED: u64 = 7;

#[derive(Clone, Copy, PartialEq)]
enum Lie {
    None,
    /// One write is acknowledged and not done.
    Lost,
    /// One bit of one write.
    Flipped,
    /// One write goes to its neighbour.
    Misplaced,
    /// The second half of one write is not done.
    Torn,
    /// One write fails.
    Failed,
}

/// A device that lies once, on its `at`-th write.
struct Liar {
    channel: Channel,
    lie: Lie,
    at: Cell<u64>,
}

impl Sink for Liar {
    fn submit(&self, mut io: Box<Io>) {
        if io.op == Op::Write {
            self.at.set(self.at.get().wrapping_sub(1));
        }
        if io.op == Op::Write && self.at.get() == 0 {
            match self.lie {
                Lie::None => {}
                Lie::Lost => return io.finish(Status::SUCCESS),
                Lie::Failed => return io.finish(Status::WRITE_FAULT),
                Lie::Flipped => {
                    let mut data = std::mem::take(&mut io.data).to_contiguous();
                    data.make_mut()[1234] ^= 4;
                    io.data = data.into();
                }
                Lie::Misplaced => io.lba = (io.lba + 8) % (SLOTS * 8),
                Lie::Torn => {
                    io.blocks /= 2;
                    io.data = io.data.slice(0..2048);
                }
            }
        }
        self.channel.submit(io);
    }
}

fn plan(read_pct: u8, ios: u64) -> Plan {
    Plan {
        random: true,
        read_pct,
        blocks_per_io: 8,
        bytes_per_io: 4096,
        first_slot: 0,
        slots: SLOTS,
        iodepth: 4,
        ramp: Duration::ZERO,
        runtime: Duration::ZERO,
        io_limit: Some(ios),
        shared: None,
        verify: true,
        fua: false,
        data: DataSource::Repeat,
        run_seed: SEED,
        seed: 3,
    }
}

/// A run over a device that tells this lie, and then a read-back with another seed or the same.
fn reports(lie: Lie, at: u64, read_pct: u8, ios: u64, seed: u64) -> (WorkerReport, WorkerReport) {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    let config = RuntimeConfig { policy: IdlePolicy::Interrupt, pin: false, memory, ..Default::default() };
    let runtime = Runtime::start(config).expect("a reactor starts");
    let registry = Registry::new();
    let disk = MallocOptions {
        name: "disk".into(),
        num_blocks: SLOTS * 8,
        block_size_bytes: 512,
        uuid: None,
        optimal_io_boundary: 0,
    };
    cryptfold_bdev_malloc::create(&registry, disk).expect("a RAM disk");
    let device = registry.open("disk", Access::ReadWrite, |_| {}).expect("opens");
    let run = move || async move {
        let channel = device.channel().expect("opens");
        let sink = Liar { channel, lie, at: Cell::new(at) };
        let first = run_worker(sink, plan(read_pct, ios)).await.expect("runs");
        let channel = device.channel().expect("opens");
        let second = read_back(channel, Plan { run_seed: seed, ..plan(100, 0) }).await.expect("runs");
        (first, second)
    };
    runtime.handles()[0].block_on(run).expect("the reactor lives")
}

#[test]
fn an_honest_device_passes() {
    let (first, second) = reports(Lie::None, 1, 50, 2000, SEED);
    assert_eq!((first.errors, first.bad, first.ios), (0, 0, 2000));
    assert!(first.good > 900, "reads, and the sweep");
    assert_eq!((second.bad, second.good, second.unstamped), (0, SLOTS, 0));
    // Another run's stamps are not this run's.
    let (_, second) = reports(Lie::None, 1, 50, 2000, SEED + 1);
    assert_eq!((second.bad, second.good, second.unstamped), (0, 0, SLOTS));
}

#[test]
fn every_lie_is_found() {
    for lie in [Lie::Lost, Lie::Flipped, Lie::Misplaced, Lie::Torn] {
        // The last write, so that no later one covers the lie.
        let (first, second) = reports(lie, 200, 0, 200, SEED);
        assert_eq!(first.errors, 0);
        assert!(first.bad >= 1, "the sweep finds it");
        let text = first.first_bad.expect("the first one is kept");
        assert!(text.contains("expected generation") && text.contains("byte"), "{text}");
        // Whoever does not know the generations finds what contradicts itself.
        assert_eq!(second.bad > 0, lie != Lie::Lost, "{:?}", second.first_bad);
    }
}

#[test]
fn a_failed_write_leaves_its_place_unchecked() {
    let (first, _) = reports(Lie::Failed, 200, 0, 200, SEED);
    assert_eq!((first.errors, first.bad), (1, 0));
    assert!(first.first_error.expect("kept").contains("write fault"));
}
