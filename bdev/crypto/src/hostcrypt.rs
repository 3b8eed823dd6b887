//! The hostcrypt device: a host's dm-crypt layer in reverse. The host above reads and writes its ciphertext; the base
//! below holds plaintext, so that it can deduplicate and compress.
//!
//! ```text
//!   device   0 ........ payload_offset ....................... end
//!            | as it is |  unit 0 | unit 1 | ...                |   (a LUKS header lies in the raw part)
//! ```
//!
//! Numbering (`plain64`, dm-crypt in Linux's Documentation/admin-guide/device-mapper/dm-crypt.rst): the tweak of a unit
//! is `iv_offset` plus its distance from the payload's start in sectors of 512 bytes, also when units have 4096 bytes:
//! then it grows by 8 per unit. With dm-crypt's `iv_large_sectors` it is an eighth of that and grows by 1.
//!
//! Invariants:
//! - What the host wrote is what it reads back, byte for byte, whatever it wrote: XTS maps all units to all units.
//! - Ranges that the base reports as unmapped read as raw zeros, not as ciphertext of zeros: discarded, or never written. A base that
//!   reports larger units than our blocks (a pool's volume with blocks of 512 bytes) is as one that reports nothing: a block beside
//!   one that is written would change from the one to the other.
//! - The host's write-zeroes asks for zeros *above* this layer. It goes down only to a base that does it itself and
//!   reports zeroed ranges as unmapped; elsewhere the core turns it into writes, and the plaintext of zero ciphertext
//!   is stored.
//! - Where that is asked for ([`Shape::by_block`]), what the base reports as stored the way the host had sent it passes as it is.
//! - A block holds whole units: with units of 4096 bytes the device has blocks of 4096 bytes.
//!
//! The key comes from a [`KeyGate`]: while it is shut, all I/O ends with the gate's status and nothing goes down; a read that
//! is below when it shuts ends with that status too.
//!
//! Writes carry the host key's id ([`Io::host_key`]); those of the raw part carry 0.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::trace::{self, Stage};
use cryptfold_bdev::{
    Base, Bdev, BdevError, BlockRange, BlockRanges, Channel, Complete, Device, DeviceInfo, Frame, Io,
    OnResize, Op, OpSet, Queue, Registry, Status,
};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::SgList;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::KeyRef;
use crate::crypto::passed_through;
use crate::engine::{Direction, XtsContext};
use crate::gate::KeyGate;
use crate::transform::{self, Numbering};

/// dm-crypt numbers sectors of this size.
pub const SECTOR_BYTES: u64 = 512;

/// What `bdev_hostcrypt_create` takes.
#[derive(Clone, Debug)]
pub struct HostcryptOptions {
    /// Name in the registry.
    pub name: String,
    /// The device below.
    pub base_bdev_name: String,
    /// The host's volume key: AES-256-XTS or AES-128-XTS by its length.
    pub key: Arc<KeyGate>,
    /// Where the key can be found again.
    pub key_ref: KeyRef,
    /// Identifies the key in the base's map, for [`Io::host_key`]; not 0.
    pub key_id: u16,
    /// Bytes in a data unit (dm-crypt's `sector_size`): 512 or 4096.
    pub sector_size_bytes: u32,
    /// Where the encrypted payload starts; what lies before passes as it is. A multiple of the block size.
    pub payload_offset_bytes: u64,
    /// Number of the payload's first sector (dm-crypt's `iv_offset`), in 512-byte sectors; a multiple of the unit.
    pub iv_offset: u64,
    /// dm-crypt's `iv_large_sectors`: tweaks count data units.
    pub iv_large_sectors: bool,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
}

struct Hostcrypt {
    info: DeviceInfo,
    base: Base,
    options: HostcryptOptions,
    /// Blocks of the base in one of ours: 1 or 8.
    ratio: u64,
}

fn check(options: &HostcryptOptions, below: &Bdev, block_bytes: u64) -> Result<(), BdevError> {
    let invalid = |what: String| Err(BdevError::Invalid(what));
    let size = below.size_bytes();
    let offset = options.payload_offset_bytes;
    if options.key_id == 0 {
        return invalid("key_id: 0 stands for no key".into());
    }
    if !offset.is_multiple_of(block_bytes) {
        return invalid(format!(
            "payload_offset {offset} is not a multiple of the block size of {block_bytes}"
        ));
    }
    if offset >= size {
        return invalid(format!(
            "payload_offset {offset} leaves nothing of {}, which has {size} bytes",
            below.name()
        ));
    }
    let per_unit = u64::from(options.sector_size_bytes) / SECTOR_BYTES;
    if !options.iv_offset.is_multiple_of(per_unit) {
        return invalid(format!(
            "iv_offset {} is not a multiple of {per_unit} (sectors of 512 bytes in a unit of {})",
            options.iv_offset, options.sector_size_bytes
        ));
    }
    // plain64 would wrap around inside the device: no host has such a volume.
    if options.iv_offset.checked_add(i64::MAX as u64 / SECTOR_BYTES).is_none() {
        return invalid(format!("iv_offset {} is too large", options.iv_offset));
    }
    let atomic = u64::from(below.info().atomic_blocks) * u64::from(below.block_size_bytes());
    if atomic < block_bytes {
        return invalid(format!(
            "sector_size {}: {} may tear a block of {block_bytes} bytes (its blocks have {} bytes); \
             create it with blocks of {block_bytes} bytes",
            options.sector_size_bytes,
            below.name(),
            below.block_size_bytes()
        ));
    }
    Ok(())
}

/// Creates a hostcrypt device; claims its base. Its blocks are the base's, or as large as a data unit if that is more.
///
/// # Errors
/// Unknown or claimed base, name taken, an offset or size that does not fit.
pub fn create(registry: &Arc<Registry>, options: HostcryptOptions) -> Result<Arc<Bdev>, BdevError> {
    if !matches!(options.sector_size_bytes, 512 | 4096) {
        return Err(BdevError::Invalid(format!(
            "sector_size {} is neither 512 nor 4096",
            options.sector_size_bytes
        )));
    }
    let unit = options.sector_size_bytes;
    let found = registry.get(&options.base_bdev_name)?;
    let ratio = u64::from(unit / found.block_size_bytes()).max(1);
    let uppers = vec![options.name.clone()];
    let on_resize = OnResize::FollowInUnitsOf(ratio);
    let base = Base::open(registry, &options.base_bdev_name, uppers, "hostcrypt", on_resize)?;
    let below = base.bdev().clone();
    let block_bytes = below.block_size_bytes().max(unit);
    check(&options, &below, u64::from(block_bytes))?;

    let mut info = DeviceInfo::stacked_on(below.info(), options.name.clone(), "hostcrypt");
    info.block_size_bytes = block_bytes;
    info.blocks = below.blocks() / ratio;
    info.uuid = options.uuid.unwrap_or(info.uuid);
    info.atomic_blocks = (u64::from(info.atomic_blocks) / ratio) as u32;
    info.optimal_io_blocks = u64::from(info.optimal_io_blocks).div_ceil(ratio) as u32;
    let own = OpSet::of(&[Op::Read, Op::Write, Op::Flush]);
    info.ops = passed_through(own, below.info().ops, &[Op::Unmap, Op::WriteUncorrectable, Op::Reset]);
    info.reports_unmapped &= u64::from(info.unmapped_blocks) <= ratio;
    info.unmapped_blocks = 1;
    if info.reports_unmapped {
        info.ops = passed_through(info.ops, below.info().ops, &[Op::WriteZeroes]);
    }
    Base::register(registry, Arc::new(Hostcrypt { info, base, options, ratio }), &below)
}

impl Device for Hostcrypt {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let o = &self.options;
        let shape = Shape {
            payload_offset_bytes: o.payload_offset_bytes,
            iv_offset: o.iv_offset,
            iv_large_sectors: o.iv_large_sectors,
            sector_size_bytes: o.sector_size_bytes,
            key_id: o.key_id,
            by_block: false,
        };
        let queue = HostcryptQueue::open(self.base.channel()?, &self.info, self.ratio, shape, &o.key);
        queue.map(|q| q as Rc<dyn Queue>).map_err(|e| BdevError::NoResources(e.to_string()))
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
        let mut params = self.params();
        params["access"] = self.options.key.access().word().into();
        json!({"hostcrypt": params})
    }

    fn config(&self) -> Vec<(String, Value)> {
        let mut params = self.params();
        params["uuid"] = self.info.uuid.to_string().into();
        vec![("bdev_hostcrypt_create".into(), params)]
    }
}

impl Hostcrypt {
    fn params(&self) -> Value {
        let o = &self.options;
        let mut v = json!({
            "name": self.info.name,
            "base_bdev_name": self.base.name(),
            "key_id": o.key_id,
            "sector_size": o.sector_size_bytes,
            "payload_offset": o.payload_offset_bytes,
            "iv_offset": o.iv_offset,
            "iv_large_sectors": o.iv_large_sectors,
        });
        o.key_ref.put(&mut v);
        v
    }
}

/// The host's layer: where it begins, how it is numbered, which key's it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Where the payload begins, a multiple of the block size.
    pub payload_offset_bytes: u64,
    /// Number of its first 512-byte sector.
    pub iv_offset: u64,
    /// Whether tweaks count data units instead of such sectors.
    pub iv_large_sectors: bool,
    /// Bytes in a data unit.
    pub sector_size_bytes: u32,
    /// For [`Io::host_key`].
    pub key_id: u16,
    /// The base, whose blocks are as large as ours, says block by block what is under the key ([`Io::as_sent`]). Otherwise all is.
    pub by_block: bool,
}

/// The layer on one core. A block of `info` is `ratio` blocks of the base.
pub(crate) struct HostcryptQueue {
    base: Channel,
    gate: Arc<KeyGate>,
    /// The gate's epoch that `context` belongs to.
    epoch: Cell<u64>,
    /// The key, set up; or what I/O ends with.
    context: RefCell<Result<XtsContext, Status>>,
    /// Looks at the gate when it changes; ends with the queue.
    watch: RefCell<Option<reactor::Task<()>>>,
    numbering: Numbering,
    /// Bytes in one of our blocks.
    block_bytes: u64,
    ratio: u64,
    key_id: u16,
    by_block: bool,
    reports_unmapped: bool,
}

/// Wipes the queue's copy of the key when it is taken away, also while there is no I/O.
fn watch(queue: &Rc<HostcryptQueue>) -> reactor::Task<()> {
    let (gate, queue) = (queue.gate.clone(), Rc::downgrade(queue));
    reactor::spawn_local(async move {
        let mut seen = queue.upgrade().map_or(0, |q| q.epoch.get());
        loop {
            gate.changed(seen).await;
            let Some(queue) = queue.upgrade() else { return };
            seen = gate.epoch();
            // A failure shows with the next I/O, which tries again.
            let _ = queue.look();
        }
    })
}

impl HostcryptQueue {
    /// Over a channel of the base.
    ///
    /// # Errors
    /// The cipher can not be set up.
    pub(crate) fn open(
        base: Channel,
        info: &DeviceInfo,
        ratio: u64,
        shape: Shape,
        gate: &Arc<KeyGate>,
    ) -> Result<Rc<HostcryptQueue>, crate::engine::EngineError> {
        let step_bytes =
            if shape.iv_large_sectors { u64::from(shape.sector_size_bytes) } else { SECTOR_BYTES };
        let queue = Rc::new(HostcryptQueue {
            gate: gate.clone(),
            epoch: Cell::new(0),
            context: RefCell::new(Err(Status::NAMESPACE_NOT_READY)),
            watch: RefCell::new(None),
            numbering: Numbering {
                origin: shape.payload_offset_bytes,
                first: shape.iv_offset / (step_bytes / SECTOR_BYTES),
                step_bytes,
                unit_bytes: shape.sector_size_bytes as usize,
            },
            block_bytes: u64::from(info.block_size_bytes),
            ratio,
            key_id: shape.key_id,
            by_block: shape.by_block,
            reports_unmapped: info.reports_unmapped,
            base,
        });
        queue.look()?;
        if !gate.is_fixed() {
            *queue.watch.borrow_mut() = Some(watch(&queue));
        }
        Ok(queue)
    }

    /// Takes over what the gate says now.
    #[cold]
    fn look(&self) -> Result<(), crate::engine::EngineError> {
        let (epoch, access) = self.gate.look();
        let context = match access.key() {
            Ok(key) => Ok(XtsContext::new(key)?),
            Err(status) => Err(status),
        };
        *self.context.borrow_mut() = context;
        self.epoch.set(epoch);
        Ok(())
    }

    /// Runs `f` with the key if hosts may use it now.
    fn with_key<T>(&self, f: impl FnOnce(&XtsContext) -> Result<T, Status>) -> Result<T, Status> {
        if self.epoch.get() != self.gate.epoch() {
            self.look().map_err(|_| Status::INTERNAL_ERROR)?;
        }
        f(self.context.borrow().as_ref().map_err(|status| *status)?)
    }

    /// Hands an I/O to the base, in the base's blocks; it comes back to us.
    fn down(self: &Rc<Self>, mut io: Box<Io>, into: SgList) {
        let (lba, blocks) = (io.lba, io.blocks);
        io.push_with(self.clone(), lba, blocks, into);
        io.lba = lba * self.ratio;
        io.blocks = blocks * self.ratio;
        self.base.submit(io);
    }

    /// What a write stores, and under which key: plaintext of the payload, or raw bytes before it. The range must not
    /// straddle the two.
    fn stored(&self, lba: u64, mut data: SgList) -> Result<(SgList, u16), Status> {
        let start = lba * self.block_bytes;
        if start < self.numbering.origin {
            return Ok((data, 0));
        }
        let len = data.len_bytes();
        let block = self.block_bytes as usize;
        let spans = transform::spans(self.numbering.origin, start, len, block, &[]);
        let begun = trace::begin();
        self.with_key(|context| {
            transform::apply(context, Direction::Decrypt, &self.numbering, start, &spans, &mut data, None)
        })?;
        begun.end(Stage::HostDecrypt);
        Ok((data, self.key_id))
    }

    fn write(self: Rc<Self>, mut io: Box<Io>) {
        let raw_blocks = (self.numbering.origin / self.block_bytes).saturating_sub(io.lba);
        if raw_blocks > 0 && raw_blocks < io.blocks {
            return self.write_straddling(io, raw_blocks);
        }
        match self.stored(io.lba, std::mem::take(&mut io.data)) {
            Ok((data, key)) => {
                io.data = data;
                io.host_key = key;
                self.down(io, SgList::new());
            }
            Err(status) => io.finish(status),
        }
    }

    /// A write over the seam between the raw part and the payload, as two writes.
    #[cold]
    fn write_straddling(self: Rc<Self>, mut io: Box<Io>, raw_blocks: u64) {
        reactor::spawn_local(async move {
            let mut tail = std::mem::take(&mut io.data);
            let head = tail.split_to((raw_blocks * self.block_bytes) as usize);
            let mut result = self.write_part(&io, 0, raw_blocks, head).await;
            if result.is_ok() {
                result = self.write_part(&io, raw_blocks, io.blocks - raw_blocks, tail).await;
            }
            io.up(result.err().unwrap_or(Status::SUCCESS));
        })
        .detach();
    }

    async fn write_part(&self, whole: &Io, skip: u64, blocks: u64, data: SgList) -> Result<(), Status> {
        let lba = whole.lba + skip;
        let mut part = Io::new(Op::Write, lba * self.ratio, blocks * self.ratio);
        (part.data, part.host_key) = self.stored(lba, data)?;
        part.fua = whole.fua;
        part.tag = whole.tag;
        let part = self.base.io(part).await;
        let status = part.status();
        part.recycle();
        status.ok()
    }

    /// Turns what the base returned into what the host wrote. Units are whole blocks of ours, the base's may be smaller.
    fn answer_read(&self, io: &mut Io, into: SgList) -> Result<(), Status> {
        let start = io.lba * self.block_bytes;
        let len = (io.blocks * self.block_bytes) as usize;
        let mut data = std::mem::take(&mut io.data);
        if data.len_bytes() != len {
            // A base that returns too much or too little: nothing of it can be trusted.
            return Err(Status::INTERNAL_ERROR);
        }
        if self.reports_unmapped {
            io.unmapped = self.in_our_blocks(&io.unmapped);
        } else {
            io.unmapped.clear();
        }
        let block = self.block_bytes as usize;
        let mut through = &io.unmapped;
        let both: BlockRanges;
        if self.by_block && !io.as_sent.is_empty() {
            both = through.iter().chain(&io.as_sent).copied().collect();
            through = &both;
        }
        let spans = transform::spans(self.numbering.origin, start, len, block, through);
        let into = Some(into).filter(|d| !d.is_empty());
        let begun = trace::begin();
        self.with_key(|context| {
            transform::apply(context, Direction::Encrypt, &self.numbering, start, &spans, &mut data, into)
        })?;
        begun.end(Stage::HostEncrypt);
        io.data = data;
        Ok(())
    }

    /// Ranges of the base's blocks as ranges of ours; a block of ours of which only a part is unmapped is mapped.
    fn in_our_blocks(&self, ranges: &[BlockRange]) -> BlockRanges {
        let ratio = self.ratio as u32;
        let mut sorted: BlockRanges = ranges.into();
        sorted.sort_unstable_by_key(|r| r.start);
        // Neighbouring ranges may share a block of ours.
        let mut merged = BlockRanges::new();
        for r in &sorted {
            match merged.last_mut() {
                Some(last) if last.start + last.blocks == r.start => last.blocks += r.blocks,
                _ => merged.push(*r),
            }
        }
        let ours = merged.iter().filter_map(|r| {
            let (start, end) = (r.start.div_ceil(ratio), (r.start + r.blocks) / ratio);
            (start < end).then(|| BlockRange { start, blocks: end - start })
        });
        ours.collect()
    }
}

impl Queue for HostcryptQueue {
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        if let Err(status) = self.with_key(|_| Ok(())) {
            return io.finish(status);
        }
        match io.op {
            Op::Write => self.write(io),
            Op::Read => {
                io.host_key = self.key_id;
                let into = std::mem::take(&mut io.data);
                self.down(io, into);
            }
            _ => self.down(io, SgList::new()),
        }
    }

    fn abort(&self, tag: u64) -> bool {
        self.base.abort(tag)
    }
}

impl Complete for HostcryptQueue {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        (io.lba, io.blocks) = (frame.lba, frame.word);
        let into = io.saved(&frame);
        let mut status = io.status();
        if io.op == Op::Read {
            if status.is_ok() {
                status = self.answer_read(&mut io, into).err().unwrap_or(Status::SUCCESS);
            } else {
                io.data = into;
            }
        }
        io.up(status);
    }
}
