//! The lists among the Identify data: namespaces, controllers, descriptors, command sets.

use zerocopy::little_endian::{U16, U32, U64};

use super::{BYTES, Csi};
use crate::ids::{Cntlid, Nsid};
use crate::wire::wire;

/// NSIDs in one list.
pub const MAX_NAMESPACES: usize = 1024;
/// Controllers in one list.
pub const MAX_CONTROLLERS: usize = 2047;

wire! {
    /// Namespace list (CNS 02h, 07h, 10h; NVMe Base 2.0 section 5.17.2): ascending, 0 after the last.
    pub struct NamespaceList: 4096 {
        /// The NSIDs.
        0 => pub nsid: [U32; 1024],
    }
}

impl NamespaceList {
    /// The first 1,024 of `nsids` that are greater than `after`. `nsids` must ascend.
    pub fn after(after: Nsid, nsids: impl IntoIterator<Item = Nsid>) -> Self {
        let mut list = Self::default();
        let wanted = nsids.into_iter().filter(|n| *n > after);
        for (slot, nsid) in list.nsid.iter_mut().zip(wanted) {
            *slot = U32::new(nsid.0);
        }
        list
    }

    /// The NSIDs up to the first 0.
    pub fn iter(&self) -> impl Iterator<Item = Nsid> {
        self.nsid.iter().map(|n| Nsid(n.get())).take_while(|n| *n != Nsid::NONE)
    }
}

wire! {
    /// Controller list (CNS 12h, 13h; NVMe Base 2.0 section 5.17.2): ascending.
    pub struct ControllerList: 4096 {
        /// Entries used, 0..=2047.
        0 => pub count: U16,
        /// The identifiers.
        2 => pub cntlid: [U16; 2047],
    }
}

impl ControllerList {
    /// The first 2,047 of `ids` that are at least `from`. `ids` must ascend.
    pub fn from(from: Cntlid, ids: impl IntoIterator<Item = Cntlid>) -> Self {
        let mut list = Self::default();
        let mut count = 0;
        for (slot, id) in list.cntlid.iter_mut().zip(ids.into_iter().filter(|id| *id >= from)) {
            *slot = U16::new(id.0);
            count += 1;
        }
        list.count = U16::new(count);
        list
    }

    /// The identifiers, as many as the count says and the list holds.
    pub fn iter(&self) -> impl Iterator<Item = Cntlid> {
        self.cntlid.iter().take(self.count.get().into()).map(|id| Cntlid(id.get()))
    }
}

wire! {
    /// I/O command set combinations (CNS 1Ch; NVMe Base 2.0 section 5.17.2): a bit per CSI.
    pub struct CommandSetCombinations: 4096 {
        /// The combinations, 0 after the last.
        0 => pub combination: [U64; 512],
    }
}

impl CommandSetCombinations {
    /// One combination: the NVM command set alone.
    pub fn nvm() -> Self {
        let mut list = Self::default();
        list.combination[0] = U64::new(1 << Csi::Nvm as u8);
        list
    }
}

/// One identifier of a namespace (NVMe Base 2.0 section 5.17.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NamespaceId {
    /// NIDT 1h, EUI64, big-endian.
    Eui64([u8; 8]),
    /// NIDT 2h, NGUID, big-endian.
    Nguid([u8; 16]),
    /// NIDT 3h, UUID, in RFC 4122 byte order.
    Uuid([u8; 16]),
    /// NIDT 4h, command set identifier, a [`Csi`] code.
    Csi(u8),
}

impl NamespaceId {
    fn parts(&self) -> (u8, &[u8]) {
        match self {
            Self::Eui64(id) => (1, id),
            Self::Nguid(id) => (2, id),
            Self::Uuid(id) => (3, id),
            Self::Csi(id) => (4, core::slice::from_ref(id)),
        }
    }
}

wire! {
    /// Namespace Identification Descriptor list (CNS 03h): descriptors, each a 4-byte header (NIDT, NIDL) and
    /// its identifier, one after the other; a zero NIDL ends it.
    pub struct DescriptorList: 4096 {
        /// The descriptors.
        0 => pub bytes: [u8; 4096],
    }
}

impl DescriptorList {
    /// The list of these descriptors; what no longer fits is left out.
    pub fn new(ids: &[NamespaceId]) -> Self {
        let mut list = Self::default();
        let mut at = 0;
        for (nidt, nid) in ids.iter().map(NamespaceId::parts) {
            let Some(slot) = list.bytes.get_mut(at..at + 4 + nid.len()) else { break };
            (slot[0], slot[1]) = (nidt, nid.len() as u8);
            slot[4..].copy_from_slice(nid);
            at += slot.len();
        }
        list
    }

    /// The descriptors of known type and right length, up to the end of the list.
    pub fn iter(&self) -> impl Iterator<Item = NamespaceId> {
        let mut at = 0;
        core::iter::from_fn(move || {
            while at + 4 <= BYTES {
                let (nidt, nidl) = (self.bytes[at], usize::from(self.bytes[at + 1]));
                let nid = self.bytes.get(at + 4..at + 4 + nidl).filter(|_| nidl != 0)?;
                at += 4 + nidl;
                let id = match nidt {
                    1 => nid.try_into().ok().map(NamespaceId::Eui64),
                    2 => nid.try_into().ok().map(NamespaceId::Nguid),
                    3 => nid.try_into().ok().map(NamespaceId::Uuid),
                    4 if nidl == 1 => Some(NamespaceId::Csi(nid[0])),
                    _ => None,
                };
                if id.is_some() {
                    return id;
                }
            }
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_golden_and_back() {
        let ids = [
            NamespaceId::Eui64([1; 8]),
            NamespaceId::Nguid([2; 16]),
            NamespaceId::Uuid([3; 16]),
            NamespaceId::Csi(0),
        ];
        let list = DescriptorList::new(&ids);
        assert_eq!(list.bytes[..14], [1, 8, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 16]);
        assert_eq!(list.bytes[52..58], [4, 1, 0, 0, 0, 0]);
        assert!(list.iter().eq(ids));
    }

    #[test]
    fn descriptor_lists_of_a_peer_end_somewhere() {
        let mut list = DescriptorList { bytes: [0xff; 4096] };
        assert_eq!(list.iter().count(), 0);
        // Unknown type and wrong length are skipped.
        list.bytes[..16].copy_from_slice(&[9, 2, 0, 0, 7, 7, 1, 1, 0, 0, 5, 4, 1, 0, 0, 2]);
        list.bytes[16..20].fill(0);
        assert_eq!(list.iter().collect::<Vec<_>>(), [NamespaceId::Csi(2)]);
        // The last descriptor claims more than there is.
        let many = vec![NamespaceId::Nguid([5; 16]); 300];
        let full = DescriptorList::new(&many);
        assert_eq!(full.iter().count(), 4096 / 20);
    }

    #[test]
    fn namespaces_and_controllers() {
        let list = NamespaceList::after(Nsid(2), (1..=5).map(Nsid));
        assert!(list.iter().eq([3, 4, 5].map(Nsid)));
        assert_eq!(NamespaceList::after(Nsid(0), (1..5000).map(Nsid)).iter().count(), 1024);
        let list = ControllerList::from(Cntlid(3), (1..=4).map(Cntlid));
        assert!(list.iter().eq([3, 4].map(Cntlid)));
        let mut many = ControllerList::from(Cntlid(0), (0..5000).map(Cntlid));
        assert_eq!((many.count.get(), many.iter().count()), (2047, 2047));
        many.count = U16::new(u16::MAX);
        assert_eq!(many.iter().count(), 2047);
    }
}
