//! What the reports of all subcommands share: the machine they ran on, sizes on the command line, tables for people.

use std::fmt::Write;
use std::fs;

use cryptfold_reactor::memory::{self, PageKind};
use serde::Serialize;

/// The machine of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processor, as it names itself.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Instruction sets that matter to the primitives, of those the processor has.
    pub features: Vec<String>,
    /// Kernel release.
    pub kernel: String,
    /// What the I/O memory is made of: `hugetlb`, `transparent`, `mixed` or `none` (nothing mapped yet).
    pub pages: &'static str,
    /// Version of this program.
    pub version: &'static str,
}

const FEATURES: [&str; 10] =
    ["aes", "vaes", "pclmulqdq", "vpclmulqdq", "sse4_2", "avx2", "avx512f", "avx512vl", "sha_ni", "gfni"];

impl Machine {
    /// This machine. Reads `/proc`; what it does not say stays "unknown".
    pub fn this() -> Machine {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
        Machine {
            cpu: field("model name").unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            features: flags.split(' ').filter(|f| FEATURES.contains(f)).map(str::to_owned).collect(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".into(), |s| s.trim().to_owned()),
            pages: match memory::stats().pages {
                PageKind::Unused => "none",
                PageKind::Huge => "hugetlb",
                PageKind::Ordinary => "transparent",
                PageKind::Mixed => "mixed",
            },
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{}, {} CPUs, Linux {}, {} huge pages; {}",
            self.cpu,
            self.cpus,
            self.kernel,
            self.pages,
            self.features.join(" ")
        )
    }
}

/// A size on the command line: a number, with an optional K, M, G or T (binary; `Ki`, `KiB`, ... are the same).
///
/// # Errors
/// What is wrong with the text.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: usize =
        number.parse().map_err(|_| format!("\"{text}\" is no size (such as 4096, 128K, 256M)"))?;
    let shift = match suffix.to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("\"{suffix}\" is no unit of size (K, M, G, T)")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

/// A size for people: `512 B`, `4 KiB`, `256 MiB`.
pub fn size_text(bytes: usize) -> String {
    let (mut n, mut unit) = (bytes, 0);
    while n >= 1024 && n.is_multiple_of(1024) && unit < 4 {
        n /= 1024;
        unit += 1;
    }
    format!("{n} {}", ["B", "KiB", "MiB", "GiB", "TiB"][unit])
}

/// Lays out rows in columns; the first `left` columns are flush left, the others flush right. The first row is the head.
pub fn table(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let w = widths[c];
            // Writing to a String can not fail.
            let _ = if c < left { write!(line, "{cell:<w$}  ") } else { write!(line, "{cell:>w$}  ") };
        }
        out.push_str(line.trim_end());
        out.push('\n');
        if i == 0 {
            out.push_str(&"-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)));
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert!(parse_size("").is_err() && parse_size("x").is_err() && parse_size("4Q").is_err());
        assert!(parse_size("99999999999999T").unwrap_err().contains("too large"));
        assert_eq!(
            (size_text(512), size_text(131_072), size_text(1536)),
            ("512 B".into(), "128 KiB".into(), "1536 B".into())
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["name".to_owned(), "n".to_owned()], vec!["a".to_owned(), "12".to_owned()]];
        assert_eq!(table(&rows, 1), "name   n\n--------\na     12\n");
    }
}
