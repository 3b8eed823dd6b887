//! The crypto device: encrypts everything on its way to the base (SPDK's `bdev_crypto_create` over `AES_XTS`).
//!
//! A block is one data unit, its tweak is its LBA in units of the device's block size, and the key is `key` followed by
//! `key2`: a disk written by SPDK's crypto bdev with the same key and block size reads back, and the other way round.
//!
//! Invariants:
//! - The base only ever gets ciphertext of written data. Zeros are encrypted like anything else, so write-zeroes,
//!   compare, compare-and-write and copy are left to the core's emulation above this layer.
//! - Blocks that the base reports as unmapped read as zeros (what they hold below is no ciphertext), and stay reported.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::trace::{self, Stage};
use cryptfold_bdev::{
    Base, Bdev, BdevError, Channel, Complete, Device, DeviceInfo, Frame, Io, OnResize, Op, OpSet, Queue,
    Registry, Status,
};
use cryptfold_reactor::memory::{Buf, SgList, stream};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::KeyRef;
use crate::engine::{Direction, XtsContext, XtsKey};
use crate::transform::{self, Numbering};

/// What `bdev_crypto_create` takes.
#[derive(Clone, Debug)]
pub struct CryptoOptions {
    /// Name in the registry.
    pub name: String,
    /// The device below.
    pub base_bdev_name: String,
    /// The key.
    pub key: Arc<XtsKey>,
    /// Where the key can be found again.
    pub key_ref: KeyRef,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
}

struct Crypto {
    info: DeviceInfo,
    base: Base,
    key: Arc<XtsKey>,
    key_ref: KeyRef,
}

/// Creates a crypto device; claims its base.
///
/// # Errors
/// Unknown or claimed base, name taken.
pub fn create(registry: &Arc<Registry>, options: CryptoOptions) -> Result<Arc<Bdev>, BdevError> {
    let uppers = vec![options.name.clone()];
    let base = Base::open(registry, &options.base_bdev_name, uppers, "crypto", OnResize::Follow)?;
    let below = base.bdev().clone();
    let mut info = DeviceInfo::stacked_on(below.info(), options.name, "crypto");
    info.blocks = below.blocks();
    // A block beside one that was written would be taken for written, and change.
    info.reports_unmapped &= info.unmapped_blocks == 1;
    info.uuid = options.uuid.unwrap_or(info.uuid);
    let own = OpSet::of(&[Op::Read, Op::Write, Op::Flush]);
    info.ops = passed_through(own, below.info().ops, &[Op::Unmap, Op::WriteUncorrectable, Op::Reset]);
    let device = Crypto { info, base, key: options.key, key_ref: options.key_ref };
    Base::register(registry, Arc::new(device), &below)
}

/// `own`, and those of `passed` that the base does itself.
pub(crate) fn passed_through(own: OpSet, base: OpSet, passed: &[Op]) -> OpSet {
    passed.iter().filter(|op| base.has(**op)).fold(own, |set, op| set.with(*op))
}

/// A context for one queue.
pub(crate) fn context(key: &XtsKey) -> Result<XtsContext, BdevError> {
    XtsContext::new(key).map_err(|e| BdevError::NoResources(e.to_string()))
}

impl Device for Crypto {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let block_bytes = self.info.block_size_bytes;
        let numbering = Numbering {
            origin: 0,
            first: 0,
            step_bytes: u64::from(block_bytes),
            unit_bytes: block_bytes as usize,
        };
        let context = context(&self.key)?;
        let kept = self.base.bdev().info().keeps_bytes;
        Ok(Rc::new(CryptoQueue {
            base: self.base.channel()?,
            context,
            numbering,
            reports_unmapped: self.info.reports_unmapped,
            hot: (kept > 0).then(|| RefCell::new(Buf::alloc(kept as usize))),
        }))
    }

    fn destruct(&self) {
        self.base.close();
    }

    fn space(&self) -> Option<cryptfold_bdev::Space> {
        self.base.bdev().device().space()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.base.bdev().device().allocated_bytes()
    }

    fn driver_specific(&self) -> Value {
        let mut v = json!({"name": self.info.name, "base_bdev_name": self.base.name()});
        self.key_ref.put(&mut v);
        json!({"crypto": v})
    }

    fn config(&self) -> Vec<(String, Value)> {
        let mut params = json!({
            "base_bdev_name": self.base.name(),
            "name": self.info.name,
            "uuid": self.info.uuid.to_string(),
        });
        self.key_ref.put(&mut params);
        vec![("bdev_crypto_create".into(), params)]
    }
}

struct CryptoQueue {
    base: Channel,
    context: XtsContext,
    numbering: Numbering,
    reports_unmapped: bool,
    /// Where the next ciphertext of a page is made, before it goes past the caches to its place; [`None`] when the base
    /// does not keep pages.
    hot: Option<RefCell<Buf>>,
}

impl CryptoQueue {
    /// Encrypts a write of whole pages, which the base keeps as they are, page by page past the caches: nobody reads them soon.
    /// False, with nothing changed, for any other write.
    #[inline]
    fn encrypt_past_caches(&self, io: &mut Io) -> bool {
        let Some(hot) = &self.hot else { return false };
        let unit = self.numbering.unit_bytes;
        let (start, len) = (io.lba * unit as u64, io.blocks as usize * unit);
        let (mut hot, [from]) = (hot.borrow_mut(), io.data.segments_mut()) else { return false };
        let Some(hot) = hot.get_mut() else { return false };
        let page = hot.len();
        if from.len() != len || !len.is_multiple_of(page) || !start.is_multiple_of(page as u64) {
            return false;
        }
        // What nobody else holds is encrypted where it lies, and is in the cache already.
        if from.is_unique() {
            return false;
        }
        let mut encrypt = |start: u64, from: &[u8]| {
            let mut to = Buf::alloc(page);
            self.context.run_buffer(Direction::Encrypt, self.numbering.run_at(start), from, hot);
            stream(to.make_mut(), hot);
            to
        };
        if len == page {
            *from = encrypt(start, from);
        } else {
            let starts = (start..).step_by(page);
            let pages =
                starts.zip(from.chunks_exact(page)).map(|(start, from)| encrypt(start, from)).collect();
            io.data = pages;
        }
        true
    }

    /// Runs the payload of an I/O through the cipher, but for its unmapped blocks.
    fn transform(&self, direction: Direction, io: &mut Io, into: Option<SgList>) -> Result<(), Status> {
        let block = self.numbering.unit_bytes;
        let start = io.lba * block as u64;
        let len = io.blocks as usize * block;
        let unmapped = if self.reports_unmapped { &io.unmapped[..] } else { &[] };
        let done = if io.data.len_bytes() == len {
            let spans = transform::spans(0, start, len, block, unmapped);
            let begun = trace::begin();
            let done = transform::apply(
                &self.context,
                direction,
                &self.numbering,
                start,
                &spans,
                &mut io.data,
                into,
            );
            begun.end(Stage::AtRest);
            done
        } else {
            // A base that returns too much or too little: nothing of it can be trusted.
            Err(Status::INTERNAL_ERROR)
        };
        if done.is_err() {
            io.data = SgList::new();
        }
        done
    }
}

impl Queue for CryptoQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        match io.op {
            Op::Read => {
                let into = std::mem::take(&mut io.data);
                io.push_with(self.clone(), 0, 0, into);
            }
            Op::Write => {
                if !self.encrypt_past_caches(&mut io)
                    && let Err(status) = self.transform(Direction::Encrypt, &mut io, None)
                {
                    return io.finish(status);
                }
            }
            _ => {}
        }
        self.base.submit(io);
    }

    fn abort(&self, tag: u64) -> bool {
        self.base.abort(tag)
    }
}

impl Complete for CryptoQueue {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let into = io.saved(&frame);
        if !io.status().is_ok() {
            io.data = into;
            let status = io.status();
            return io.up(status);
        }
        let into = Some(into).filter(|d| !d.is_empty());
        let status = self.transform(Direction::Decrypt, &mut io, into).err().unwrap_or(Status::SUCCESS);
        io.up(status);
    }
}
