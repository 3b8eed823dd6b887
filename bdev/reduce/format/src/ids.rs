//! Numbers that must not be mixed up, and addresses built from them.

use std::fmt;

macro_rules! number {
    ($(#[$meta:meta])* $name:ident, $repr:ty) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// Index into the superblock's device table.
    DeviceIx, u16
);
number!(
    /// Number of a segment on its device; segment `n` is the bytes from `n * segment_bytes` on.
    SegmentNo, u32
);
number!(
    /// Counts the openings of a segment: never repeats for the same segment, 0 = never opened.
    Incarnation, u64
);
number!(
    /// Deduplication domain. 0 is the pool's own metadata; domains of volumes count from 1 and are not reused.
    DomainId, u32
);
number!(
    /// Generation of a domain's data key and fingerprint secret, from 1.
    Generation, u32
);
number!(
    /// Volume, snapshot or clone. Counts from 1 and is not reused.
    VolumeId, u32
);
number!(
    /// Birth epoch: advanced by every snapshot, orders map entries against snapshots.
    Epoch, u32
);
number!(
    /// Key under which the host had encrypted a block; 0 = stored as the host sent it.
    HostKeyId, u16
);
number!(
    /// Number of a 4 KiB block of a volume.
    Lba, u64
);
number!(
    /// Shard of the pool: owner of a journal ring.
    ShardIx, u16
);
number!(
    /// Sequence number of a journal batch within its shard, from 1, continued across owners.
    Sequence, u64
);
number!(
    /// Counts the openings of a pool.
    OwnerEpoch, u64
);

/// The pool's own domain, whose data key derives from the pool key.
pub const POOL_DOMAIN: DomainId = DomainId(0);
/// Chunk slots of a container.
pub const SLOTS: usize = 512;
/// Largest container number (48 bit).
pub const MAX_CONTAINER: u64 = (1 << 48) - 1;

/// A container within its domain, 1 ..= 2^48 - 1; numbers are not reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(u64);

impl ContainerId {
    /// `None` unless `1 <= number <= MAX_CONTAINER`.
    pub const fn new(number: u64) -> Option<Self> {
        if number == 0 || number > MAX_CONTAINER { None } else { Some(Self(number)) }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The shard that owns it, in a pool of `shards` (at least 1) shards.
    pub const fn shard(self, shards: u16) -> ShardIx {
        ShardIx((self.0 % shards as u64) as u16)
    }

    /// Its leaf in the trees of its shard.
    pub const fn leaf(self, shards: u16) -> u64 {
        self.0 / shards as u64
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContainerId({})", self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The stable address of a chunk within its domain: (container, slot), packed as `container << 16 | slot`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkAddr(u64);

impl ChunkAddr {
    /// `None` if `slot >= SLOTS`.
    pub const fn new(container: ContainerId, slot: u16) -> Option<Self> {
        if (slot as usize) < SLOTS { Some(Self(container.0 << 16 | slot as u64)) } else { None }
    }

    /// From the packed form; `None` if it is none.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        match ContainerId::new(raw >> 16) {
            Some(container) => Self::new(container, raw as u16),
            None => None,
        }
    }

    /// `container << 16 | slot`.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The container.
    pub const fn container(self) -> ContainerId {
        ContainerId(self.0 >> 16)
    }

    /// The slot, below [`SLOTS`].
    pub const fn slot(self) -> u16 {
        self.0 as u16
    }

    /// The address `slots` further in the same container.
    pub const fn plus(self, slots: u16) -> Option<Self> {
        match self.slot().checked_add(slots) {
            Some(slot) => Self::new(self.container(), slot),
            None => None,
        }
    }
}

impl fmt::Debug for ChunkAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkAddr({}:{})", self.container(), self.slot())
    }
}

/// A segment in the pool.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SegmentAddr {
    /// Its device.
    pub device: DeviceIx,
    /// Its number there.
    pub segment: SegmentNo,
}

/// A place in the pool: `offset` bytes into a segment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Place {
    /// The segment.
    pub segment: SegmentAddr,
    /// Byte offset from the segment's first byte (its header block).
    pub offset: u32,
}
