//! The fixed fields of a copy, its checksum, and which of the two copies counts (specification, section 2).
//!
//! ```text
//! 0    magic [6], version u16          72   checksum algorithm [32]     256  this copy's offset u64
//! 8    size of a copy u64              104  salt [64]                   264  padding [184]
//! 16   sequence u64                    168  UUID [40]                   448  checksum [64]
//! 24   label [48]                      208  subsystem [48]              512  padding to 4096
//! ```

use aws_lc_rs::digest;
use uuid::Uuid;

use crate::HeaderError;
use crate::json::Json;
use crate::shown;

const FIRST_MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SECOND_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
const FIXED_BYTES: usize = 4096;
const CHECKSUM: std::ops::Range<usize> = 448..512;
const MIN_COPY_BYTES: usize = 16 << 10;
/// Largest copy (section 2.2).
pub const MAX_COPY_BYTES: usize = 4 << 20;

/// One of the two copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copy {
    /// At the start.
    First,
    /// Behind the first.
    Second,
}

/// The fixed fields, as far as they are of use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fixed {
    pub uuid: Uuid,
    pub label: String,
    pub sequence: u64,
    pub copy_bytes: u64,
}

/// A copy that can be used.
#[derive(Debug)]
pub struct Found {
    pub copy: Copy,
    pub fixed: Fixed,
    pub json: Json,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn text_at(bytes: &[u8], at: usize, len: usize) -> &[u8] {
    let field = &bytes[at..at + len];
    &field[..field.iter().position(|b| *b == 0).unwrap_or(len)]
}

/// The size of a copy, if the field holds a possible one: a power of two from 16 KiB to 4 MiB.
fn copy_bytes(fixed: &[u8]) -> Option<usize> {
    let size = usize::try_from(u64_at(fixed, 8)).ok()?;
    (size.is_power_of_two() && (MIN_COPY_BYTES..=MAX_COPY_BYTES).contains(&size)).then_some(size)
}

pub fn area_bytes(probe: &[u8]) -> Option<usize> {
    let fixed = probe.get(..512)?;
    fixed.starts_with(FIRST_MAGIC).then(|| copy_bytes(fixed).map_or(2 * MAX_COPY_BYTES, |size| 2 * size))
}

/// The copy that counts. A device that does not begin with LUKS's magic has none, whatever lies behind: it carries
/// something else now.
pub fn choose(area: &[u8]) -> Result<Option<Found>, HeaderError> {
    let Some(fixed) = area.get(..512).filter(|f| f.starts_with(FIRST_MAGIC)) else { return Ok(None) };
    let version = u16::from_be_bytes([fixed[6], fixed[7]]);
    if version == 1 {
        return Err(HeaderError::Version(version));
    }
    let first = read(area, 0, Copy::First);
    let second = match copy_bytes(fixed) {
        Some(size) if first.is_ok() => read(area, size, Copy::Second),
        // The first copy's size can not be trusted: the second one lies where a copy of its own size would put it.
        _ => find_second(area),
    };
    match (first, second) {
        (Ok(first), Ok(second)) if second.fixed.sequence > first.fixed.sequence => Ok(Some(second)),
        (Ok(first), _) => Ok(Some(first)),
        (Err(_), Ok(second)) => Ok(Some(second)),
        (Err(first), Err(second)) => Err(HeaderError::Damaged { first, second }),
    }
}

fn find_second(area: &[u8]) -> Result<Found, String> {
    let mut size = MIN_COPY_BYTES;
    let mut wrong = None;
    while size <= MAX_COPY_BYTES {
        match read(area, size, Copy::Second) {
            Ok(found) => return Ok(found),
            // Where a magic is, there is a reason worth telling.
            Err(e) if area.get(size..).is_some_and(|a| a.starts_with(SECOND_MAGIC)) => wrong = Some(e),
            Err(_) => {}
        }
        size *= 2;
    }
    Err(wrong.unwrap_or_else(|| "not found".into()))
}

fn algorithm(name: &[u8]) -> Option<&'static digest::Algorithm> {
    Some(match name {
        b"sha1" => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        b"sha256" => &digest::SHA256,
        b"sha384" => &digest::SHA384,
        b"sha512" => &digest::SHA512,
        _ => return None,
    })
}

/// Of a whole copy, its own field taken as zeros (section 2.3).
fn checksum(copy: &[u8], algorithm: &'static digest::Algorithm) -> digest::Digest {
    let mut sum = digest::Context::new(algorithm);
    sum.update(&copy[..CHECKSUM.start]);
    sum.update(&[0; 64]);
    sum.update(&copy[CHECKSUM.end..]);
    sum.finish()
}

fn read(area: &[u8], at: usize, copy: Copy) -> Result<Found, String> {
    let fixed = area.get(at..at + FIXED_BYTES).ok_or("not read: it lies behind what was given")?;
    let magic = if copy == Copy::First { FIRST_MAGIC } else { SECOND_MAGIC };
    if !fixed.starts_with(magic) {
        return Err("no magic number".into());
    }
    let version = u16::from_be_bytes([fixed[6], fixed[7]]);
    if version != 2 {
        return Err(format!("version {version}; 2 is needed"));
    }
    let size = copy_bytes(fixed)
        .ok_or_else(|| format!("size {}; a power of two from 16 KiB to 4 MiB is needed", u64_at(fixed, 8)))?;
    if u64_at(fixed, 256) != at as u64 || (copy == Copy::Second && size != at) {
        return Err(format!("says that it lies at {}, but lies at {at}", u64_at(fixed, 256)));
    }
    let whole = area.get(at..at + size).ok_or("not read: it ends behind what was given")?;
    let name = text_at(fixed, 72, 32);
    let algorithm = algorithm(name)
        .ok_or_else(|| format!("unknown checksum \"{}\"", shown(&String::from_utf8_lossy(name))))?;
    let sum = checksum(whole, algorithm);
    if fixed[CHECKSUM][..sum.as_ref().len()] != *sum.as_ref() {
        return Err("the checksum is wrong".into());
    }
    let uuid = std::str::from_utf8(text_at(fixed, 168, 40)).ok().and_then(|t| Uuid::parse_str(t).ok());
    let uuid = uuid.ok_or("the UUID is none")?;
    let text = text_at(whole, FIXED_BYTES, size - FIXED_BYTES);
    let json = Json::parse(text)?;
    let label = String::from_utf8_lossy(text_at(fixed, 24, 48)).into_owned();
    let fixed = Fixed { uuid, label, sequence: u64_at(fixed, 16), copy_bytes: size as u64 };
    Ok(Found { copy, fixed, json })
}

pub fn stamp(area: &mut [u8], at: usize) {
    let Some(size) = area.get(at..at + FIXED_BYTES).and_then(copy_bytes) else { return };
    let Some(whole) = area.get_mut(at..at + size) else { return };
    whole[72..104].fill(0);
    whole[72..78].copy_from_slice(b"sha256");
    let sum = checksum(whole, &digest::SHA256);
    whole[CHECKSUM].fill(0);
    whole[CHECKSUM][..32].copy_from_slice(sum.as_ref());
}
