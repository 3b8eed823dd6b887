//! What was stored before its key was there.
//!
//! A host's ciphertext that came while its volume was raw lies below as it was sent. Read through the layer and written through it
//! again, it is plaintext there, and reduces. The host sees the same bytes before, meanwhile and afterwards, because each block
//! says how it is stored ([`Io::as_sent`]) and nobody else changes it between the read and the write.
//!
//! A block that is plainly no ciphertext stays: what lay on the volume before it was formatted, zeros, patterns. To decrypt it
//! would make noise of it, which takes more room than it does now.

use cryptfold_bdev::{BlockRange, BlockRanges, Channel, Io, Status};
use cryptfold_reactor::memory::Buf;

/// Below this the sum of squares of how often each byte is in 4096 random ones stays, but for one block in 10^18: it is 69,616 on
/// average, a chi-square of 255; this is one of 512.
const RANDOM: u32 = (4096 + 512) * 16;
const BLOCK_BYTES: usize = 4096;

/// Whether a block may be ciphertext: all of its bytes are about as frequent. What was compressed often looks so, too.
fn looks_encrypted(block: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    for byte in block {
        counts[usize::from(*byte)] += 1;
    }
    counts.iter().map(|n| n * n).sum::<u32>() < RANDOM
}

/// The blocks of a read that are worth writing again.
fn worth_it(read: &Io) -> BlockRanges {
    let mut found = BlockRanges::new();
    for part in &read.as_sent {
        for start in part.start..part.start + part.blocks {
            let from = start as usize * BLOCK_BYTES;
            let block: Buf = read.data.slice(from..from + BLOCK_BYTES).to_contiguous();
            if !looks_encrypted(&block) {
                continue;
            }
            match found.last_mut().filter(|last| last.start + last.blocks == start) {
                Some(last) => last.blocks += 1,
                None => found.push(BlockRange { start, blocks: 1 }),
            }
        }
    }
    found
}

/// Writes again, through the layer, what a range of a bound device ([`crate::luks::Layer::Bound`]) holds as its host had sent it and
/// what may be ciphertext. How many blocks that were. An opening for reading is enough. `lba` and `blocks` in blocks of 4 KiB, a few
/// MiB at most.
///
/// # Errors
/// The device's status; a part may have been written.
pub async fn reduce_late(channel: &Channel, lba: u64, blocks: u64) -> Result<u64, Status> {
    channel.rewrite(lba, blocks, worth_it).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{XtsContext, XtsEngine, XtsKey};

    #[test]
    fn ciphertext_is_told_from_what_compresses() {
        let key = XtsKey::new(&(0..64).collect::<Vec<u8>>()).unwrap();
        let cipher = XtsContext::new(&key).unwrap();
        let text: Vec<u8> = include_bytes!("late.rs").iter().cycle().take(BLOCK_BYTES).copied().collect();
        for plain in [vec![0; BLOCK_BYTES], text.clone(), vec![0x5A; BLOCK_BYTES]] {
            assert!(!looks_encrypted(&plain));
            for tweak in 0..200 {
                let mut block = plain.clone();
                cipher.encrypt_in_place(tweak, &mut block);
                assert!(looks_encrypted(&block), "{tweak}");
            }
        }
        // Noise that repeats, and text with as many different bytes as there are.
        let mut noise = text;
        cipher.encrypt_in_place(7, &mut noise);
        let repeated: Vec<u8> = noise[..1024].repeat(4);
        assert!(!looks_encrypted(&repeated));
        let half: Vec<u8> = noise[..2048].iter().copied().chain(std::iter::repeat_n(b' ', 2048)).collect();
        assert!(!looks_encrypted(&half));
    }
}
