//! Drives through VFIO, the kernel's way to hand a PCI function to a process behind the IOMMU (Documentation/driver-api/vfio.rst
//! and the user interface linux/vfio.h; containers and groups, IOMMU type 1). One of the crate's three modules with unsafe code.
//!
//! All drives of the process share one container, so that the arena is mapped (and pinned) once for all. The mapping is one
//! window: slab `n` at `window + n * 2 MiB`.
//!
//! Invariants: the registers' address range stays mapped for the life of the [`VfioBus`]: when the function is given back, or
//! the kernel takes the mapping away under us (SIGBUS), memory of all ones takes its place, which is also what a function that
//! is gone reads as. Slabs are never unmapped from the process, so the window never dangles.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use cryptfold_reactor::memory::{MAX_INDEXED_SLABS, SLAB_BYTES, slab_at, slab_count};

use crate::bus::{ALL_ONES, Address, Bus, BusError, Interrupt, reg};
use crate::controller::lock;
use crate::elsewhere::{Waiting, elsewhere};
use crate::pci::{self, Function};

/// Numbers and structures of linux/vfio.h.
mod abi {
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
    const _: () = assert!(size_of::<RegionInfo>() == 32 && size_of::<DmaMap>() == 32);
}

/// Register bytes that are mapped, at most: doorbells for thousands of queues.
const BAR_BYTES: usize = 64 << 10;
/// Smallest window start, where there is a choice: below are the holes of PC hardware.
const WINDOW_FROM: u64 = 4 << 30;
/// Vectors used, at most: one for the admin queue and one per pair.
const MAX_VECTORS: u32 = 65;
/// Longest wait for a group that is in use.
const GROUP_PATIENCE: Duration = Duration::from_secs(2);
/// PCI command register (PCI Local Bus 3.0 section 6.2.2): memory space, bus master, interrupt disable.
const PCI_COMMAND: u64 = 4;
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;

fn failed(what: impl Into<String>, e: &io::Error, hint: &str) -> BusError {
    BusError {
        what: what.into(),
        reason: if hint.is_empty() { e.to_string() } else { format!("{e} ({hint})") },
        errno: e.raw_os_error().unwrap_or(libc::EIO),
    }
}

fn refused(what: impl Into<String>, reason: impl Into<String>, errno: i32) -> BusError {
    BusError { what: what.into(), reason: reason.into(), errno }
}

/// An ioctl whose argument is a structure that starts with its size, or null.
///
/// # Safety
/// `argument` is null or what the kernel takes for `request`, valid for reads and writes of its size.
unsafe fn ioctl<T>(fd: RawFd, request: libc::c_ulong, argument: *mut T) -> io::Result<i32> {
    // SAFETY: by this function's contract.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl whose argument is a number.
fn ioctl_number(fd: RawFd, request: libc::c_ulong, number: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: no memory is named.
    let result = unsafe { libc::ioctl(fd, request, number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The IOMMU context of the process.
struct Container {
    file: File,
    iommu: Mutex<Iommu>,
}

/// What the kernel keeps in a container while there is a group in it.
#[derive(Default)]
struct Iommu {
    groups: usize,
    /// Window start and how many slabs fit in it.
    window: Option<(u64, usize)>,
    /// Slabs that are mapped.
    mapped: usize,
}

/// A group in the container.
struct Member {
    group: Option<File>,
    container: Arc<Container>,
    window: u64,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut iommu = lock(&self.container.iommu);
        drop(self.group.take());
        iommu.groups -= 1;
        if iommu.groups == 0 {
            *iommu = Iommu::default();
        }
    }
}

static CONTAINER: Mutex<Weak<Container>> = Mutex::new(Weak::new());

impl Container {
    fn open() -> Result<Arc<Container>, BusError> {
        let mut slot = lock(&CONTAINER);
        if let Some(container) = slot.upgrade() {
            return Ok(container);
        }
        let file = OpenOptions::new().read(true).write(true).open("/dev/vfio/vfio").map_err(|e| {
            failed(
                "cannot open /dev/vfio/vfio",
                &e,
                "load the module vfio-pci, or give this user access to it",
            )
        })?;
        let fd = file.as_raw_fd();
        let version = ioctl_number(fd, abi::GET_API_VERSION, 0);
        let extension = ioctl_number(fd, abi::CHECK_EXTENSION, abi::TYPE1V2_IOMMU);
        if !matches!((version, extension), (Ok(abi::API_VERSION), Ok(1))) {
            return Err(refused("VFIO", "this kernel has no IOMMU of type 1 version 2", libc::ENOTSUP));
        }
        let container = Arc::new(Container { file, iommu: Mutex::default() });
        *slot = Arc::downgrade(&container);
        Ok(container)
    }

    /// Adds a group and, if it is the first, chooses the IOMMU and the window.
    fn add(self: &Arc<Self>, group: File) -> Result<Member, BusError> {
        let mut iommu = lock(&self.iommu);
        let mut fd = self.file.as_raw_fd();
        // SAFETY: the argument is a descriptor number.
        unsafe { ioctl(group.as_raw_fd(), abi::GROUP_SET_CONTAINER, &raw mut fd) }
            .map_err(|e| failed("cannot add the IOMMU group to the container", &e, ""))?;
        let (window, _) = match iommu.window {
            Some(window) => window,
            None => {
                ioctl_number(self.file.as_raw_fd(), abi::SET_IOMMU, abi::TYPE1V2_IOMMU).map_err(|e| {
                    failed("cannot use the IOMMU", &e, "is it on? intel_iommu=on or the firmware's setting")
                })?;
                *iommu.window.insert(choose_window(&self.ranges()?))
            }
        };
        iommu.groups += 1;
        Ok(Member { group: Some(group), container: self.clone(), window })
    }

    /// Ranges of bus addresses that the IOMMU translates, both ends included.
    fn ranges(&self) -> Result<Vec<(u64, u64)>, BusError> {
        // vfio_iommu_type1_info: argsz, flags, page sizes, cap_offset; capabilities follow.
        let mut info = vec![0u64; 512];
        let bytes = (info.len() * 8) as u32;
        info[0] = bytes.into();
        // SAFETY: `info` is as long as argsz says and aligned.
        unsafe { ioctl(self.file.as_raw_fd(), abi::IOMMU_GET_INFO, info.as_mut_ptr()) }
            .map_err(|e| failed("the IOMMU does not tell its ranges", &e, ""))?;
        let raw: Vec<u8> = info.iter().flat_map(|w| w.to_ne_bytes()).collect();
        Ok(iova_ranges(&raw))
    }

    fn map(&self, slabs: usize) -> Result<(), BusError> {
        let mut iommu = lock(&self.iommu);
        let Some((window, room)) = iommu.window else {
            return Err(refused("I/O memory", "no drive is open", libc::ENODEV));
        };
        while iommu.mapped < slabs {
            let first = iommu.mapped;
            if first >= room || first >= slab_count() {
                return Err(refused(
                    "I/O memory",
                    format!("only {room} x 2 MiB can be shown to drives"),
                    libc::ENOSPC,
                ));
            }
            // Neighbours in one entry: the kernel has a limit on them.
            let base = slab_at(first).addr();
            let mut count = 1;
            while first + count < slabs.min(room)
                && slab_at(first + count).addr() == base + count * SLAB_BYTES
            {
                count += 1;
            }
            let mut map = abi::DmaMap {
                argsz: size_of::<abi::DmaMap>() as u32,
                flags: abi::DMA_READ_WRITE,
                vaddr: base as u64,
                iova: window + (first * SLAB_BYTES) as u64,
                size: (count * SLAB_BYTES) as u64,
            };
            // SAFETY: a structure of the kernel's layout; the memory is the arena's, mapped for ever.
            unsafe { ioctl(self.file.as_raw_fd(), abi::IOMMU_MAP_DMA, &raw mut map) }.map_err(|e| {
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

/// What is given back in [`Bus::release`], the device before the group.
struct Parts {
    device: File,
    /// Where the configuration space is in the device's file.
    config_at: u64,
    member: Member,
}

/// A drive behind VFIO.
pub struct VfioBus {
    function: Function,
    parts: Mutex<Option<Arc<Parts>>>,
    bar: Bar,
    window: u64,
    vectors: Vec<OwnedFd>,
    request: Option<OwnedFd>,
    enabled: AtomicBool,
}

impl VfioBus {
    /// Takes a function over and shows it the arena as it is now. It must be bound to vfio-pci, its IOMMU group must be ours to
    /// open. May block.
    ///
    /// # Errors
    /// No such function, bound to another driver, no IOMMU, no permission, in use.
    pub fn open(sys: &Path, address: &str) -> Result<VfioBus, BusError> {
        let what = || format!("PCI function {address}");
        let canonical = pci::canonical(address)
            .ok_or_else(|| refused(what(), "not an address; 0000:04:00.0 is one", libc::EINVAL))?;
        let function = pci::function(sys, &canonical)
            .ok_or_else(|| refused(what(), "there is none with this address", libc::ENODEV))?;
        if function.class != pci::NVME_CLASS {
            let class = function.class;
            return Err(refused(what(), format!("no NVMe controller (class {class:#08x})"), libc::ENODEV));
        }
        if function.driver.as_deref() != Some("vfio-pci") {
            let driver = function.driver.as_deref().unwrap_or("none");
            let reason =
                format!("bound to driver {driver}; bind it to vfio-pci: scripts/setup bind {canonical}");
            return Err(refused(what(), reason, libc::EBUSY));
        }
        let number = function
            .group
            .ok_or_else(|| refused(what(), "it has no IOMMU group: switch the IOMMU on", libc::ENODEV))?;
        let container = Container::open()?;
        let path = format!("/dev/vfio/{number}");
        let group = open_group(&path)?;
        let mut status =
            abi::GroupStatus { argsz: size_of::<abi::GroupStatus>() as u32, ..Default::default() };
        // SAFETY: a structure of the kernel's layout.
        unsafe { ioctl(group.as_raw_fd(), abi::GROUP_GET_STATUS, &raw mut status) }
            .map_err(|e| failed(what(), &e, ""))?;
        if status.flags & abi::GROUP_VIABLE == 0 {
            let reason = format!("other functions of IOMMU group {number} are bound to kernel drivers");
            return Err(refused(what(), reason, libc::EBUSY));
        }
        let member = container.add(group)?;
        let group = member.group.as_ref().ok_or_else(|| refused(what(), "no group", libc::ENODEV))?;
        let device = open_device(group, &canonical)?;
        let bus = Self::set_up(function, device, member)?;
        bus.map(slab_count())?;
        Ok(bus)
    }

    fn set_up(function: Function, device: File, member: Member) -> Result<VfioBus, BusError> {
        let config = region(&device, abi::REGION_CONFIG)?;
        command(&device, config.offset, |c| c | MEMORY_SPACE)?;
        let bar = region(&device, abi::REGION_BAR0)?;
        if bar.flags & abi::REGION_MMAP == 0 || bar.size < u64::from(reg::DOORBELLS) * 2 {
            let reason = format!("its registers can not be mapped ({} bytes)", bar.size);
            return Err(refused(format!("PCI function {}", function.address), reason, libc::ENOTSUP));
        }
        let bytes = (bar.size as usize).min(BAR_BYTES);
        let bar = Bar::map(&device, bar.offset, bytes)?;
        let count = irq_count(&device, abi::IRQ_MSIX).min(MAX_VECTORS);
        let vectors = (0..count).map(|_| eventfd()).collect::<io::Result<Vec<_>>>();
        let vectors = vectors.map_err(|e| failed("cannot make eventfds", &e, ""))?;
        // An old kernel without it: the drive's registers tell, later.
        let request = eventfd().ok().filter(|fd| {
            irq_count(&device, abi::IRQ_REQUEST) > 0
                && set_irqs(&device, abi::IRQ_REQUEST, std::slice::from_ref(fd)).is_ok()
        });
        Ok(VfioBus {
            function,
            window: member.window,
            parts: Mutex::new(Some(Arc::new(Parts { device, config_at: config.offset, member }))),
            bar,
            vectors,
            request,
            enabled: AtomicBool::new(false),
        })
    }

    /// What it is open by; not after it was given back.
    fn parts(&self) -> Option<Arc<Parts>> {
        lock(&self.parts).clone()
    }

    fn command(&self, change: impl Fn(u16) -> u16) {
        if let Some(parts) = self.parts()
            && let Err(e) = command(&parts.device, parts.config_at, change)
        {
            tracing::warn!("{}: {e}", self.function.address);
        }
    }
}

/// A group. The kernel may still be taking a killed process's drives back: that is awaited.
fn open_group(path: &str) -> Result<File, BusError> {
    let begin = Instant::now();
    loop {
        let error = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(group) => return Ok(group),
            Err(e) => e,
        };
        let busy = error.raw_os_error() == Some(libc::EBUSY);
        if busy && begin.elapsed() < GROUP_PATIENCE {
            std::thread::sleep(GROUP_PATIENCE / 100);
            continue;
        }
        let hint = match error.raw_os_error() {
            Some(libc::EBUSY) => "another process has the drive",
            Some(libc::EACCES) => "give this user access to it",
            _ => "",
        };
        return Err(failed(format!("cannot open {path}"), &error, hint));
    }
}

fn open_device(group: &File, address: &str) -> Result<File, BusError> {
    let mut name = address.as_bytes().to_vec();
    name.push(0);
    // SAFETY: the argument is a string that ends in NUL.
    let fd = unsafe { ioctl(group.as_raw_fd(), abi::GROUP_GET_DEVICE_FD, name.as_mut_ptr()) }
        .map_err(|e| failed(format!("VFIO does not give out {address}"), &e, ""))?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn region(device: &File, index: u32) -> Result<abi::RegionInfo, BusError> {
    let mut info =
        abi::RegionInfo { argsz: size_of::<abi::RegionInfo>() as u32, index, ..Default::default() };
    // SAFETY: a structure of the kernel's layout.
    unsafe { ioctl(device.as_raw_fd(), abi::DEVICE_GET_REGION_INFO, &raw mut info) }
        .map_err(|e| failed(format!("region {index} of the function"), &e, ""))?;
    Ok(info)
}

fn command(device: &File, config_at: u64, change: impl Fn(u16) -> u16) -> Result<(), BusError> {
    let fail = |e: io::Error| failed("PCI command register", &e, "");
    let mut word = [0; 2];
    device.read_exact_at(&mut word, config_at + PCI_COMMAND).map_err(fail)?;
    let new = change(u16::from_le_bytes(word)).to_le_bytes();
    device.write_all_at(&new, config_at + PCI_COMMAND).map_err(fail)
}

fn irq_count(device: &File, index: u32) -> u32 {
    let mut info = abi::IrqInfo { argsz: size_of::<abi::IrqInfo>() as u32, index, ..Default::default() };
    // SAFETY: a structure of the kernel's layout.
    match unsafe { ioctl(device.as_raw_fd(), abi::DEVICE_GET_IRQ_INFO, &raw mut info) } {
        Ok(_) => info.count,
        Err(_) => 0,
    }
}

/// Connects vectors 0 and on of an interrupt to eventfds.
fn set_irqs(device: &File, index: u32, fds: &[OwnedFd]) -> io::Result<()> {
    // vfio_irq_set: argsz, flags, index, start, count, then the descriptors.
    let mut set = vec![0, abi::IRQ_EVENTFD_TRIGGER, index, 0, fds.len() as u32];
    set.extend(fds.iter().map(|fd| fd.as_raw_fd() as u32));
    set[0] = (set.len() * 4) as u32;
    // SAFETY: `set` is as long as argsz says.
    match unsafe { ioctl(device.as_raw_fd(), abi::DEVICE_SET_IRQS, set.as_mut_ptr()) }? {
        0 => Ok(()),
        // So many there are, and none of them is connected.
        _ => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
    }
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: creates a descriptor.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Bus for VfioBus {
    fn read32(&self, offset: u32) -> u32 {
        self.bar.read(offset)
    }

    fn write32(&self, offset: u32, value: u32) {
        self.bar.write(offset, value);
    }

    fn registers_bytes(&self) -> u32 {
        self.bar.bytes as u32
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn map(&self, slabs: usize) -> Result<(), BusError> {
        match self.parts() {
            Some(parts) => parts.member.container.map(slabs),
            None => Err(refused("I/O memory", "the drive was given back", libc::ENODEV)),
        }
    }

    fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    fn enable_interrupts(&self) -> Result<(), BusError> {
        let Some(parts) = self.parts() else { return Ok(()) };
        if !self.enabled.load(Ordering::Acquire) {
            set_irqs(&parts.device, abi::IRQ_MSIX, &self.vectors)
                .map_err(|e| failed("cannot switch MSI-X on", &e, ""))?;
            self.enabled.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn interrupt(&self, vector: u16) -> Interrupt {
        self.vectors.get(usize::from(vector)).map_or(Interrupt::None, |fd| Interrupt::Eventfd(fd.as_raw_fd()))
    }

    fn reset(self: Arc<Self>) -> Waiting<Result<(), BusError>> {
        let Some(parts) = self.parts() else {
            let gone = refused("reset", "the drive was given back", libc::ENODEV);
            return Box::pin(std::future::ready(Err(gone)));
        };
        elsewhere(move || {
            // SAFETY: no argument.
            unsafe { ioctl(parts.device.as_raw_fd(), abi::DEVICE_RESET, null_mut::<u8>()) }
                .map_err(|e| failed("the function can not be reset", &e, ""))?;
            command(&parts.device, parts.config_at, |c| c | MEMORY_SPACE)
        })
    }

    fn stop_dma(&self) {
        self.command(|c| c & !BUS_MASTER);
    }

    fn allow_dma(&self) {
        self.command(|c| c | MEMORY_SPACE | BUS_MASTER);
    }

    fn wants_removal(&self) -> bool {
        let Some(fd) = &self.request else { return false };
        let mut count = [0u8; 8];
        // SAFETY: reads at most eight bytes into a live buffer; the descriptor does not block.
        unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) == 8 }
    }

    fn release(self: Arc<Self>) -> Waiting<()> {
        let Some(parts) = lock(&self.parts).take() else { return Box::pin(std::future::ready(())) };
        self.bar.retire();
        // The kernel disables and resets the function when the device is closed.
        elsewhere(move || drop(parts))
    }

    fn address(&self) -> Address {
        Address { traddr: self.function.address.clone(), ids: self.function.ids }
    }
}

/// A function's registers in our address space.
struct Bar {
    base: *mut u8,
    bytes: usize,
    slot: usize,
}

// SAFETY: the registers are accessed by volatile reads and writes of whole words only; the range is constant.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

/// Ranges of registers, for the SIGBUS handler: address and length; 0 is free.
const MAX_BARS: usize = 256;
static BARS: [(AtomicUsize, AtomicUsize); MAX_BARS] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; MAX_BARS];

impl Bar {
    fn map(device: &File, offset: u64, bytes: usize) -> Result<Bar, BusError> {
        guard_against_sigbus().map_err(|e| failed("cannot guard the registers", &e, ""))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(null_mut(), bytes, protection, libc::MAP_SHARED, device.as_raw_fd(), offset as i64)
        };
        if base == libc::MAP_FAILED {
            return Err(failed("cannot map the registers", &io::Error::last_os_error(), ""));
        }
        let free = |slot: &(AtomicUsize, AtomicUsize)| {
            slot.0.compare_exchange(0, base.addr(), Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let Some(slot) = BARS.iter().position(free) else {
            // SAFETY: the mapping just made, which nobody knows.
            unsafe { libc::munmap(base, bytes) };
            return Err(refused("registers", format!("more than {MAX_BARS} drives"), libc::ENFILE));
        };
        BARS[slot].1.store(bytes, Ordering::Release);
        Ok(Bar { base: base.cast(), bytes, slot })
    }

    #[inline]
    fn word(&self, offset: u32) -> Option<*mut u32> {
        let fits = offset.is_multiple_of(4) && offset as usize + 4 <= self.bytes;
        fits.then(|| self.base.wrapping_add(offset as usize).cast())
    }

    fn read(&self, offset: u32) -> u32 {
        // SAFETY: within the mapping and aligned; the range stays mapped (module head).
        self.word(offset).map_or(ALL_ONES, |word| unsafe { word.read_volatile() })
    }

    #[inline]
    fn write(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            // SAFETY: as in `read`.
            unsafe { word.write_volatile(value) }
        }
    }

    /// Puts memory of all ones in the registers' place.
    fn retire(&self) {
        // SAFETY: the range is this mapping's; nobody holds references into it.
        unsafe { replace(self.base.addr(), self.bytes) };
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        BARS[self.slot].1.store(0, Ordering::Release);
        BARS[self.slot].0.store(0, Ordering::Release);
        // SAFETY: the range is this mapping's, and its owner goes.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// A file of [`BAR_BYTES`] ones, from the first mapping on.
static ONES: AtomicI32 = AtomicI32::new(-1);

/// Replaces a range by memory of all ones, in one step: nobody reads anything else. A single system call.
///
/// # Safety
/// The range is a mapping of registers that nobody refers to, of [`BAR_BYTES`] at most.
unsafe fn replace(address: usize, bytes: usize) -> bool {
    let at: *mut libc::c_void = std::ptr::without_provenance_mut(address);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
    // SAFETY: by this function's contract.
    unsafe { libc::mmap(at, bytes, protection, flags, ONES.load(Ordering::Acquire), 0) != libc::MAP_FAILED }
}

/// The kernel takes a register mapping away when the function is reset or removed behind our back; the next access is then a
/// SIGBUS, which has to look like a function that is gone instead of ending the process.
fn guard_against_sigbus() -> io::Result<()> {
    static GUARDED: Mutex<bool> = Mutex::new(false);
    let mut guarded = lock(&GUARDED);
    if *guarded {
        return Ok(());
    }
    // SAFETY: makes a descriptor; the name is a string that ends in NUL.
    let fd = unsafe { libc::memfd_create(c"ones".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let ones = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    ones.write_all_at(&[0xff; BAR_BYTES], 0)?;
    ONES.store(ones.into_raw_fd(), Ordering::Release);
    // SAFETY: installs a handler that makes system calls only.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, null_mut())
    };
    if installed < 0 {
        return Err(io::Error::last_os_error());
    }
    *guarded = true;
    Ok(())
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() }.addr();
    for (start, bytes) in &BARS {
        let (start, bytes) = (start.load(Ordering::Acquire), bytes.load(Ordering::Acquire));
        // SAFETY: ranges in the table are register mappings.
        if bytes > 0 && (start..start + bytes).contains(&address) && unsafe { replace(start, bytes) } {
            return;
        }
    }
    // Somebody else's: the default action, when the access is tried again.
    // SAFETY: resets a signal's action.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
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

    /// Registers that the kernel takes away read as all ones, and the process goes on.
    #[test]
    fn registers_that_go_away() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let bar = Bar::map(&file, 0, 8192).unwrap();
        bar.write(0x1000, 7);
        assert_eq!((bar.read(0x1000), bar.read(8192), bar.read(2)), (7, ALL_ONES, ALL_ONES));
        // An access beyond the end of a file is a SIGBUS.
        file.set_len(0).unwrap();
        assert_eq!((bar.read(0x1000), bar.read(0)), (ALL_ONES, ALL_ONES));
        bar.write(0, 5);
        bar.retire();
        assert_eq!(bar.read(0), ALL_ONES);
    }
}
