//! Sizes on the command line and in tables.

/// Bytes from `4096`, `512M`, `10G`, `1.5T` (powers of 1024; a trailing `iB` or `B` is ignored).
pub fn parse(text: &str) -> Result<u64, String> {
    let bad = || format!("\"{text}\" is no size; examples: 512M, 10G, 1.5T");
    let t = text.trim().to_ascii_uppercase();
    let t = t.strip_suffix("IB").or_else(|| t.strip_suffix('B')).unwrap_or(&t);
    let (number, shift) = match t.char_indices().last() {
        Some((at, 'K')) => (&t[..at], 10),
        Some((at, 'M')) => (&t[..at], 20),
        Some((at, 'G')) => (&t[..at], 30),
        Some((at, 'T')) => (&t[..at], 40),
        Some((at, 'P')) => (&t[..at], 50),
        _ => (t, 0),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    let bytes = number * f64::from(1u32 << (shift / 2)) * f64::from(1u32 << (shift - shift / 2));
    if !(bytes.is_finite() && (1.0..9.0e18).contains(&bytes)) {
        return Err(bad());
    }
    Ok(bytes.round() as u64)
}

/// For people: three significant digits.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut n = bytes as f64;
    let mut unit = 0;
    while n >= 999.5 && unit < UNITS.len() - 1 {
        n /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || n >= 99.95 {
        0
    } else if n >= 9.995 {
        1
    } else {
        2
    };
    format!("{n:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("512m"), Ok(512 << 20));
        assert_eq!(parse("10GiB"), Ok(10 << 30));
        assert_eq!(parse("1.5T"), Ok(3 << 39));
        for bad in ["", "G", "-1G", "x", "1e30P", "0"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 30, "10.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(show(bytes), text);
        }
    }
}
