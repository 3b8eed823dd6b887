//! Foreign contents, as the programs that make them lay them out.

use cryptfold_reduce_format::probe::*;

fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = vec![0; PROBE_HEAD_BYTES];
    parts.iter().for_each(|(at, bytes)| image[*at..at + bytes.len()].copy_from_slice(bytes));
    image
}

fn tail(from_end: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = vec![0; PROBE_TAIL_BYTES];
    let at = image.len() - from_end;
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn nothing_is_nothing() {
    assert_eq!(probe_foreign(&head(&[]), &tail(16, &[])), None);
    assert_eq!(probe_foreign(&[], &[]), None);
    let noise: Vec<u8> =
        (0..PROBE_HEAD_BYTES as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(probe_foreign(&noise, &noise), None);
}

#[test]
fn signatures_at_the_front() {
    for (foreign, parts) in [
        (Foreign::Pool, &[(0, &b"CRYPTFLD"[..])][..]),
        (Foreign::Pool, &[(1 << 20, b"CRYPTFLD")]),
        (Foreign::SpdkBlobstore, &[(0, b"SPDKBLOB")]),
        (Foreign::Luks1, &[(0, b"LUKS\xba\xbe\0\x01")]),
        (Foreign::Luks2, &[(0, b"LUKS\xba\xbe\0\x02")]),
        (Foreign::Luks2, &[(0x4000, b"SKUL\xba\xbe\0\x02")]),
        (Foreign::Vdo, &[(0, b"dmvdo001")]),
        (Foreign::Xfs, &[(0, b"XFSB")]),
        (Foreign::Btrfs, &[(0x10040, b"_BHRfS_M")]),
        (Foreign::Swap, &[(4086, b"SWAPSPACE2")]),
        (Foreign::Swap, &[(65526, b"SWAPSPACE2")]),
        (Foreign::Gpt, &[(510, b"\x55\xaa"), (512, b"EFI PART")]),
        (Foreign::Gpt, &[(4096, b"EFI PART")]),
        (Foreign::LvmPv, &[(512, b"LABELONE"), (512 + 24, b"LVM2 001")]),
        (Foreign::LvmPv, &[(0, b"LABELONE"), (24, b"LVM2 001")]),
        (Foreign::MdRaid, &[(4096, b"\xfc\x4e\x2b\xa9")]),
        (Foreign::MdRaid, &[(0, b"\xfc\x4e\x2b\xa9")]),
        (Foreign::Zfs, &[(132 << 10, b"\x0c\xb1\xba\0\0\0\0\0")]),
        (Foreign::Zfs, &[(255 << 10, b"\0\0\0\0\0\xba\xb1\x0c")]),
        (Foreign::Ntfs, &[(3, b"NTFS    "), (510, b"\x55\xaa")]),
        (Foreign::Fat, &[(82, b"FAT32   "), (510, b"\x55\xaa")]),
        (Foreign::Ext2, &[(1080, b"\x53\xef")]),
        (Foreign::Ext3, &[(1080, b"\x53\xef"), (1116, b"\x04")]),
        (Foreign::Ext4, &[(1080, b"\x53\xef"), (1116, b"\x04"), (1120, b"\x40")]),
        (Foreign::Iso9660, &[(32769, b"CD001")]),
        (Foreign::Bluestore, &[(0, b"bluestore block device\n")]),
        (Foreign::Mbr, &[(510, b"\x55\xaa"), (446, b"\x80\0\0\0\x83\0\0\0\0\x08\0\0\0\x10\0\0")]),
        (Foreign::Bcachefs, &[(4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef")]),
    ] {
        assert_eq!(probe_foreign(&head(parts), &[]), Some(foreign), "{foreign}");
    }
    assert_eq!(probe_foreign(&head(&[(510, b"\x55\xaa")]), &[]), None, "a boot sector without partitions");
}

#[test]
fn signatures_at_the_end() {
    let md = b"\xfc\x4e\x2b\xa9";
    for (foreign, tail) in [
        (Foreign::Gpt, tail(512, b"EFI PART")),
        (Foreign::Gpt, tail(4096, b"EFI PART")),
        (Foreign::MdRaid, tail(8192, md)),
        (Foreign::MdRaid, tail(65536, md)),
        (Foreign::MdRaid, tail(131_072 - 512, md)),
        (Foreign::Drbd, tail(4096 - 60, b"\x83\x74\x02\x6d")),
    ] {
        assert_eq!(probe_foreign(&head(&[]), &tail), Some(foreign), "{foreign}");
    }
    let mut zfs = tail(512 << 10, &[]);
    let label = zfs.len() - (512 << 10);
    zfs[label + (16 << 10)..][..4].copy_from_slice(&[1, 1, 0, 0]);
    zfs[label + (130 << 10)..][..8].copy_from_slice(&0x00ba_b10cu64.to_le_bytes());
    assert_eq!(probe_foreign(&head(&[]), &zfs), Some(Foreign::Zfs));
}
