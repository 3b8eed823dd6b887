//! NVMe Qualified Names (NVMe Base 2.0 section 4.5): validation and the 256-byte field they travel in.

/// Bytes of an NQN field on the wire.
pub const FIELD_BYTES: usize = 256;
/// Longest NQN, bytes of UTF-8, terminator not counted.
pub const MAX_BYTES: usize = 223;
/// The well-known NQN of every discovery subsystem.
pub const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// What the UUID form begins with.
pub const UUID_PREFIX: &str = "nqn.2014-08.org.nvmexpress:uuid:";

/// Why a name was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NqnError {
    /// No terminator within the field, or the text is longer than 223 bytes.
    #[error("NQN is longer than {MAX_BYTES} bytes or not terminated")]
    TooLong,
    /// Empty.
    #[error("NQN is empty")]
    Empty,
    /// Not UTF-8.
    #[error("NQN is not valid UTF-8")]
    Utf8,
    /// A NUL amid the text.
    #[error("NQN contains a NUL")]
    Nul,
    /// Does not begin with `nqn.`.
    #[error("NQN does not begin with \"nqn.\"")]
    Prefix,
    /// `nqn.` is not followed by `yyyy-mm.` with a month of 01 to 12.
    #[error("NQN has no date of the form yyyy-mm after \"nqn.\"")]
    Date,
    /// The reverse domain is missing or has an empty, overlong or illegal label.
    #[error("NQN has no valid reverse domain name after its date")]
    Domain,
    /// A colon without text behind it.
    #[error("NQN ends in a colon")]
    Suffix,
    /// The UUID form without a UUID of 8-4-4-4-12 hexadecimal digits.
    #[error("NQN of the UUID form has no valid UUID")]
    Uuid,
}

/// A name of legal form. Comparison is by bytes, as the specification demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nqn<'a>(&'a str);

impl<'a> Nqn<'a> {
    /// Checks length and form: `nqn.yyyy-mm.reverse.domain[:text]`, or the UUID form.
    pub fn parse(text: &'a str) -> Result<Self, NqnError> {
        if text.is_empty() {
            return Err(NqnError::Empty);
        }
        if text.len() > MAX_BYTES {
            return Err(NqnError::TooLong);
        }
        if text.contains('\0') {
            return Err(NqnError::Nul);
        }
        let rest = text.strip_prefix("nqn.").ok_or(NqnError::Prefix)?;
        if let Some(uuid) = text.strip_prefix(UUID_PREFIX) {
            return if is_uuid(uuid) { Ok(Self(text)) } else { Err(NqnError::Uuid) };
        }
        // A date is ASCII, so byte 8 is a character boundary.
        let dated = rest.as_bytes().get(..8).filter(|d| is_date(d)).map(|_| &rest[8..]);
        let dated = dated.ok_or(NqnError::Date)?;
        let (domain, suffix) = dated.split_once(':').map_or((dated, None), |(d, s)| (d, Some(s)));
        if !domain.split('.').all(is_label) {
            return Err(NqnError::Domain);
        }
        if suffix == Some("") {
            return Err(NqnError::Suffix);
        }
        Ok(Self(text))
    }

    /// The text.
    pub const fn as_str(self) -> &'a str {
        self.0
    }

    /// Whether this is the well-known discovery subsystem.
    pub fn is_discovery(self) -> bool {
        self.0 == DISCOVERY
    }

    /// The text in its field, padded with NULs.
    pub fn to_field(self) -> [u8; FIELD_BYTES] {
        let mut field = [0; FIELD_BYTES];
        field[..self.0.len()].copy_from_slice(self.0.as_bytes());
        field
    }
}

/// The text of a received field: terminated, 1 to 223 bytes, UTF-8. The form is not checked, because hosts
/// in the field name themselves freely; what is compared is the text.
pub fn field_text(field: &[u8; FIELD_BYTES]) -> Result<&str, NqnError> {
    let end = field[..=MAX_BYTES].iter().position(|b| *b == 0).ok_or(NqnError::TooLong)?;
    if end == 0 {
        return Err(NqnError::Empty);
    }
    core::str::from_utf8(&field[..end]).map_err(|_| NqnError::Utf8)
}

/// `yyyy-mm.`
fn is_date(d: &[u8]) -> bool {
    let digits = [0, 1, 2, 3, 5, 6].iter().all(|&i| d[i].is_ascii_digit());
    digits && d[4] == b'-' && d[7] == b'.' && matches!(&d[5..7], [b'0', b'1'..=b'9'] | [b'1', b'0'..=b'2'])
}

fn is_label(label: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    (1..=63).contains(&label.len())
        && label.bytes().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let uuid = "nqn.2014-08.org.nvmexpress:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6";
        let long = format!("nqn.2024-01.io.cryptfold:{}", "x".repeat(223 - 25));
        assert_eq!(long.len(), 223);
        for good in [
            DISCOVERY,
            uuid,
            &long,
            "nqn.2014-08.com.example:nvme:nvm-subsystem-sn-d78432",
            "nqn.2016-06.io.spdk:cnode1",
            "nqn.2014-12.a",
            "nqn.2024-01.io.x:\u{e9}\u{1f600}",
        ] {
            assert_eq!(Nqn::parse(good).map(Nqn::as_str), Ok(good));
            assert_eq!(field_text(&Nqn(good).to_field()), Ok(good));
        }
        assert!(Nqn(DISCOVERY).is_discovery() && !Nqn(uuid).is_discovery());
        use NqnError::*;
        for (bad, why) in [
            ("", Empty),
            (&*format!("{long}x"), TooLong),
            ("nqn.2014-08.com\0", Nul),
            ("iqn.2014-08.com.example", Prefix),
            ("NQN.2014-08.com.example", Prefix),
            ("nqn.", Date),
            ("nqn.2014-08", Date),
            ("nqn.2014-8.com", Date),
            ("nqn.2014-00.com", Date),
            ("nqn.2014-13.com", Date),
            ("nqn.201\u{e9}-1.com", Date),
            ("nqn.2014-08.", Domain),
            ("nqn.2014-08.:x", Domain),
            ("nqn.2014-08.com..example", Domain),
            ("nqn.2014-08.com.-ex", Domain),
            ("nqn.2014-08.com.ex-:x", Domain),
            ("nqn.2014-08.com.ex ample", Domain),
            (&*format!("nqn.2014-08.{}", "x".repeat(64)), Domain),
            ("nqn.2014-08.com.example:", Suffix),
            ("nqn.2014-08.org.nvmexpress:uuid:", Uuid),
            ("nqn.2014-08.org.nvmexpress:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bfg", Uuid),
            ("nqn.2014-08.org.nvmexpress:uuid:f81d4fae07dec-11d0-a765-00a0c91e6bf6", Uuid),
        ] {
            assert_eq!(Nqn::parse(bad), Err(why), "{bad}");
        }
    }

    #[test]
    fn fields() {
        let mut field = [b'x'; FIELD_BYTES];
        assert_eq!(field_text(&field), Err(NqnError::TooLong));
        field[224] = 0;
        assert_eq!(field_text(&field), Err(NqnError::TooLong));
        field[223] = 0;
        assert_eq!(field_text(&field).map(str::len), Ok(223));
        field[3] = 0xff;
        assert_eq!(field_text(&field), Err(NqnError::Utf8));
        field[0] = 0;
        assert_eq!(field_text(&field), Err(NqnError::Empty));
    }
}
