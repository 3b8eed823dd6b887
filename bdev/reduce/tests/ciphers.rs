//! Layers with a cipher on a volume whose blocks are smaller than what its map knows: of 4 KiB of which a part was discarded or never
//! written, the map says nothing of that part. What a host has not written may read as what it likes, but as long as nobody writes it,
//! as the same; what it has zeroed, as zeros; and where discarded blocks are promised to be zeros, they are.

mod support;

use std::sync::Arc;

use cryptfold_bdev::{Access, Registry};
use cryptfold_bdev_crypto::KeyRef;
use cryptfold_bdev_crypto::crypto::{self, CryptoOptions};
use cryptfold_bdev_crypto::engine::XtsKey;
use cryptfold_bdev_crypto::gate::KeyGate;
use cryptfold_bdev_crypto::hostcrypt::{self, HostcryptOptions};
use cryptfold_bdev_sim::{Image, Rng};
use cryptfold_reactor::Sim;
use cryptfold_reactor::memory::Buf;
use cryptfold_reduce::{CreateOptions, LocalPool, VolumeOptions};

const MIB: u64 = 1 << 20;
/// Blocks of the volume that are used.
const USED: usize = 8 * 8;

fn xts_key() -> Arc<XtsKey> {
    Arc::new(XtsKey::new(&(0..64).collect::<Vec<u8>>()).unwrap())
}

/// A layer named "c" on "p/v"; with units of so many bytes if it is a host's.
fn layer(registry: &Arc<Registry>, unit: Option<u32>) {
    let (name, base_bdev_name) = ("c".to_owned(), "p/v".to_owned());
    let (key_ref, uuid) = (KeyRef::File("/nowhere".into()), None);
    let Some(sector_size_bytes) = unit else {
        crypto::create(registry, CryptoOptions { name, base_bdev_name, key: xts_key(), key_ref, uuid })
            .unwrap();
        return;
    };
    let options = HostcryptOptions {
        name,
        base_bdev_name,
        key: KeyGate::fixed(xts_key()),
        key_ref,
        key_id: 1,
        sector_size_bytes,
        payload_offset_bytes: 4096,
        iv_offset: 0,
        iv_large_sectors: false,
        uuid,
    };
    hostcrypt::create(registry, options).unwrap();
}

/// Writes, write-zeroes and discards of any part, and after each of them all of it is read.
fn parts_of_blocks(unit: Option<u32>, volume_block: u32, zeros_promised: bool) {
    Sim::new(1).run(move || async move {
        let (registry, _disk) = support::disk(64 * MIB, Image::zeroed());
        let mut options = CreateOptions::new(support::key());
        (options.segment_bytes, options.memory_budget) = (Some(MIB as u32), Some(16 * MIB));
        let pool = LocalPool::create(&registry, "disk", "p", &options).await.unwrap();
        let volume = VolumeOptions {
            name: "v".into(),
            size_bytes: MIB,
            block_size: Some(volume_block),
            ..VolumeOptions::default()
        };
        pool.create_volume(&volume).await.unwrap();
        layer(&registry, unit);
        let c = registry.open("c", Access::ReadWrite, |_| ()).unwrap().channel().unwrap();
        let block = c.bdev().block_size_bytes() as usize;
        let used = USED * volume_block as usize / block;
        let read = async || c.read(0, used as u64).await.unwrap().to_contiguous().to_vec();
        let blank = read().await;
        assert!(!zeros_promised || blank.iter().all(|b| *b == 0));
        let mut model = blank.clone();
        let mut rng = Rng::new(7);
        for nth in 0..400 {
            let most = if rng.one_in(3) { 20 } else { 5 };
            let blocks = 1 + rng.below(most) as usize;
            let from = rng.below((used - blocks.min(used - 1)) as u64) as usize;
            let blocks = blocks.min(used - from);
            let (lba, count, bytes) = (from as u64, blocks as u64, from * block..(from + blocks) * block);
            let what = rng.below(3);
            match what {
                0 => {
                    let data: Vec<u8> = (0..bytes.len()).map(|_| rng.next() as u8).collect();
                    c.write(lba, Buf::from_slice(&data), false).await.unwrap();
                    model[bytes].copy_from_slice(&data);
                }
                1 => {
                    c.write_zeroes(lba, count).await.unwrap();
                    model[bytes].fill(0);
                }
                _ => {
                    c.unmap(lba, count).await.unwrap();
                    model[bytes.clone()].copy_from_slice(&blank[bytes]);
                }
            }
            let now = read().await;
            let wrong = (0..used).find(|n| now[n * block..][..block] != model[n * block..][..block]);
            assert_eq!(wrong, None, "after {nth}, {what} of {from}+{blocks}");
        }
        assert_eq!(c.bdev().info().reports_unmapped, zeros_promised);
        drop(c);
        let report = pool.check(true).await.unwrap();
        assert!(report.is_clean(), "{:#?}", report.problems);
    });
}

#[test]
fn a_hosts_sectors_of_512_on_blocks_of_512() {
    parts_of_blocks(Some(512), 512, false);
}

/// Its blocks have 4096 bytes: none has parts.
#[test]
fn a_hosts_sectors_of_4096_on_blocks_of_512() {
    parts_of_blocks(Some(4096), 512, true);
}

#[test]
fn a_hosts_sectors_of_512_on_blocks_of_4096() {
    parts_of_blocks(Some(512), 4096, true);
}

#[test]
fn the_cipher_at_rest_on_blocks_of_either_size() {
    parts_of_blocks(None, 512, false);
    parts_of_blocks(None, 4096, true);
}
