//! The list of CPUs: `0`, `0-1`, `0,2`, `[0,1]`, `0x3`.

/// Largest CPU number that is believed.
const MAX_CPU: usize = 1023;

/// A list of CPUs, each once, as given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(pub Vec<usize>);

impl std::str::FromStr for Cores {
    type Err = String;

    fn from_str(text: &str) -> Result<Cores, String> {
        let bad = || format!("\"{text}\" is no list of CPUs; examples: 0  0-1  0,2  [0,1]  0x3");
        let inner = text.trim().trim_start_matches('[').trim_end_matches(']');
        let mut cores = Vec::new();
        if let Some(mask) = inner.strip_prefix("0x") {
            let mask = u128::from_str_radix(mask, 16).map_err(|_| bad())?;
            cores.extend((0..128).filter(|n| mask >> n & 1 == 1));
        } else {
            for part in inner.split(',') {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                let first: usize = first.trim().parse().map_err(|_| bad())?;
                let last: usize = last.trim().parse().map_err(|_| bad())?;
                if first > last || last > MAX_CPU {
                    return Err(bad());
                }
                cores.extend(first..=last);
            }
        }
        if cores.is_empty() {
            return Err(bad());
        }
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = cores.iter().find(|c| !seen.insert(**c)) {
            return Err(format!("CPU {twice} is in \"{text}\" twice"));
        }
        Ok(Cores(cores))
    }
}

impl Cores {
    /// Whether the machine has them all; `online` is in the kernel's form ("0-3,8").
    pub fn check(&self, online: &str) -> Result<(), String> {
        let Ok(there) = online.trim().parse::<Cores>() else { return Ok(()) };
        match self.0.iter().find(|c| !there.0.contains(c)) {
            None => Ok(()),
            Some(c) => Err(format!("--cores: this machine has no CPU {c}; it has {}", online.trim())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_masks() {
        let ok = |t: &str| t.parse::<Cores>().unwrap().0;
        assert_eq!(ok("0"), [0]);
        assert_eq!(ok("0-2"), [0, 1, 2]);
        assert_eq!(ok("[3,0-1]"), [3, 0, 1]);
        assert_eq!(ok("0x15"), [0, 2, 4]);
        for bad in ["", "x", "1-0", "0,0", "0x0", "0xg", "-1", "0-5000", "[]"] {
            assert!(bad.parse::<Cores>().is_err(), "{bad}");
        }
        let cores: Cores = "0,5".parse().unwrap();
        assert!(cores.check("0-7\n").is_ok());
        assert!(cores.check("0-1\n").unwrap_err().contains("no CPU 5"));
    }
}
