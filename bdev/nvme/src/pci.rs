//! PCI functions as the kernel shows them under `/sys/bus/pci/devices`. Reads only.

use std::fs;
use std::path::{Path, PathBuf};

/// PCI class of NVMe I/O controllers (PCI Code and ID Assignment: mass storage, non-volatile memory, NVM Express).
pub const NVME_CLASS: u32 = 0x01_08_02;

/// A PCI function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Function {
    /// `0000:04:00.0`.
    pub address: String,
    /// Class, subclass, programming interface.
    pub class: u32,
    /// Vendor, device, subsystem vendor, subsystem device.
    pub ids: [u16; 4],
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
}

/// Where the kernel shows PCI functions.
pub fn sys() -> PathBuf {
    PathBuf::from("/sys/bus/pci/devices")
}

/// `4:0.0`, `04:00.0` or `0000:04:00.0` as the kernel writes it. None: not an address.
pub fn canonical(address: &str) -> Option<String> {
    let (bus, function) = address.trim().rsplit_once('.')?;
    let mut parts = bus.rsplit(':');
    let (device, bus) = (parts.next()?, parts.next()?);
    let domain = parts.next().unwrap_or("0");
    if parts.next().is_some() {
        return None;
    }
    let hex = |text: &str, max: u32| u32::from_str_radix(text, 16).ok().filter(|n| *n <= max);
    let (domain, bus, device) = (hex(domain, u32::MAX)?, hex(bus, 0xff)?, hex(device, 0x1f)?);
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{:x}", hex(function, 7)?))
}

/// All functions, by address. A directory that can not be read is empty.
pub fn list(sys: &Path) -> Vec<Function> {
    let entries = fs::read_dir(sys).into_iter().flatten().flatten();
    let mut all: Vec<Function> = entries.filter_map(|e| function(sys, e.file_name().to_str()?)).collect();
    all.sort_by(|a, b| a.address.cmp(&b.address));
    all
}

/// One function; None when there is none with this (canonical) address.
pub fn function(sys: &Path, address: &str) -> Option<Function> {
    let dir = sys.join(address);
    let number = |file: &str| {
        let text = fs::read_to_string(dir.join(file)).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    let link = |name: &str| {
        let target = fs::read_link(dir.join(name)).ok()?;
        Some(target.file_name()?.to_str()?.to_string())
    };
    let id = |file| number(file).unwrap_or(0) as u16;
    Some(Function {
        address: address.into(),
        class: number("class")?,
        ids: [id("vendor"), id("device"), id("subsystem_vendor"), id("subsystem_device")],
        driver: link("driver"),
        group: link("iommu_group").and_then(|g| g.parse().ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, want) in [
            ("0000:04:00.0", Some("0000:04:00.0")),
            ("4:0.0", Some("0000:04:00.0")),
            ("10000:E1:1f.7", Some("10000:e1:1f.7")),
            ("04:00", None),
            ("04:20.0", None),
            ("0:0:04:00.0", None),
            ("../04:00.0", None),
            ("", None),
        ] {
            assert_eq!(canonical(text).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn functions_from_a_directory() {
        let sys = tempfile::tempdir().unwrap();
        let dir = sys.path().join("0000:01:00.0");
        fs::create_dir(&dir).unwrap();
        for (file, text) in [("class", "0x010802\n"), ("vendor", "0x1b36\n"), ("device", "0x0010\n")] {
            fs::write(dir.join(file), text).unwrap();
        }
        std::os::unix::fs::symlink("../../bus/pci/drivers/vfio-pci", dir.join("driver")).unwrap();
        std::os::unix::fs::symlink("../../kernel/iommu_groups/7", dir.join("iommu_group")).unwrap();
        let found = list(sys.path());
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].class, found[0].ids), (NVME_CLASS, [0x1b36, 0x10, 0, 0]));
        assert_eq!((found[0].driver.as_deref(), found[0].group), (Some("vfio-pci"), Some(7)));
        assert!(list(&sys.path().join("nothing")).is_empty());
    }
}
