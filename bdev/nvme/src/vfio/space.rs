//! The I/O address space that all drives of the process share, so that the arena is mapped (and pinned) once for all: a VFIO
//! container, or one of iommufd. One window: slab `n` at `window + n * 2 MiB`.
//!
//! What a kernel keeps of it lives as long as there is a drive in it; with the first one the window is chosen anew. iommufd is
//! written to its header and untested: no kernel at hand has it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use cryptfold_reactor::memory::{MAX_INDEXED_SLABS, SLAB_BYTES, slab_at, slab_count};

use super::{abi, failed, ioctl, ioctl_number, patiently, refused};
use crate::bus::BusError;
use crate::controller::lock;

/// Smallest window start, where there is a choice: below are the holes of PC hardware.
const WINDOW_FROM: u64 = 4 << 30;
/// Ranges of bus addresses that are asked for, at most.
const MAX_RANGES: usize = 256;

/// See the module's head.
pub(super) struct Space {
    kind: Kind,
    iommu: Mutex<Iommu>,
}

enum Kind {
    /// Groups in a container, with an IOMMU of type 1.
    Container(File),
    /// An I/O address space of /dev/iommu, and its number.
    Iommufd(File, u32),
}

/// What the kernel keeps while there is a drive.
#[derive(Default)]
struct Iommu {
    members: usize,
    /// Window start and how many slabs fit in it.
    window: Option<(u64, usize)>,
    /// Slabs that are mapped.
    mapped: usize,
}

/// A group or a device in the space.
pub(super) struct Member {
    pub group: Option<File>,
    pub space: Arc<Space>,
    pub window: u64,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut iommu = lock(&self.space.iommu);
        drop(self.group.take());
        iommu.members -= 1;
        if iommu.members == 0 {
            *iommu = Iommu::default();
            self.space.kind.unmap_all();
        }
    }
}

static CONTAINER: Mutex<Weak<Space>> = Mutex::new(Weak::new());
static IOMMUFD: Mutex<Weak<Space>> = Mutex::new(Weak::new());

/// The process's space of a kind, made if there is none.
fn shared(
    slot: &Mutex<Weak<Space>>,
    make: impl FnOnce() -> Result<Kind, BusError>,
) -> Result<Arc<Space>, BusError> {
    let mut slot = lock(slot);
    if let Some(space) = slot.upgrade() {
        return Ok(space);
    }
    let space = Arc::new(Space { kind: make()?, iommu: Mutex::default() });
    *slot = Arc::downgrade(&space);
    Ok(space)
}

fn open(path: &str, hint: &str) -> Result<File, BusError> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map_err(|e| failed(format!("cannot open {path}"), &e, hint))
}

impl Space {
    /// The container.
    ///
    /// # Errors
    /// The kernel has none of the right kind, or no permission.
    pub fn container() -> Result<Arc<Space>, BusError> {
        shared(&CONTAINER, || {
            let hint = "load the module vfio-pci, or give this user access to it";
            let file = open("/dev/vfio/vfio", hint)?;
            let fd = file.as_raw_fd();
            let version = ioctl_number(fd, abi::GET_API_VERSION, 0);
            let extension = ioctl_number(fd, abi::CHECK_EXTENSION, abi::TYPE1V2_IOMMU);
            if !matches!((version, extension), (Ok(abi::API_VERSION), Ok(1))) {
                return Err(refused("VFIO", "this kernel has no IOMMU of type 1 version 2", libc::ENOTSUP));
            }
            Ok(Kind::Container(file))
        })
    }

    /// The space of iommufd.
    ///
    /// # Errors
    /// No permission, or the kernel refuses.
    pub fn iommufd() -> Result<Arc<Space>, BusError> {
        shared(&IOMMUFD, || {
            let file = open("/dev/iommu", "give this user access to it")?;
            let mut alloc = abi::IoasAlloc { size: size_of::<abi::IoasAlloc>() as u32, ..Default::default() };
            // SAFETY: a structure of the kernel's layout.
            unsafe { ioctl(file.as_raw_fd(), abi::IOAS_ALLOC, &raw mut alloc) }
                .map_err(|e| failed("iommufd gives no address space", &e, ""))?;
            Ok(Kind::Iommufd(file, alloc.out_ioas_id))
        })
    }

    /// Adds a group and, if it is the first, chooses the IOMMU and the window.
    pub fn add_group(self: &Arc<Self>, group: File) -> Result<Member, BusError> {
        let iommu = lock(&self.iommu);
        let mut fd = self.kind.file().as_raw_fd();
        // SAFETY: the argument is a descriptor number.
        unsafe { ioctl(group.as_raw_fd(), abi::GROUP_SET_CONTAINER, &raw mut fd) }
            .map_err(|e| failed("cannot add the IOMMU group to the container", &e, ""))?;
        if iommu.window.is_none() {
            ioctl_number(self.kind.file().as_raw_fd(), abi::SET_IOMMU, abi::TYPE1V2_IOMMU).map_err(|e| {
                failed("cannot use the IOMMU", &e, "is it on? intel_iommu=on or the firmware's setting")
            })?;
        }
        self.admit(iommu, Some(group))
    }

    /// Binds a device of `/dev/vfio/devices` to iommufd and attaches it to the space.
    pub fn add_device(self: &Arc<Self>, path: &Path, device: &File) -> Result<Member, BusError> {
        let Kind::Iommufd(file, ioas) = &self.kind else {
            return Err(refused(path.display().to_string(), "no iommufd", libc::EINVAL));
        };
        let iommu = lock(&self.iommu);
        // The kernel may still be taking a killed process's drives back.
        patiently(|| {
            let mut bind = abi::BindIommufd {
                argsz: size_of::<abi::BindIommufd>() as u32,
                iommufd: file.as_raw_fd(),
                ..Default::default()
            };
            // SAFETY: a structure of the kernel's layout.
            unsafe { ioctl(device.as_raw_fd(), abi::DEVICE_BIND_IOMMUFD, &raw mut bind) }
        })
        .map_err(|e| {
            let hint = match e.raw_os_error() {
                Some(libc::EBUSY | libc::EPERM) => {
                    "another process has the drive, or a kernel driver another function of its IOMMU group"
                }
                _ => "",
            };
            failed(format!("cannot bind {} to iommufd", path.display()), &e, hint)
        })?;
        let argsz = size_of::<abi::AttachIommufdPt>() as u32;
        let mut attach = abi::AttachIommufdPt { argsz, flags: 0, pt_id: *ioas };
        // SAFETY: a structure of the kernel's layout.
        unsafe { ioctl(device.as_raw_fd(), abi::DEVICE_ATTACH_IOMMUFD_PT, &raw mut attach) }
            .map_err(|e| failed(format!("cannot attach {} to the IOMMU", path.display()), &e, ""))?;
        self.admit(iommu, None)
    }

    /// Counts a member whose drive is in the space; the first has the window chosen.
    fn admit(
        self: &Arc<Self>,
        mut iommu: MutexGuard<'_, Iommu>,
        group: Option<File>,
    ) -> Result<Member, BusError> {
        let (window, _) = match iommu.window {
            Some(window) => window,
            None => *iommu.window.insert(choose_window(&self.kind.ranges()?)),
        };
        iommu.members += 1;
        Ok(Member { group, space: self.clone(), window })
    }

    /// Shows the drives slabs 0 to `slabs`. May take long: memory is pinned.
    ///
    /// # Errors
    /// The window is too small, the limit on locked memory is reached, or there is no drive.
    pub fn map(&self, slabs: usize) -> Result<(), BusError> {
        let mut iommu = lock(&self.iommu);
        let Some((window, room)) = iommu.window else {
            return Err(refused("I/O memory", "no drive is open", libc::ENODEV));
        };
        let slabs = slabs.min(slab_count());
        while iommu.mapped < slabs {
            let first = iommu.mapped;
            let (address, count) = next_run(first, slabs, room, |n| slab_at(n).addr())?;
            self.kind
                .map(address as u64, window + (first * SLAB_BYTES) as u64, (count * SLAB_BYTES) as u64)
                .map_err(|e| {
                    let hint = match e.raw_os_error() {
                        Some(libc::ENOMEM) => "raise the limit on locked memory: ulimit -l",
                        _ => "",
                    };
                    failed(format!("cannot map {} MiB for drives", count * 2), &e, hint)
                })?;
            iommu.mapped += count;
        }
        Ok(())
    }
}

impl Kind {
    fn file(&self) -> &File {
        match self {
            Kind::Container(file) | Kind::Iommufd(file, _) => file,
        }
    }

    /// Maps memory of the arena, which is never unmapped from the process. All numbers in bytes.
    fn map(&self, vaddr: u64, iova: u64, size: u64) -> io::Result<()> {
        match self {
            Kind::Container(file) => {
                let argsz = size_of::<abi::DmaMap>() as u32;
                let mut map = abi::DmaMap { argsz, flags: abi::DMA_READ_WRITE, vaddr, iova, size };
                // SAFETY: a structure of the kernel's layout; the memory is the arena's, mapped for ever.
                unsafe { ioctl(file.as_raw_fd(), abi::IOMMU_MAP_DMA, &raw mut map) }?;
            }
            Kind::Iommufd(file, ioas_id) => {
                let mut map = abi::IoasMap {
                    size: size_of::<abi::IoasMap>() as u32,
                    flags: abi::IOAS_MAP_FIXED_READ_WRITE,
                    ioas_id: *ioas_id,
                    reserved: 0,
                    user_va: vaddr,
                    length: size,
                    iova,
                };
                // SAFETY: as above.
                unsafe { ioctl(file.as_raw_fd(), abi::IOAS_MAP, &raw mut map) }?;
            }
        }
        Ok(())
    }

    /// After the last drive: a container forgets its mappings by itself, an address space keeps them, and its memory pinned.
    fn unmap_all(&self) {
        if let Kind::Iommufd(file, ioas_id) = self {
            let size = size_of::<abi::IoasUnmap>() as u32;
            let mut unmap = abi::IoasUnmap { size, ioas_id: *ioas_id, iova: 0, length: u64::MAX };
            // SAFETY: a structure of the kernel's layout.
            if let Err(e) = unsafe { ioctl(file.as_raw_fd(), abi::IOAS_UNMAP, &raw mut unmap) } {
                tracing::warn!("I/O memory stays mapped in iommufd: {e}");
            }
        }
    }

    /// Ranges of bus addresses that can be mapped, both ends included.
    fn ranges(&self) -> Result<Vec<(u64, u64)>, BusError> {
        let fail = |e: io::Error| failed("the IOMMU does not tell its ranges", &e, "");
        match self {
            Kind::Container(file) => {
                // vfio_iommu_type1_info: argsz, flags, page sizes, cap_offset; capabilities follow.
                let mut info = vec![0u64; 512];
                let bytes = (info.len() * 8) as u32;
                info[0] = bytes.into();
                // SAFETY: `info` is as long as argsz says and aligned.
                unsafe { ioctl(file.as_raw_fd(), abi::IOMMU_GET_INFO, info.as_mut_ptr()) }.map_err(fail)?;
                let raw: Vec<u8> = info.iter().flat_map(|w| w.to_ne_bytes()).collect();
                Ok(iova_ranges(&raw))
            }
            Kind::Iommufd(file, ioas_id) => {
                let mut all = vec![[0u64; 2]; MAX_RANGES];
                let mut ask = abi::IoasIovaRanges {
                    size: size_of::<abi::IoasIovaRanges>() as u32,
                    ioas_id: *ioas_id,
                    num_iovas: all.len() as u32,
                    reserved: 0,
                    allowed_iovas: all.as_mut_ptr().addr() as u64,
                    out_iova_alignment: 0,
                };
                // SAFETY: a structure of the kernel's layout, which names `all` with its length.
                unsafe { ioctl(file.as_raw_fd(), abi::IOAS_IOVA_RANGES, &raw mut ask) }.map_err(fail)?;
                all.truncate(ask.num_iovas as usize);
                Ok(all.into_iter().map(|[start, last]| (start, last)).collect())
            }
        }
    }
}

/// The next slabs to map, of those up to `slabs`: the address of slab `first`, and how many of its neighbours lie behind each other
/// in our memory as well (one entry: the kernel has a limit on them). `room` slabs fit in the window.
fn next_run(
    first: usize,
    slabs: usize,
    room: usize,
    address: impl Fn(usize) -> usize,
) -> Result<(usize, usize), BusError> {
    if first >= room {
        return Err(refused(
            "I/O memory",
            format!("only {room} x 2 MiB can be shown to drives"),
            libc::ENOSPC,
        ));
    }
    let base = address(first);
    let mut count = 1;
    while first + count < slabs.min(room) && address(first + count) == base + count * SLAB_BYTES {
        count += 1;
    }
    Ok((base, count))
}

/// The IOVA ranges of a vfio_iommu_type1_info with its capabilities; all 39 bits where it has none.
fn iova_ranges(raw: &[u8]) -> Vec<(u64, u64)> {
    let u32_at = |at: usize| raw.get(at..at + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    let u64_at = |at: usize| Some(u64::from(u32_at(at)?) | u64::from(u32_at(at + 4)?) << 32);
    let default = vec![(0, (1 << 39) - 1)];
    if u32_at(4).unwrap_or(0) & abi::INFO_CAPS == 0 {
        return default;
    }
    let mut at = u32_at(16).unwrap_or(0) as usize;
    // Headers: id (16 bits), version (16), offset of the next (32). Bounded: a chain can not be longer than its memory.
    for _ in 0..raw.len() / 8 {
        let Some(head) = u32_at(at).filter(|_| at != 0) else { break };
        if head as u16 == abi::CAP_IOVA_RANGE {
            let count = u32_at(at + 8).unwrap_or(0) as usize;
            return (0..count)
                .map_while(|n| Some((u64_at(at + 16 + n * 16)?, u64_at(at + 24 + n * 16)?)))
                .collect();
        }
        at = u32_at(at + 4).unwrap_or(0) as usize;
    }
    default
}

/// Start of the window and the slabs that fit: 4 GiB if possible, else where most fit.
fn choose_window(ranges: &[(u64, u64)]) -> (u64, usize) {
    let slab = SLAB_BYTES as u64;
    let fit = |&(start, end): &(u64, u64)| {
        let start = start.max(WINDOW_FROM.min(end)).next_multiple_of(slab);
        let room = end.saturating_add(1).saturating_sub(start) / slab;
        (start, (room as usize).min(MAX_INDEXED_SLABS))
    };
    let low = |&(start, end): &(u64, u64)| {
        let start = start.next_multiple_of(slab);
        (start, ((end.saturating_add(1).saturating_sub(start) / slab) as usize).min(MAX_INDEXED_SLABS))
    };
    let best = |all: Vec<(u64, usize)>| {
        all.into_iter().max_by_key(|(start, room)| (*room, std::cmp::Reverse(*start)))
    };
    best(ranges.iter().map(fit).collect())
        .filter(|w| w.1 > 0)
        .or_else(|| best(ranges.iter().map(low).collect()))
        .unwrap_or((WINDOW_FROM, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows() {
        // What QEMU's Intel IOMMU says: a hole for interrupts below 4 GiB.
        let intel = [(0x100_0000, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)];
        assert_eq!(choose_window(&intel), (4 << 30, MAX_INDEXED_SLABS));
        // AMD's hole at 1012 GiB is no obstacle, a small IOMMU is used as far as it goes.
        assert_eq!(choose_window(&[(0, 0xfcff_ffff_ffff), (0x100_0000_0000, u64::MAX)]).0, 4 << 30);
        assert_eq!(choose_window(&[(0x10_0000, 0x7fff_ffff)]), (0x20_0000, 1023));
        assert_eq!(choose_window(&[]).1, 0);
    }

    #[test]
    fn ranges_from_capabilities() {
        let mut raw = vec![0u8; 4096];
        let mut put = |at: usize, v: u64, n: usize| raw[at..at + n].copy_from_slice(&v.to_ne_bytes()[..n]);
        put(4, 3, 4);
        put(16, 24, 4);
        // A capability of another kind, then the ranges.
        put(24, 3, 2);
        put(28, 48, 4);
        put(48, 1, 2);
        put(56, 2, 4);
        for (n, v) in [0u64, 0xfedf_ffff, 0xfef0_0000, (1 << 48) - 1].iter().enumerate() {
            put(64 + n * 8, *v, 8);
        }
        assert_eq!(iova_ranges(&raw), [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)]);
        // A chain that leads nowhere ends.
        raw[28..32].copy_from_slice(&24u32.to_ne_bytes());
        assert_eq!(iova_ranges(&raw), [(0, (1 << 39) - 1)]);
        assert_eq!(iova_ranges(&[0; 8]), [(0, (1 << 39) - 1)]);
    }

    #[test]
    fn slabs_are_mapped_in_runs_as_far_as_the_window_goes() {
        // Slabs 0 to 2 lie together, 3 and 4 elsewhere.
        let address = |n: usize| if n < 3 { (100 + n) * SLAB_BYTES } else { (500 + n) * SLAB_BYTES };
        assert_eq!(next_run(0, 5, 100, address), Ok((100 * SLAB_BYTES, 3)));
        assert_eq!(next_run(1, 2, 100, address), Ok((101 * SLAB_BYTES, 1)));
        assert_eq!(next_run(3, 5, 100, address), Ok((503 * SLAB_BYTES, 2)));
        // What fits is mapped, then it is refused.
        assert_eq!(next_run(3, 5, 4, address), Ok((503 * SLAB_BYTES, 1)));
        let e = next_run(4, 5, 4, address).unwrap_err();
        assert_eq!((e.errno, &*e.reason), (libc::ENOSPC, "only 4 x 2 MiB can be shown to drives"));
        // An IOMMU without a usable range refuses the first slab.
        let (_, room) = choose_window(&[(0, 0xfffff)]);
        assert_eq!(next_run(0, 1, room, address).unwrap_err().errno, libc::ENOSPC);
        let nobody = Space { kind: Kind::Container(tempfile::tempfile().unwrap()), iommu: Mutex::default() };
        assert_eq!(nobody.map(1).unwrap_err().errno, libc::ENODEV);
    }
}
