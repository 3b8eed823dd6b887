//! Numbers and structures of linux/vfio.h and linux/iommufd.h (uapi of Linux 7.3; those used are the same since 6.6).

const fn io(n: libc::c_ulong) -> libc::c_ulong {
    (b';' as libc::c_ulong) << 8 | (100 + n)
}
pub const GET_API_VERSION: libc::c_ulong = io(0);
pub const CHECK_EXTENSION: libc::c_ulong = io(1);
pub const SET_IOMMU: libc::c_ulong = io(2);
pub const GROUP_GET_STATUS: libc::c_ulong = io(3);
pub const GROUP_SET_CONTAINER: libc::c_ulong = io(4);
pub const GROUP_GET_DEVICE_FD: libc::c_ulong = io(6);
pub const DEVICE_GET_REGION_INFO: libc::c_ulong = io(8);
pub const DEVICE_GET_IRQ_INFO: libc::c_ulong = io(9);
pub const DEVICE_SET_IRQS: libc::c_ulong = io(10);
pub const DEVICE_RESET: libc::c_ulong = io(11);
pub const IOMMU_GET_INFO: libc::c_ulong = io(12);
pub const IOMMU_MAP_DMA: libc::c_ulong = io(13);
pub const DEVICE_BIND_IOMMUFD: libc::c_ulong = io(18);
pub const DEVICE_ATTACH_IOMMUFD_PT: libc::c_ulong = io(19);
/// Commands of iommufd begin at 128 instead of at VFIO's 100.
pub const IOAS_ALLOC: libc::c_ulong = io(29);
pub const IOAS_IOVA_RANGES: libc::c_ulong = io(32);
pub const IOAS_MAP: libc::c_ulong = io(33);
pub const IOAS_UNMAP: libc::c_ulong = io(34);

pub const API_VERSION: i32 = 0;
pub const TYPE1V2_IOMMU: libc::c_ulong = 3;
pub const GROUP_VIABLE: u32 = 1;
pub const DMA_READ_WRITE: u32 = 3;
pub const IRQ_EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
pub const REGION_BAR0: u32 = 0;
pub const REGION_CONFIG: u32 = 7;
pub const REGION_MMAP: u32 = 4;
pub const IRQ_MSIX: u32 = 2;
pub const IRQ_REQUEST: u32 = 4;
pub const INFO_CAPS: u32 = 2;
pub const CAP_IOVA_RANGE: u16 = 1;
/// FIXED_IOVA, WRITEABLE, READABLE.
pub const IOAS_MAP_FIXED_READ_WRITE: u32 = 1 | 2 | 4;

#[repr(C)]
#[derive(Default)]
pub struct GroupStatus {
    pub argsz: u32,
    pub flags: u32,
}
#[repr(C)]
#[derive(Default)]
pub struct RegionInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub cap_offset: u32,
    pub size: u64,
    pub offset: u64,
}
#[repr(C)]
#[derive(Default)]
pub struct IrqInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub count: u32,
}
#[repr(C)]
#[derive(Default)]
pub struct DmaMap {
    pub argsz: u32,
    pub flags: u32,
    pub vaddr: u64,
    pub iova: u64,
    pub size: u64,
}
#[repr(C)]
#[derive(Default)]
pub struct BindIommufd {
    pub argsz: u32,
    pub flags: u32,
    pub iommufd: i32,
    pub out_devid: u32,
}
#[repr(C)]
#[derive(Default)]
pub struct AttachIommufdPt {
    pub argsz: u32,
    pub flags: u32,
    pub pt_id: u32,
}
#[repr(C)]
#[derive(Default)]
pub struct IoasAlloc {
    pub size: u32,
    pub flags: u32,
    pub out_ioas_id: u32,
}
#[repr(C)]
#[derive(Default)]
pub struct IoasIovaRanges {
    pub size: u32,
    pub ioas_id: u32,
    pub num_iovas: u32,
    pub reserved: u32,
    /// Address of pairs of u64: first and last.
    pub allowed_iovas: u64,
    pub out_iova_alignment: u64,
}
#[repr(C)]
#[derive(Default)]
pub struct IoasMap {
    pub size: u32,
    pub flags: u32,
    pub ioas_id: u32,
    pub reserved: u32,
    pub user_va: u64,
    pub length: u64,
    pub iova: u64,
}
#[repr(C)]
#[derive(Default)]
pub struct IoasUnmap {
    pub size: u32,
    pub ioas_id: u32,
    pub iova: u64,
    pub length: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Sizes, offsets and numbers as a C compiler makes them of the headers.
    #[test]
    fn layouts_and_numbers_of_the_headers() {
        assert_eq!(
            [
                size_of::<GroupStatus>(),
                size_of::<RegionInfo>(),
                size_of::<IrqInfo>(),
                size_of::<DmaMap>(),
                size_of::<BindIommufd>(),
                size_of::<AttachIommufdPt>(),
                size_of::<IoasAlloc>(),
                size_of::<IoasIovaRanges>(),
                size_of::<IoasMap>(),
                size_of::<IoasUnmap>(),
            ],
            [8, 32, 16, 32, 16, 12, 12, 32, 40, 24]
        );
        assert_eq!((offset_of!(BindIommufd, iommufd), offset_of!(AttachIommufdPt, pt_id)), (8, 8));
        assert_eq!((offset_of!(IoasMap, ioas_id), offset_of!(IoasMap, iova)), (8, 32));
        assert_eq!((offset_of!(IoasIovaRanges, allowed_iovas), offset_of!(IoasUnmap, length)), (16, 16));
        assert_eq!(
            [GET_API_VERSION, IOMMU_MAP_DMA, DEVICE_BIND_IOMMUFD, DEVICE_ATTACH_IOMMUFD_PT],
            [0x3b64, 0x3b71, 0x3b76, 0x3b77]
        );
        assert_eq!([IOAS_ALLOC, IOAS_IOVA_RANGES, IOAS_MAP, IOAS_UNMAP], [0x3b81, 0x3b84, 0x3b85, 0x3b86]);
    }
}
