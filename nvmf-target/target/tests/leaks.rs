//! Connections that come and go leave nothing behind. A process of its own: it looks at what the whole process uses.

mod common;

use common::*;
use cryptfold_nvmf_spec::Status;
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_target::TransportOptions;
use cryptfold_reactor::IdlePolicy;

/// (descriptors, resident bytes) of this process.
fn resources() -> (usize, u64) {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("procfs").count();
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    (descriptors, pages * 4096)
}

fn storm(connections: usize, cycles: usize) {
    let limits = TransportOptions { max_connections_per_host: 4096, ..Default::default() };
    let rig = Rig::with(2, IdlePolicy::Interrupt, limits);
    let cycle = || {
        let (mut admin, mut io) = rig.host(1);
        assert_eq!(io.write(0, &[1; 512]), Status::SUCCESS);
        io.disconnect();
        assert_eq!(admin.get(Property::Csts) & 1, 1);
    };
    let round = |rounds: usize| {
        (0..rounds).for_each(|_| cycle());
        rig.wait_empty();
        let mut all: Vec<(Client, Client)> = (0..connections / 2).map(|n| rig.host(n as u8 | 1)).collect();
        assert_eq!(rig.target.qpairs(NQN).expect("it exists").len(), connections / 2 * 2);
        for (n, (_, io)) in all.iter_mut().enumerate() {
            assert_eq!(io.write(n as u64 % BLOCKS, &[n as u8; 512]), Status::SUCCESS);
        }
        drop(all);
        rig.wait_empty();
        resources()
    };
    // What is made once and kept, and what the allocator keeps of the peak, is there after the first round.
    let before = round(20);
    let after = round(cycles);
    println!("{connections} connections, {cycles} cycles: {before:?} before, {after:?} after");
    wait(|| resources().0 <= before.0);
    let more = after.1.saturating_sub(before.1);
    assert!(more < 8 << 20, "{more} bytes more than before");
}

#[test]
fn connections_leave_nothing_behind() {
    storm(200, 500);
}

/// The long form: `cargo test --release -p cryptfold-nvmf-target --test leaks -- --ignored`.
#[test]
#[ignore = "takes a minute; needs 4,096 descriptors"]
fn a_thousand_connections_and_ten_thousand_cycles() {
    storm(1000, 10_000);
}
