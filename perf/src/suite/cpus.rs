//! Which CPUs target and load get: whole physical cores, so that they do not slow each other through one core's two threads.

use std::collections::BTreeMap;
use std::fs;

use serde::{Deserialize, Serialize};

use crate::load::Cores;

/// CPUs by side; a case takes as many as it wants from the front of each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// Of our target; none where none of ours runs.
    pub target: Vec<usize>,
    /// Of the load.
    pub host: Vec<usize>,
    /// What the two have in common, for people; `None`: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<String>,
}

impl Cpus {
    /// Those given, or the halves of what this process may use.
    pub fn choose(target: Option<&Cores>, host: Option<&Cores>) -> Cpus {
        let [first, second] = halves(&allowed(), siblings);
        let given = |cores: Option<&Cores>, half| cores.map_or(half, |c| c.0.clone());
        let (target, host) = (given(target, first), given(host, second));
        Cpus { shared: shared(&target, &host, siblings), target, host }
    }

    /// For people.
    pub fn text(&self) -> String {
        let list = |cpus: &[usize]| cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        if self.target.is_empty() {
            return format!("{} for the load", list(&self.host));
        }
        format!("{} for the target, {} for the load", list(&self.target), list(&self.host))
    }
}

fn parsed(list: &str) -> Option<Vec<usize>> {
    list.trim().parse::<Cores>().ok().map(|c| c.0)
}

/// CPUs that this process may use.
fn allowed() -> Vec<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).and_then(parsed);
    list.unwrap_or_else(|| (0..std::thread::available_parallelism().map_or(1, usize::from)).collect())
}

/// CPUs of the same physical core, the CPU itself among them.
fn siblings(cpu: usize) -> Vec<usize> {
    let file = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    fs::read_to_string(file).ok().and_then(|list| parsed(&list)).unwrap_or_else(|| vec![cpu])
}

/// The first half of the physical cores, and the others; of one core its threads; one CPU twice. The first threads of all cores
/// come before the second ones.
fn halves(cpus: &[usize], siblings: impl Fn(usize) -> Vec<usize>) -> [Vec<usize>; 2] {
    let mut cores: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for &cpu in cpus {
        cores.entry(siblings(cpu).first().copied().unwrap_or(cpu)).or_default().push(cpu);
    }
    let mut cores: Vec<Vec<usize>> = cores.into_values().collect();
    if let [threads] = cores.as_slice() {
        cores = threads.iter().map(|t| vec![*t]).collect();
    }
    if let [only] = cores.as_slice() {
        return [only.clone(), only.clone()];
    }
    let (first, second) = cores.split_at(cores.len() / 2);
    [first, second].map(|half| {
        let most = half.iter().map(Vec::len).max().unwrap_or(0);
        (0..most).flat_map(|n| half.iter().filter_map(move |core| core.get(n).copied())).collect()
    })
}

/// The first thing that both sides have.
fn shared(target: &[usize], host: &[usize], siblings: impl Fn(usize) -> Vec<usize>) -> Option<String> {
    if let Some(cpu) = target.iter().find(|cpu| host.contains(cpu)) {
        return Some(format!("target and load both have CPU {cpu}"));
    }
    target.iter().find_map(|cpu| {
        let thread = siblings(*cpu).into_iter().find(|s| host.contains(s))?;
        Some(format!("the target's CPU {cpu} and the load's CPU {thread} are threads of one core"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_cores_go_to_each_side() {
        // Usual numbering: CPU 4 is the second thread of core 0, 5 of core 1.
        let far = |cpu: usize| vec![cpu % 4, cpu % 4 + 4];
        let all: Vec<usize> = (0..8).collect();
        let [target, host] = halves(&all, far);
        assert_eq!((&target, &host), (&vec![0, 1, 4, 5], &vec![2, 3, 6, 7]));
        assert_eq!(shared(&target, &host, far), None);
        // Neighbours are threads of a core; the first CPUs are not ours.
        let near = |cpu: usize| vec![cpu & !1, cpu | 1];
        assert_eq!(halves(&[3, 6, 7, 8, 9], near), [vec![3], vec![6, 8, 7, 9]]);
        assert_eq!(halves(&[5, 6, 7], |cpu| vec![cpu]), [vec![5], vec![6, 7]]);
    }

    #[test]
    fn what_is_shared_is_said() {
        let one_core = |_| vec![0, 1];
        assert_eq!(halves(&[0, 1], one_core), [vec![0], vec![1]]);
        let said = shared(&[0], &[1], one_core).expect("one core");
        assert!(said.contains("threads of one core"), "{said}");
        assert_eq!(halves(&[7], |cpu| vec![cpu]), [vec![7], vec![7]]);
        let said = shared(&[7], &[7], |cpu| vec![cpu]).expect("one CPU");
        assert!(said.contains("CPU 7"), "{said}");
    }
}
