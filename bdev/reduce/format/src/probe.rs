//! Recognises what a device carries already, so that creating a pool does not destroy it unasked.

use std::fmt;

use crate::block::MAGIC;

/// First bytes of a device that [`probe_foreign`] should see: up to and with a pool's second anchor.
pub const PROBE_HEAD_BYTES: usize = (1 << 20) + 4096;
/// Last bytes of a device that [`probe_foreign`] should see (ZFS labels, RAID 0.90 and 1.0, the second GPT).
pub const PROBE_TAIL_BYTES: usize = 1 << 20;

macro_rules! foreign {
    ($($name:ident, $text:literal;)*) => {
        /// What was found on a device.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(missing_docs)]
        pub enum Foreign { $($name),* }

        impl fmt::Display for Foreign {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$name => $text),* })
            }
        }
    };
}

foreign! {
    Pool, "a cryptfold pool";
    Ext2, "an ext2 file system";
    Ext3, "an ext3 file system";
    Ext4, "an ext4 file system";
    Xfs, "an XFS file system";
    Btrfs, "a btrfs file system";
    Bcachefs, "a bcachefs file system";
    F2fs, "an F2FS file system";
    Ntfs, "an NTFS file system";
    Fat, "a FAT file system";
    ExFat, "an exFAT file system";
    Iso9660, "an ISO 9660 image";
    Squashfs, "a squashfs image";
    Jfs, "a JFS file system";
    Reiserfs, "a ReiserFS file system";
    Gfs2, "a GFS2 file system";
    Apfs, "an APFS container";
    Luks1, "a LUKS1 volume";
    Luks2, "a LUKS2 volume";
    BitLocker, "a BitLocker volume";
    Integrity, "a dm-integrity device";
    LvmPv, "an LVM physical volume";
    Stratis, "a Stratis block device";
    Gpt, "a GPT partition table";
    Mbr, "an MBR partition table";
    Swap, "swap space";
    Zfs, "a ZFS member";
    SpdkBlobstore, "an SPDK blobstore";
    MdRaid, "a Linux RAID member";
    Bcache, "a bcache device";
    Vdo, "a VDO volume";
    Bluestore, "a Ceph BlueStore device";
    Drbd, "a DRBD device";
}

/// Signatures at fixed offsets from the front; the first that fits counts, containers before what they may contain.
const SIGNATURES: &[(usize, &[u8], Foreign)] = &[
    (0, &MAGIC, Foreign::Pool),
    (1 << 20, &MAGIC, Foreign::Pool),
    (0, b"SPDKBLOB", Foreign::SpdkBlobstore),
    (0, b"LUKS\xba\xbe\x00\x01", Foreign::Luks1),
    (0, b"LUKS\xba\xbe\x00\x02", Foreign::Luks2),
    // The second LUKS2 header alone, at the smallest of its places (LUKS2 on-disk format, section 2.1).
    (0x4000, b"SKUL\xba\xbe\x00\x02", Foreign::Luks2),
    (0, b"dmvdo001", Foreign::Vdo),
    (0, b"integrt\0", Foreign::Integrity),
    (0, b"XFSB", Foreign::Xfs),
    (0, b"hsqs", Foreign::Squashfs),
    (0, b"bluestore block device", Foreign::Bluestore),
    (0, &MD_MAGIC, Foreign::MdRaid),
    (4096, &MD_MAGIC, Foreign::MdRaid),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", Foreign::Bcachefs),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", Foreign::Bcache),
    (32, b"NXSB", Foreign::Apfs),
    (3, b"NTFS    ", Foreign::Ntfs),
    (3, b"EXFAT   ", Foreign::ExFat),
    (3, b"-FVE-FS-", Foreign::BitLocker),
    (54, b"FAT12   ", Foreign::Fat),
    (54, b"FAT16   ", Foreign::Fat),
    (82, b"FAT32   ", Foreign::Fat),
    (512, b"EFI PART", Foreign::Gpt),
    (4096, b"EFI PART", Foreign::Gpt),
    (512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh", Foreign::Stratis),
    (1024, &0xf2f5_2010u32.to_le_bytes(), Foreign::F2fs),
    (32768, b"JFS1", Foreign::Jfs),
    (32769, b"CD001", Foreign::Iso9660),
    (65536, &0x0116_1970u32.to_be_bytes(), Foreign::Gfs2),
    (65536 + 52, b"ReIsEr", Foreign::Reiserfs),
    (65536 + 64, b"_BHRfS_M", Foreign::Btrfs),
];

/// Linux RAID superblock magic.
const MD_MAGIC: [u8; 4] = 0xa92b_4efcu32.to_le_bytes();

fn at(bytes: &[u8], offset: usize, signature: &[u8]) -> bool {
    bytes.get(offset..).is_some_and(|bytes| bytes.starts_with(signature))
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let bytes = bytes.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

/// What the device with the first bytes `head` and the last bytes `tail` carries, if it is anything known.
///
/// Shorter pieces than [`PROBE_HEAD_BYTES`] and [`PROBE_TAIL_BYTES`] are taken, and show less. `tail` must end where the
/// device ends.
pub fn probe_foreign(head: &[u8], tail: &[u8]) -> Option<Foreign> {
    let fixed = SIGNATURES.iter().find(|(offset, signature, _)| at(head, *offset, signature));
    if let Some((_, _, foreign)) = fixed {
        return Some(*foreign);
    }
    let front = [lvm, ext, swap, zfs_label].into_iter().find_map(|probe| probe(head));
    front.or_else(|| probe_tail(tail)).or_else(|| mbr(head))
}

/// A label in one of the first four sectors ("LABELONE", type "LVM2 001").
fn lvm(head: &[u8]) -> Option<Foreign> {
    let label =
        |sector: usize| at(head, sector * 512, b"LABELONE") && at(head, sector * 512 + 24, b"LVM2 001");
    (0..4).any(label).then_some(Foreign::LvmPv)
}

/// ext2, 3 and 4 share magic 0xEF53 at 1080; the feature words at 1116 and 1120 tell them apart.
fn ext(head: &[u8]) -> Option<Foreign> {
    const HAS_JOURNAL: u32 = 0x4;
    // What ext3 knows: filetype, recover, journal_dev, meta_bg.
    const EXT3_INCOMPATIBLE: u32 = 0x2 | 0x4 | 0x8 | 0x10;
    // sparse_super, large_file, btree_dir.
    const EXT3_READ_ONLY: u32 = 0x1 | 0x2 | 0x4;
    if !at(head, 1080, &0xef53u16.to_le_bytes()) {
        return None;
    }
    let (compatible, incompatible, read_only) = (word(head, 1116), word(head, 1120), word(head, 1124));
    Some(if incompatible & !EXT3_INCOMPATIBLE != 0 || read_only & !EXT3_READ_ONLY != 0 {
        Foreign::Ext4
    } else if compatible & HAS_JOURNAL != 0 {
        Foreign::Ext3
    } else {
        Foreign::Ext2
    })
}

/// The signature ends the first page, whatever that machine's page size is.
fn swap(head: &[u8]) -> Option<Foreign> {
    let signature = |page: usize| at(head, page - 10, b"SWAPSPACE2") || at(head, page - 10, b"SWAP-SPACE");
    [4096, 8192, 16384, 32768, 65536].into_iter().any(signature).then_some(Foreign::Swap)
}

/// A label of 256 KiB has its uberblocks, each with magic 0x00bab10c in the writer's byte order, from 128 KiB on.
fn zfs_label(label: &[u8]) -> Option<Foreign> {
    const MAGIC: u64 = 0x00ba_b10c;
    const KIB: usize = 1024;
    let uberblock =
        |offset: usize| at(label, offset, &MAGIC.to_le_bytes()) || at(label, offset, &MAGIC.to_be_bytes());
    (128 * KIB..256 * KIB).step_by(KIB).any(uberblock).then_some(Foreign::Zfs)
}

fn probe_tail(tail: &[u8]) -> Option<Foreign> {
    let from_end = |bytes: usize| tail.len().checked_sub(bytes).map(|start| &tail[start..]);
    let found = |bytes, signature: &[u8]| from_end(bytes).is_some_and(|end| at(end, 0, signature));
    if found(512, b"EFI PART") || found(4096, b"EFI PART") {
        return Some(Foreign::Gpt);
    }
    // RAID 1.0: 8 to 12 KiB before the end, at 4 KiB. RAID 0.90: the last whole 64 KiB but one, at 64 KiB.
    if (8192..12288).step_by(512).any(|bytes| found(bytes, &MD_MAGIC))
        || (65536..131072).step_by(512).any(|bytes| found(bytes, &MD_MAGIC))
    {
        return Some(Foreign::MdRaid);
    }
    // The last two labels of a ZFS member; the device may end in a part of a label's size.
    let labels = (512 << 10..768 << 10).step_by(4096).filter_map(from_end);
    labels
        .into_iter()
        .find_map(|label| {
            let name_value_list = at(label, 16 << 10, &[1, 1, 0, 0]) || at(label, 16 << 10, &[1, 0, 0, 0]);
            if name_value_list { zfs_label(label) } else { None }
        })
        // DRBD's internal metadata: last 4 KiB, magic 0x8374026b or 0x8374026d big-endian at 60.
        .or_else(|| {
            let end = from_end(4096)?;
            let drbd = [0x8374_026bu32, 0x8374_026d].iter().any(|magic| at(end, 60, &magic.to_be_bytes()));
            drbd.then_some(Foreign::Drbd)
        })
}

/// A boot signature and at least one plausible partition.
fn mbr(head: &[u8]) -> Option<Foreign> {
    if !at(head, 510, &[0x55, 0xaa]) {
        return None;
    }
    let entry = |index: usize| &head[446 + 16 * index..446 + 16 * (index + 1)];
    let plausible = |entry: &[u8]| {
        matches!(entry[0], 0 | 0x80) && entry[4] != 0 && word(entry, 8) != 0 && word(entry, 12) != 0
    };
    (0..4).any(|index| plausible(entry(index))).then_some(Foreign::Mbr)
}
