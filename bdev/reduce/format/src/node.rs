//! Nodes: the blocks of the metadata tree, and the pointers between them.
//!
//! A pointer carries the child's tag, so a parent vouches for exactly one child: a lost write, an old version or another
//! node in its place do not open. The chain ends in the superblock, which is MACed.
//!
//! Pointer, 40 bytes (null = all zero):
//!
//! ```text
//! 0    device u16, flags u16 (zero), segment u32, offset u32, unit bytes u32
//! 16   birth epoch u32, reserved u32
//! 24   tag [16]
//! ```
//!
//! Node header, 32 bytes, followed by nonce, body and tag as in [`crate::sealed`]:
//!
//! ```text
//! 0    tree u8, level u8 (0 = leaf), codec u8, flags u8 (1 = body is sealed with the host's key inside)
//! 4    body bytes u32, plain bytes u32, birth epoch u32
//! 16   owner u64 (volume, domain or device, as the tree has it), index u64 (in its level)
//! ```
//!
//! With a host's key the (compressed) body is `nonce [12] | AES-256-GCM(host map key) | tag [16]`, so that garbage
//! collection can move the node without that key.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec::{Codec, Compressor, Decompressor};
use crate::fragment::MoveError;
use crate::ids::{DeviceIx, Epoch, Place, SegmentAddr, SegmentNo};
use crate::keys::HostMapKey;
use crate::sealed::{OpenError, SealError, SegmentKey, TAG_BYTES, gcm};

/// Bytes of a node's header.
pub const NODE_HEADER_BYTES: usize = 32;
/// Plain bytes of a node, at most.
pub const MAX_NODE_BYTES: usize = 64 << 10;
/// What a host's key adds to a body: nonce and tag.
pub const HOST_SEAL_BYTES: usize = 12 + TAG_BYTES;
/// Bytes of a sealed node on the device, at most.
pub const MAX_NODE_UNIT_BYTES: usize = NODE_HEADER_BYTES + 12 + MAX_NODE_BYTES + HOST_SEAL_BYTES + TAG_BYTES;
/// Children of an interior node.
pub const FANOUT: usize = 256;
/// Bytes of a pointer.
pub const PTR_BYTES: usize = 40;
/// Highest level of a tree.
pub const MAX_LEVEL: u8 = 6;

const FLAG_HOST: u8 = 1;

/// The trees of the pool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Tree {
    /// One node: the pool record. Owner 0.
    Pool = 1,
    /// Pages of domain records. Owner 0.
    Domains = 2,
    /// Pages of volume records. Owner 0.
    Volumes = 3,
    /// Leaves of [`crate::segtable::SEGMENTS_PER_LEAF`] entries. Owner: device.
    Segments = 4,
    /// Leaves of 512 map entries. Owner: the volume or snapshot.
    Map = 5,
    /// One leaf per container: references and fragments. Owner: domain.
    Containers = 6,
    /// One leaf per container: fingerprints. Owner: domain.
    Fingerprints = 7,
    /// Not used: a snapshot's map is its dead list.
    DeadList = 8,
    /// Saved parts of the fingerprint index; may be missing or old. Owner: domain.
    Index = 9,
    /// State of background work (progress, cursors). Owner 0.
    Jobs = 10,
}

impl Tree {
    /// From its number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        use Tree::*;
        [Pool, Domains, Volumes, Segments, Map, Containers, Fingerprints, DeadList, Index, Jobs]
            .into_iter()
            .find(|&tree| tree as u8 == raw)
    }
}

/// Which node: part of what is authenticated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NodeId {
    /// Tree.
    pub tree: Tree,
    /// Owner, see [`Tree`].
    pub owner: u64,
    /// Level, 0 = leaf.
    pub level: u8,
    /// Index within the level: a node at level `l` covers the leaves `index * FANOUT^l ..`.
    pub index: u64,
}

/// Pointer to a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NodePtr {
    /// Where it lies.
    pub place: Place,
    /// Bytes of the unit there.
    pub unit_bytes: u32,
    /// Epoch in which it was written.
    pub birth: Epoch,
    /// The unit's tag.
    pub tag: [u8; TAG_BYTES],
}

/// On-disk form of an optional [`NodePtr`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct NodePtrRaw {
    /// Device.
    pub device: U16,
    /// Zero.
    pub flags: U16,
    /// Segment.
    pub segment: U32,
    /// Offset in it.
    pub offset: U32,
    /// Unit bytes; 0 = null pointer.
    pub stored_len: U32,
    /// Birth epoch.
    pub birth: U32,
    /// Zero.
    pub reserved: U32,
    /// Tag.
    pub tag: [u8; TAG_BYTES],
}

const _: () = assert!(size_of::<NodePtrRaw>() == PTR_BYTES);

impl NodePtr {
    /// The on-disk form.
    pub fn to_raw(ptr: Option<&Self>) -> NodePtrRaw {
        let Some(ptr) = ptr else { return zerocopy::FromZeros::new_zeroed() };
        NodePtrRaw {
            device: ptr.place.segment.device.0.into(),
            flags: 0.into(),
            segment: ptr.place.segment.segment.0.into(),
            offset: ptr.place.offset.into(),
            stored_len: ptr.unit_bytes.into(),
            birth: ptr.birth.0.into(),
            reserved: 0.into(),
            tag: ptr.tag,
        }
    }

    /// From the on-disk form; `Ok(None)` if null.
    pub fn from_raw(raw: &NodePtrRaw) -> Result<Option<Self>, OpenError> {
        let unit_bytes = raw.stored_len.get();
        if unit_bytes == 0 {
            return match raw.as_bytes().iter().all(|&byte| byte == 0) {
                true => Ok(None),
                false => Err(OpenError::Malformed { field: "null pointer", value: raw.segment.get().into() }),
            };
        }
        if raw.flags != 0 || raw.reserved != 0 {
            return Err(OpenError::Malformed { field: "pointer flags", value: raw.flags.get().into() });
        }
        if !(NODE_HEADER_BYTES + TAG_BYTES..=MAX_NODE_UNIT_BYTES).contains(&(unit_bytes as usize)) {
            return Err(OpenError::Malformed { field: "unit bytes", value: unit_bytes.into() });
        }
        let segment =
            SegmentAddr { device: DeviceIx(raw.device.get()), segment: SegmentNo(raw.segment.get()) };
        let place = Place { segment, offset: raw.offset.get() };
        Ok(Some(Self { place, unit_bytes, birth: Epoch(raw.birth.get()), tag: raw.tag }))
    }
}

/// What a node's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeHeader {
    /// Which node.
    pub id: NodeId,
    /// How the body is encoded.
    pub codec: Codec,
    /// Whether a host's key seals the body inside.
    pub host_sealed: bool,
    /// Bytes of the body as stored.
    pub body_bytes: u32,
    /// Bytes of the decoded body.
    pub plain_bytes: u32,
    /// Epoch of writing.
    pub birth: Epoch,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    tree: u8,
    level: u8,
    codec: u8,
    flags: u8,
    body_bytes: U32,
    plain_bytes: U32,
    birth: U32,
    owner: U64,
    index: U64,
}

const _: () = assert!(size_of::<Raw>() == NODE_HEADER_BYTES);

impl NodeHeader {
    /// Parses a header; the plain, unauthenticated first bytes of a node.
    pub fn parse(bytes: &[u8]) -> Result<Self, OpenError> {
        let Ok((raw, _)) = Raw::ref_from_prefix(bytes) else {
            return Err(OpenError::Truncated { have: bytes.len(), need: NODE_HEADER_BYTES });
        };
        let bad = |field, value: u64| Err(OpenError::Malformed { field, value });
        let Some(tree) = Tree::from_raw(raw.tree) else { return bad("tree", raw.tree.into()) };
        let Some(codec) = Codec::from_raw(raw.codec) else { return bad("codec", raw.codec.into()) };
        if raw.level > MAX_LEVEL {
            return bad("level", raw.level.into());
        }
        if raw.flags & !FLAG_HOST != 0 {
            return bad("flags", raw.flags.into());
        }
        let host_sealed = raw.flags & FLAG_HOST != 0;
        let (body, plain) = (raw.body_bytes.get(), raw.plain_bytes.get());
        if plain == 0 || plain as usize > MAX_NODE_BYTES {
            return bad("plain bytes", plain.into());
        }
        let encoded = (body as usize).checked_sub(if host_sealed { HOST_SEAL_BYTES } else { 0 });
        match (encoded, codec) {
            (Some(encoded), Codec::Raw) if encoded == plain as usize => {}
            (Some(encoded), Codec::Lz4 | Codec::Zstd) if encoded > 0 && encoded < plain as usize => {}
            _ => return bad("body bytes", body.into()),
        }
        let id = NodeId { tree, owner: raw.owner.get(), level: raw.level, index: raw.index.get() };
        let birth = Epoch(raw.birth.get());
        Ok(Self { id, codec, host_sealed, body_bytes: body, plain_bytes: plain, birth })
    }

    /// Bytes of the whole node in a segment of this key.
    pub fn unit_bytes(&self, key: &SegmentKey) -> usize {
        key.unit_bytes(NODE_HEADER_BYTES, self.body_bytes as usize)
    }

    fn raw(&self) -> Raw {
        Raw {
            tree: self.id.tree as u8,
            level: self.id.level,
            codec: self.codec as u8,
            flags: if self.host_sealed { FLAG_HOST } else { 0 },
            body_bytes: self.body_bytes.into(),
            plain_bytes: self.plain_bytes.into(),
            birth: self.birth.0.into(),
            owner: self.id.owner.into(),
            index: self.id.index.into(),
        }
    }
}

/// A host's map key, ready for use.
pub struct HostSeal(LessSafeKey);

impl HostSeal {
    /// Prepares `key`.
    pub fn new(key: &HostMapKey) -> Self {
        Self(gcm(&key.0))
    }

    fn seal(&self, id: &NodeId, nonce: [u8; 12], body: &mut Vec<u8>) -> Result<(), SealError> {
        let aad = Aad::from(host_context(id));
        let tag = self
            .0
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), aad, body)
            .map_err(|_| SealError::Cipher)?;
        body.splice(..0, nonce);
        body.extend_from_slice(tag.as_ref());
        Ok(())
    }

    /// Opens `body` in place, leaving the encoded body.
    fn open(&self, id: &NodeId, place: Place, body: &mut Vec<u8>) -> Result<(), OpenError> {
        let failed = OpenError::Tag { place };
        let nonce = <[u8; 12]>::try_from(body.get(..12).ok_or(failed)?).map_err(|_| failed)?;
        body.drain(..12);
        let aad = Aad::from(host_context(id));
        let len =
            self.0.open_in_place(Nonce::assume_unique_for_key(nonce), aad, body).map_err(|_| failed)?.len();
        body.truncate(len);
        Ok(())
    }
}

impl std::fmt::Debug for HostSeal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostSeal(..)")
    }
}

fn host_context(id: &NodeId) -> [u8; 18] {
    let mut context = [0; 18];
    context[0] = id.tree as u8;
    context[1] = id.level;
    context[2..10].copy_from_slice(&id.owner.to_le_bytes());
    context[10..].copy_from_slice(&id.index.to_le_bytes());
    context
}

/// What sealing a node takes besides its key, place and content.
#[derive(Default)]
pub struct NodeOptions<'a> {
    /// Compress with zstd level 1, if it helps.
    pub compressor: Option<&'a mut Compressor>,
    /// Seal the body inside with a host's key, under this nonce (random, or never used before with this key).
    pub host: Option<(&'a HostSeal, [u8; 12])>,
    /// For tests: without it [`crate::segment::Cipher::GcmStoredNonce`] makes one.
    pub nonce: Option<[u8; 12]>,
}

/// Seals the node `id` with content `plain` (1 ..= [`MAX_NODE_BYTES`] bytes) for byte `offset` of the segment: appends the
/// unit to `out` and gives the pointer to it.
pub fn seal_node(
    key: &SegmentKey,
    offset: u32,
    id: NodeId,
    birth: Epoch,
    plain: &[u8],
    options: NodeOptions<'_>,
    out: &mut Vec<u8>,
) -> Result<NodePtr, SealError> {
    if plain.is_empty() || plain.len() > MAX_NODE_BYTES {
        return Err(SealError::Range { field: "node bytes", value: plain.len() as u64 });
    }
    if id.level > MAX_LEVEL {
        return Err(SealError::Range { field: "level", value: id.level.into() });
    }
    let (codec, mut body) = match options.compressor {
        Some(compressor) => compressor.compress_node(plain),
        None => (Codec::Raw, plain.to_vec()),
    };
    let host_sealed = options.host.is_some();
    if let Some((seal, nonce)) = options.host {
        seal.seal(&id, nonce, &mut body)?;
    }
    let header = NodeHeader {
        id,
        codec,
        host_sealed,
        body_bytes: body.len() as u32,
        plain_bytes: plain.len() as u32,
        birth,
    };
    append(key, offset, &header, &body, options.nonce, out)
}

fn append(
    key: &SegmentKey,
    offset: u32,
    header: &NodeHeader,
    body: &[u8],
    nonce: Option<[u8; 12]>,
    out: &mut Vec<u8>,
) -> Result<NodePtr, SealError> {
    let start = out.len();
    let unit_bytes = header.unit_bytes(key);
    out.resize(start + unit_bytes, 0);
    let unit = &mut out[start..];
    unit[..NODE_HEADER_BYTES].copy_from_slice(header.raw().as_bytes());
    match key.seal(offset, NODE_HEADER_BYTES, Some(body), nonce, unit) {
        Ok(tag) => {
            let unit_bytes = unit_bytes as u32;
            Ok(NodePtr { place: key.place(offset), unit_bytes, birth: header.birth, tag })
        }
        Err(error) => {
            out.truncate(start);
            Err(error)
        }
    }
}

/// What the reader of a node expects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// Tree.
    pub tree: Tree,
    /// Owner, where it is certain (not in a clone's map).
    pub owner: Option<u64>,
    /// Level.
    pub level: u8,
    /// Index.
    pub index: u64,
}

/// Opens the node that `ptr` points to from `unit`, the `ptr.unit_bytes` bytes read at its place; `plain` is overwritten
/// with its content. The node must be exactly the one that the parent vouched for, and be what is `expected`.
pub fn open_node(
    key: &SegmentKey,
    ptr: &NodePtr,
    expected: &Expected,
    unit: &[u8],
    host: Option<&HostSeal>,
    codec: &mut Decompressor,
    plain: &mut Vec<u8>,
) -> Result<NodeHeader, OpenError> {
    let place = ptr.place;
    let (header, mut body) = open_body(key, ptr, unit)?;
    let differs = |what, found, expected| Err(OpenError::WrongUnit { what, found, expected });
    if header.id.tree != expected.tree {
        return differs("tree", header.id.tree as u64, expected.tree as u64);
    }
    if header.id.level != expected.level {
        return differs("level", header.id.level.into(), expected.level.into());
    }
    if header.id.index != expected.index {
        return differs("index", header.id.index, expected.index);
    }
    if let Some(owner) = expected.owner.filter(|&owner| owner != header.id.owner) {
        return differs("owner", header.id.owner, owner);
    }
    match (header.host_sealed, host) {
        (true, Some(host)) => host.open(&header.id, place, &mut body)?,
        (true, None) => return Err(OpenError::Malformed { field: "host's key missing, flags", value: 1 }),
        (false, _) => {}
    }
    if header.codec == Codec::Raw {
        *plain = body;
    } else {
        plain.clear();
        plain.resize(header.plain_bytes as usize, 0);
        codec.decompress(header.codec, &body, plain)?;
    }
    Ok(header)
}

fn open_body(key: &SegmentKey, ptr: &NodePtr, unit: &[u8]) -> Result<(NodeHeader, Vec<u8>), OpenError> {
    let failed = OpenError::Tag { place: ptr.place };
    let need = ptr.unit_bytes as usize;
    let Some(unit) = unit.get(..need) else {
        return Err(OpenError::Truncated { have: unit.len(), need });
    };
    // The parent's tag first: it decides even where a stale node would still open by itself.
    if key.addr() != ptr.place.segment || !unit.ends_with(&ptr.tag) {
        return Err(failed);
    }
    let header = NodeHeader::parse(unit)?;
    if header.unit_bytes(key) != need || header.birth != ptr.birth {
        return Err(failed);
    }
    let mut body = vec![0; header.body_bytes as usize];
    key.open(ptr.place.offset, NODE_HEADER_BYTES, body.len(), unit, &mut body)?;
    Ok((header, body))
}

/// Moves a node to another place without a look inside (so without a host's key): appends the new unit to `out`.
pub fn move_node(
    old: &SegmentKey,
    ptr: &NodePtr,
    unit: &[u8],
    (new, to): (&SegmentKey, u32),
    nonce: Option<[u8; 12]>,
    out: &mut Vec<u8>,
) -> Result<NodePtr, MoveError> {
    let (header, body) = open_body(old, ptr, unit)?;
    Ok(append(new, to, &header, &body, nonce, out)?)
}

/// An interior node: [`FANOUT`] pointers.
#[derive(Clone, PartialEq, Eq)]
pub struct Interior(Vec<NodePtrRaw>);

impl Default for Interior {
    fn default() -> Self {
        Self(vec![NodePtr::to_raw(None); FANOUT])
    }
}

impl std::fmt::Debug for Interior {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Interior {
    /// Child `at`, below [`FANOUT`].
    pub fn get(&self, at: usize) -> Option<NodePtr> {
        // Checked when it came in.
        NodePtr::from_raw(&self.0[at]).ok().flatten()
    }

    /// Sets child `at`.
    pub fn set(&mut self, at: usize, ptr: Option<&NodePtr>) {
        self.0[at] = NodePtr::to_raw(ptr);
    }

    /// Children that are not null, with their places.
    pub fn iter(&self) -> impl Iterator<Item = (usize, NodePtr)> {
        (0..FANOUT).filter_map(|at| Some((at, self.get(at)?)))
    }

    /// The node's content: pointers up to the last one that is not null (at least one).
    pub fn encode(&self) -> &[u8] {
        let used = self.0.iter().rposition(|raw| raw.stored_len != 0).unwrap_or(0);
        self.0[..=used].as_bytes()
    }

    /// Parses a node's content; every pointer is checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, OpenError> {
        let bad = OpenError::Malformed { field: "interior node bytes", value: bytes.len() as u64 };
        let found = <[NodePtrRaw]>::ref_from_bytes(bytes).map_err(|_| bad)?;
        if found.is_empty() || found.len() > FANOUT {
            return Err(bad);
        }
        let mut node = Self::default();
        for (raw, found) in node.0.iter_mut().zip(found) {
            NodePtr::from_raw(found)?;
            *raw = *found;
        }
        Ok(node)
    }
}

#[cfg(test)]
pub(crate) fn layouts() -> Vec<crate::layout::Layout> {
    use crate::layout::layout;
    vec![
        layout!("pointer", NodePtrRaw { device flags segment offset stored_len birth reserved tag }),
        layout!("node header", Raw { tree level codec flags body_bytes plain_bytes birth owner index }),
    ]
}
