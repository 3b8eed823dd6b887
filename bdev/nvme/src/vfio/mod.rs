//! Drives through VFIO, the kernel's way to hand a PCI function to a process behind the IOMMU (Documentation/driver-api/vfio.rst
//! and the user interface linux/vfio.h; containers and groups, IOMMU type 1; iommufd where a kernel has only that). One of the
//! crate's three places with unsafe code.
//!
//! `space` is what drives see of our memory, `bar` their registers, `abi` the kernel's numbers.
//!
//! Invariants: the registers' address range stays mapped for the life of the [`VfioBus`]: when the function is given back, or
//! the kernel takes the mapping away under us (SIGBUS), memory of all ones takes its place, which is also what a function that
//! is gone reads as. Slabs are never unmapped from the process, so the window never dangles.

mod abi;
mod bar;
mod space;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cryptfold_reactor::memory::slab_count;

use crate::bus::{Address, Bus, BusError, Interrupt, reg};
use crate::controller::lock;
use crate::elsewhere::{Waiting, elsewhere};
use crate::pci::{self, Function};
use bar::{BAR_BYTES, Bar};
use space::{Member, Space};

/// Vectors used, at most: one for the admin queue and one per pair.
const MAX_VECTORS: u32 = 65;
/// Longest wait for a group or device that is in use.
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
        let (device, member) = match way(&sys.join(&canonical), Path::new("/dev"), number) {
            Way::Group(path) => by_group(&path, number, &canonical)?,
            Way::Device(path) => by_device(&path)?,
        };
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

/// How a function is handed out.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// With its group.
    Group(PathBuf),
    /// By itself, through iommufd.
    Device(PathBuf),
}

/// Groups where the kernel has them, iommufd where that is all it has. `function`: where /sys keeps it; `dev`: `/dev`.
fn way(function: &Path, dev: &Path, group: u32) -> Way {
    let path = dev.join("vfio").join(group.to_string());
    if path.exists() && dev.join("vfio/vfio").exists() {
        return Way::Group(path);
    }
    let mut names = std::fs::read_dir(function.join("vfio-dev")).into_iter().flatten().flatten();
    let device = names.next().map(|entry| dev.join("vfio/devices").join(entry.file_name()));
    match device.filter(|device| device.exists() && dev.join("iommu").exists()) {
        Some(device) => Way::Device(device),
        None => Way::Group(path),
    }
}

fn by_group(path: &Path, number: u32, address: &str) -> Result<(File, Member), BusError> {
    let space = Space::container()?;
    let group = open_node(path)?;
    let mut status = abi::GroupStatus { argsz: size_of::<abi::GroupStatus>() as u32, ..Default::default() };
    // SAFETY: a structure of the kernel's layout.
    unsafe { ioctl(group.as_raw_fd(), abi::GROUP_GET_STATUS, &raw mut status) }
        .map_err(|e| failed(format!("IOMMU group {number}"), &e, ""))?;
    if status.flags & abi::GROUP_VIABLE == 0 {
        let reason = format!("other functions of IOMMU group {number} are bound to kernel drivers");
        return Err(refused(format!("PCI function {address}"), reason, libc::EBUSY));
    }
    let member = space.add_group(group)?;
    let group =
        member.group.as_ref().ok_or_else(|| refused(path.display().to_string(), "no group", libc::ENODEV))?;
    Ok((open_device(group, address)?, member))
}

fn by_device(path: &Path) -> Result<(File, Member), BusError> {
    let space = Space::iommufd()?;
    let device = open_node(path)?;
    let member = space.add_device(path, &device)?;
    Ok((device, member))
}

/// Tries for a while what is busy: the kernel may still be taking a killed process's drives back.
fn patiently<T>(attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && begin.elapsed() < GROUP_PATIENCE => {
                std::thread::sleep(GROUP_PATIENCE / 100);
            }
            result => return result,
        }
    }
}

fn open_node(path: &Path) -> Result<File, BusError> {
    patiently(|| OpenOptions::new().read(true).write(true).open(path)).map_err(|e| {
        let hint = match e.raw_os_error() {
            Some(libc::EBUSY) => "another process has the drive",
            Some(libc::EACCES) => "give this user access to it",
            _ => "",
        };
        failed(format!("cannot open {}", path.display()), &e, hint)
    })
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
            Some(parts) => parts.member.space.map(slabs),
            None => Err(refused("I/O memory", "the drive was given back", libc::ENODEV)),
        }
    }

    fn map_more(self: Arc<Self>, slabs: usize) -> Waiting<Result<(), BusError>> {
        elsewhere(move || self.map(slabs))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    #[test]
    fn groups_where_there_are_any_and_iommufd_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let (function, dev) = (dir.path().join("0000:04:00.0"), dir.path().join("dev"));
        create_dir_all(function.join("vfio-dev/vfio3")).unwrap();
        create_dir_all(dev.join("vfio/devices")).unwrap();
        let group = Way::Group(dev.join("vfio/12"));
        // Nothing there: the group is what people are told of.
        assert_eq!(way(&function, &dev, 12), group);
        write(dev.join("vfio/devices/vfio3"), "").unwrap();
        assert_eq!(way(&function, &dev, 12), group, "without /dev/iommu");
        write(dev.join("iommu"), "").unwrap();
        assert_eq!(way(&function, &dev, 12), Way::Device(dev.join("vfio/devices/vfio3")));
        write(dev.join("vfio/12"), "").unwrap();
        assert_eq!(way(&function, &dev, 12), Way::Device(dev.join("vfio/devices/vfio3")), "no container");
        write(dev.join("vfio/vfio"), "").unwrap();
        assert_eq!(way(&function, &dev, 12), group);
        assert_eq!(
            way(&dir.path().join("none"), &dir.path().join("nodev"), 1),
            Way::Group(dir.path().join("nodev/vfio/1"))
        );
    }
}
