//! The machine and the programs of a report.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::process::{Stop, output};
use crate::report::Machine;

/// Who measured where. What the system does not say is "unknown".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// Processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Instruction sets that matter here.
    pub features: Vec<String>,
    /// Kernel release.
    pub kernel: String,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Frequency governor of CPU 0; "none" where frequencies are not the kernel's business (most virtual machines).
    pub governor: String,
    /// Whether this is a virtual machine, as the processor says.
    pub virtual_machine: bool,
    /// Network interfaces: name, driver, Mbit/s.
    pub nics: Vec<String>,
    /// Load average of the last minute before the first measurement.
    pub load_before: f64,
    /// After the last one.
    pub load_after: f64,
    /// `cryptfold --version`.
    pub target: String,
    /// This program's.
    pub version: String,
    /// Commit of the source folder that the program lies in, "-dirty" with changes; "unknown" for an installed one.
    pub commit: String,
}

/// The load average over the last minute; 0 when the kernel does not say.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}

fn word(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|t| !t.is_empty())
}

fn nics() -> Vec<String> {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut all: Vec<String> = entries
        .filter(|e| e.file_name() != "lo")
        .map(|e| {
            let driver = fs::read_link(e.path().join("device/driver")).ok();
            let driver =
                driver.as_deref().and_then(Path::file_name).map(|d| d.to_string_lossy().into_owned());
            // Virtual interfaces say -1.
            let speed = word(e.path().join("speed")).filter(|s| !s.starts_with('-'));
            let name = e.file_name().to_string_lossy().into_owned();
            let driver = driver.unwrap_or_else(|| "virtual".into());
            format!("{name} ({driver}, {})", speed.map_or("speed unknown".into(), |s| format!("{s} Mbit/s")))
        })
        .collect();
    all.sort();
    all
}

/// Of the folder that the program was built in, if it still lies there.
fn commit(stop: &Stop) -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let folder = program.ancestors().find(|d| d.join("Cargo.lock").exists() && d.join(".git").exists())?;
    let mut git = Command::new("git");
    git.arg("-C").arg(folder).args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    Some(output(&mut git, stop).ok()?.trim().to_owned())
}

impl Description {
    /// This machine, and the target's program.
    pub fn this(target: Option<&Path>, stop: &Stop) -> Description {
        let machine = Machine::this();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
        let kib = kib.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let version = target.and_then(|t| output(Command::new(t).arg("--version"), stop).ok());
        Description {
            cpu: machine.cpu,
            cpus: machine.cpus,
            features: machine.features,
            kernel: machine.kernel,
            memory_bytes: kib << 10,
            governor: word("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
                .unwrap_or_else(|| "none".into()),
            virtual_machine: cpuinfo
                .lines()
                .any(|l| l.starts_with("flags") && l.split(' ').any(|flag| flag == "hypervisor")),
            nics: nics(),
            load_before: load(),
            load_after: 0.0,
            target: version.map_or_else(|| "unknown".into(), |v| v.trim().to_owned()),
            version: machine.version.to_owned(),
            commit: commit(stop).unwrap_or_else(|| "unknown".into()),
        }
    }
}
