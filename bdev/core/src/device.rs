//! The contract of a block device: what it says about itself, and the per-core queue that takes its I/O.

use std::rc::Rc;
use std::sync::Arc;

use uuid::Uuid;

use crate::{BdevError, Io, Op, OpSet};

/// What a device is. Sizes in bytes say so in their name, everything else is in blocks.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Name in the registry.
    pub name: String,
    /// Kind of device, for people ("Malloc disk").
    pub product_name: &'static str,
    /// Stable identity.
    pub uuid: Uuid,
    /// Other names that lead here (a volume's `POOL/VOLUME`).
    pub aliases: Vec<String>,
    /// Bytes in a block: 512 or 4096.
    pub block_size_bytes: u32,
    /// Blocks at registration; [`crate::Bdev::set_blocks`] changes the live number.
    pub blocks: u64,
    /// What the device does itself; the core emulates write-zeroes, compare, compare-and-write and copy on top of
    /// read and write.
    pub ops: OpSet,
    /// Whether completed writes may be lost until a flush.
    pub write_cache: bool,
    /// Largest aligned unit that is never torn, in blocks (a 4 KiB chunk; 1 where nothing is promised beyond a block).
    pub atomic_blocks: u32,
    /// Size and alignment at which writes are fastest, in blocks (0 = no preference).
    pub optimal_io_blocks: u32,
    /// Required alignment of buffer addresses, as a power of two in bytes (4096 for O_DIRECT files).
    pub buffer_align_bytes: u32,
    /// A written buffer of this size, at a multiple of it, is kept as it is instead of being copied (0: none). Such a device
    /// has [`fence_streams`](cryptfold_reactor::memory::fence_streams) executed before anybody else sees the bytes, so they may
    /// have been stored past the caches. A promise of this device alone: layers do not pass it on.
    pub keeps_bytes: u32,
    /// Reads report unmapped ranges, and unmapped or zeroed ranges read back as unmapped.
    pub reports_unmapped: bool,
    /// In blocks, the aligned unit by which they do: of one that is unmapped or zeroed in part, all counts as written.
    pub unmapped_blocks: u32,
    /// Space is allocated on first write.
    pub thin: bool,
    /// Writes are refused.
    pub read_only: bool,
}

impl DeviceInfo {
    /// A device with read, write, flush and reset, and nothing special.
    pub fn new(
        name: impl Into<String>,
        product_name: &'static str,
        block_size_bytes: u32,
        blocks: u64,
    ) -> Self {
        DeviceInfo {
            name: name.into(),
            product_name,
            uuid: Uuid::new_v4(),
            aliases: Vec::new(),
            block_size_bytes,
            blocks,
            ops: OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset]),
            write_cache: false,
            atomic_blocks: 1,
            optimal_io_blocks: 0,
            buffer_align_bytes: 1,
            keeps_bytes: 0,
            reports_unmapped: false,
            unmapped_blocks: 1,
            thin: false,
            read_only: false,
        }
    }

    /// What a layer on top of `base` starts from: the base's geometry and promises under a new name. Its identity is made of
    /// the base's and the name (RFC 9562, version 5), so hosts find the same namespace after a restart.
    pub fn stacked_on(base: &DeviceInfo, name: impl Into<String>, product_name: &'static str) -> Self {
        let name = name.into();
        DeviceInfo {
            product_name,
            uuid: Uuid::new_v5(&base.uuid, name.as_bytes()),
            name,
            aliases: Vec::new(),
            keeps_bytes: 0,
            ..base.clone()
        }
    }
}

/// Space behind a thin device, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Left, now.
    pub free_bytes: u64,
    /// All there is.
    pub total_bytes: u64,
}

impl Space {
    /// Percent left, rounded down: 0..=100.
    pub fn free_percent(&self) -> u8 {
        let percent = u128::from(self.free_bytes) * 100 / u128::from(self.total_bytes.max(1));
        percent.min(100) as u8
    }
}

/// Space below which people are warned, percent.
pub const LOW_PERCENT: u8 = 10;
/// Space below which they are warned once more, percent.
const CRITICAL_PERCENT: u8 = 2;
/// So much more than a threshold has to be free before falling below it counts again, percent.
const HYSTERESIS_PERCENT: u8 = 2;

/// How much of a [`Space`] is left, as people are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    /// [`LOW_PERCENT`] or more.
    #[default]
    Enough,
    /// Less.
    Low,
    /// Less than 2%.
    Critical,
}

impl Room {
    /// With so much free (percent): down at a threshold, up only well above it.
    #[must_use]
    pub fn next(self, free_percent: u8) -> Room {
        let below =
            |limit: u8, is: Room| free_percent < limit + if self >= is { HYSTERESIS_PERCENT } else { 0 };
        match () {
            () if below(CRITICAL_PERCENT, Room::Critical) => Room::Critical,
            () if below(LOW_PERCENT, Room::Low) => Room::Low,
            () => Room::Enough,
        }
    }
}

/// Lets a kind of device find its own again (to change a latency, to inject an error).
pub trait AsAny: 'static {
    /// The device as what it is.
    fn as_any(&self) -> &dyn std::any::Any;
}

impl<T: 'static> AsAny for T {
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A kind of block device. Shared by all cores: everything that an I/O touches belongs in the [`Queue`].
pub trait Device: AsAny + Send + Sync {
    /// What it is, as registered.
    fn info(&self) -> &DeviceInfo;

    /// A queue for the current reactor's core.
    ///
    /// # Errors
    /// When the core's resources (rings, queue pairs, memory) do not allow another one.
    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError>;

    /// Called once, on any thread, after the last descriptor has closed and the device left the registry. Gives back
    /// what the device holds (descriptors of its base, files).
    fn destruct(&self) {}

    /// Space that the device shares out, where it can run out before the device is full. Any thread, does not block.
    fn space(&self) -> Option<Space> {
        None
    }

    /// Bytes of this device that have content, where that is known and may be less than its size: what was never written or
    /// given up again is not in it. Moments old. Any thread, does not block.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    /// The `driver_specific` object of `bdev_get_bdevs`.
    fn driver_specific(&self) -> serde_json::Value {
        serde_json::Value::Object(serde_json::Map::new())
    }

    /// The calls that create this device again: (method, params). Keys appear as references only.
    fn config(&self) -> Vec<(String, serde_json::Value)> {
        Vec::new()
    }
}

/// A device's end on one core. Lives and dies on its reactor; `Drop` gives its resources back.
pub trait Queue {
    /// Takes an I/O whose range, buffers and operation are within what the device's info says (the core has checked).
    /// Ends it by [`Io::finish`] (or [`Io::up`] from a completion), on this core, exactly once, and never by a panic.
    fn submit(self: Rc<Self>, io: Box<Io>);

    /// Ends the outstanding I/O with this tag early if the device can. Best effort; true when it was found.
    fn abort(&self, _tag: u64) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceInfo;
    use super::Room::{self, Critical, Enough, Low};

    #[test]
    fn a_layer_is_the_same_after_a_restart() {
        let disk = DeviceInfo::new("disk", "Malloc disk", 512, 8);
        let layer = |base: &DeviceInfo, name: &str| DeviceInfo::stacked_on(base, name, "crypto").uuid;
        assert_eq!(layer(&disk, "a"), layer(&disk.clone(), "a"));
        let other = DeviceInfo::new("disk", "Malloc disk", 512, 8);
        let all = [disk.uuid, other.uuid, layer(&disk, "a"), layer(&disk, "b"), layer(&other, "a")];
        assert!(all.iter().all(|x| all.iter().filter(|y| x == *y).count() == 1), "{all:?}");
    }

    #[test]
    fn space_that_wavers_around_a_threshold_warns_once() {
        let seen: Vec<Room> = [100, 10, 9, 10, 11, 9, 12, 9, 2, 1, 2, 3, 1, 4, 11, 12, 0, 100]
            .into_iter()
            .scan(Enough, |room, free| {
                *room = room.next(free);
                Some(*room)
            })
            .collect();
        let low = [Enough, Enough, Low, Low, Low, Low, Enough, Low, Low];
        let critical = [Critical, Critical, Critical, Critical, Low, Low, Enough, Critical, Enough];
        assert_eq!(seen, [low, critical].concat());
    }
}
