//! Equal parts of a device, each a device of its own: `<base>p0`, `<base>p1`, ...

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cryptfold_bdev::{
    Base, Bdev, BdevError, Channel, Complete, Device, DeviceInfo, Frame, Io, OnResize, Op, Queue, Registry,
};
use serde_json::{Value, json};

/// What `bdev_split_create` takes.
#[derive(Clone, Debug)]
pub struct SplitOptions {
    /// The device to split.
    pub base_bdev: String,
    /// Number of parts, at least 1.
    pub split_count: u64,
    /// Size of each part in MiB; the base's size divided by the count when not given.
    pub split_size_mb: Option<u64>,
}

/// What the parts share.
struct Whole {
    base: Base,
    parts_left: AtomicUsize,
    split_count: u64,
    split_size_mb: u64,
}

struct Part {
    info: DeviceInfo,
    whole: Arc<Whole>,
    offset_blocks: u64,
    index: u64,
}

/// Splits a device; claims it. Returns the parts.
///
/// # Errors
/// Unknown or claimed base, parts that do not fit or are empty, a name that is taken (then no part is left behind).
pub fn create(registry: &Arc<Registry>, options: SplitOptions) -> Result<Vec<Arc<Bdev>>, BdevError> {
    let below = registry.get(&options.base_bdev)?;
    let (count, bs) = (options.split_count, u64::from(below.block_size_bytes()));
    if count == 0 || count > 4096 {
        return Err(BdevError::Invalid(format!("split_count is {count}; 1 to 4096 are possible")));
    }
    let part_blocks = match options.split_size_mb {
        Some(mb) if mb > 0 => mb.checked_mul(1 << 20).map(|b| b / bs).unwrap_or(u64::MAX),
        _ => below.blocks() / count,
    };
    if part_blocks == 0 || part_blocks.checked_mul(count).is_none_or(|all| all > below.blocks()) {
        return Err(BdevError::Invalid(format!(
            "split_count {count} of {part_blocks} blocks each do not fit into the {} blocks of {}",
            below.blocks(),
            below.name()
        )));
    }
    let names: Vec<String> = (0..count).map(|i| format!("{}p{i}", below.name())).collect();
    let base = Base::open(registry, &options.base_bdev, names.clone(), "Split Disk", OnResize::Keep)?;
    let whole = Arc::new(Whole {
        base,
        parts_left: AtomicUsize::new(count as usize),
        split_count: count,
        split_size_mb: options.split_size_mb.unwrap_or(0),
    });
    let mut parts: Vec<Arc<Bdev>> = Vec::new();
    for (index, name) in (0..count).zip(names) {
        let mut info = DeviceInfo::stacked_on(below.info(), name, "Split Disk");
        info.blocks = part_blocks;
        let offset_blocks = index * part_blocks;
        if !offset_blocks.is_multiple_of(u64::from(info.atomic_blocks.max(1))) {
            // Its aligned units lie across the base's.
            info.atomic_blocks = 1;
        }
        let part = Part { info, whole: whole.clone(), offset_blocks, index };
        match Base::register(registry, Arc::new(part), &below) {
            Ok(b) => parts.push(b),
            Err(e) => {
                for p in &parts {
                    drop(registry.unregister(p.name()));
                }
                whole.base.close();
                return Err(e);
            }
        }
    }
    Ok(parts)
}

/// Removes all parts of `base_bdev`.
///
/// # Errors
/// When the device is not split.
pub fn delete(registry: &Arc<Registry>, base_bdev: &str) -> Result<(), BdevError> {
    let base = registry.get(base_bdev)?;
    let names: Vec<String> = registry
        .list()
        .iter()
        .filter(|b| b.info().product_name == "Split Disk")
        .filter(|b| b.device().driver_specific()["split"]["base_bdev"] == base.name())
        .map(|b| b.name().to_string())
        .collect();
    if names.is_empty() {
        return Err(BdevError::NotFound(format!("{base_bdev} (not split)")));
    }
    for n in names {
        drop(registry.unregister(&n));
    }
    Ok(())
}

impl Device for Part {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(PartQueue { base: self.whole.base.channel()?, offset_blocks: self.offset_blocks }))
    }

    fn destruct(&self) {
        if self.whole.parts_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.whole.base.close();
        }
    }

    fn space(&self) -> Option<cryptfold_bdev::Space> {
        self.whole.base.bdev().device().space()
    }

    fn driver_specific(&self) -> Value {
        json!({"split": {"base_bdev": self.whole.base.name(), "offset_blocks": self.offset_blocks}})
    }

    fn config(&self) -> Vec<(String, Value)> {
        // One call makes all parts; the first one speaks for them.
        if self.index != 0 {
            return Vec::new();
        }
        let mut params = json!({"base_bdev": self.whole.base.name(), "split_count": self.whole.split_count});
        if self.whole.split_size_mb != 0 {
            params["split_size_mb"] = self.whole.split_size_mb.into();
        }
        vec![("bdev_split_create".into(), params)]
    }
}

struct PartQueue {
    base: Channel,
    offset_blocks: u64,
}

impl Queue for PartQueue {
    #[inline]
    fn submit(self: Rc<Self>, mut io: Box<Io>) {
        let (lba, src) = (io.lba, io.src_lba);
        if !matches!(io.op, Op::Flush | Op::Reset) {
            io.lba += self.offset_blocks;
            io.src_lba += self.offset_blocks;
        }
        let base = self.base.clone();
        io.push(self, lba, src);
        base.submit(io);
    }

    fn abort(&self, tag: u64) -> bool {
        self.base.abort(tag)
    }
}

impl Complete for PartQueue {
    #[inline]
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        io.lba = frame.lba;
        io.src_lba = frame.word;
        let status = io.status();
        io.up(status);
    }
}
