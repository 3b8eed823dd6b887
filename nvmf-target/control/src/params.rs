//! Typed parameters. `params!` declares a method's parameters once; the decoder, its errors and the documentation's
//! table all come from that declaration.
//!
//! Every refusal says which parameter, what was given and what is accepted. Null counts as not given.

use serde_json::{Map, Value};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::jsonrpc::RpcError;

/// A parameter's line in the documentation.
#[derive(Clone, Debug)]
pub struct Param {
    /// Name in the request.
    pub name: &'static str,
    /// What is accepted, for people.
    pub kind: String,
    /// Whether it must be given.
    pub required: bool,
    /// What is taken when it is not given, if that is a value.
    pub default: Option<String>,
    /// Whether its value may not be shown.
    pub secret: bool,
    /// What it is for.
    pub doc: String,
    /// Members, for an object.
    pub members: Vec<Param>,
}

/// Why parameters were refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamError {
    /// Path of the parameter ("listen_address.traddr").
    pub path: String,
    /// The rest of the sentence.
    pub what: String,
}

impl ParamError {
    fn inside(mut self, outer: &str) -> ParamError {
        self.path = if self.path.is_empty() { outer.into() } else { format!("{outer}.{}", self.path) };
        self
    }
}

impl From<ParamError> for RpcError {
    fn from(e: ParamError) -> RpcError {
        if e.path.is_empty() {
            RpcError::params(e.what)
        } else {
            RpcError::params(format!("{}: {}", e.path, e.what))
        }
    }
}

/// A set of named parameters.
pub trait Params: Sized {
    /// Their documentation.
    fn table() -> Vec<Param>;
    /// Decodes them.
    ///
    /// # Errors
    /// Unknown, missing or unacceptable.
    fn decode(given: &Map<String, Value>) -> Result<Self, ParamError>;
}

/// A type that a parameter can have.
pub trait FromJson: Sized {
    /// Whether a value must be given.
    const REQUIRED: bool = true;
    /// Whether the value may not appear in messages.
    const SECRET: bool = false;
    /// What is accepted, for people.
    fn kind() -> String;
    /// Members, for an object.
    fn members() -> Vec<Param> {
        Vec::new()
    }
    /// Decodes; `Err(None)` when the value is not of this kind, `Err(Some)` when a part of it is not.
    #[allow(clippy::missing_errors_doc)]
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>>;
    /// What stands for "not given".
    fn absent() -> Option<Self> {
        None
    }
}

/// Decodes one member of an object. `default` is used when it is not given.
#[doc(hidden)]
pub fn field<T: FromJson>(
    given: &Map<String, Value>,
    name: &'static str,
    default: Option<T>,
) -> Result<T, ParamError> {
    match given.get(name) {
        None | Some(Value::Null) => default.or_else(T::absent).ok_or_else(|| ParamError {
            path: name.into(),
            what: format!("missing; {} is needed", T::kind()),
        }),
        Some(v) => T::from_json(v).map_err(|e| match e {
            Some(inner) => inner.inside(name),
            None if T::SECRET => ParamError { path: name.into(), what: format!("{} is needed", T::kind()) },
            None => ParamError {
                path: name.into(),
                what: format!("{} was given; {} is needed", shown(v), T::kind()),
            },
        }),
    }
}

/// A value as it appears in a message: short.
fn shown(v: &Value) -> String {
    let s = v.to_string();
    if s.chars().count() <= 60 { s } else { s.chars().take(57).chain("...".chars()).collect() }
}

#[doc(hidden)]
pub fn check_known(given: &Map<String, Value>, known: &[&str]) -> Result<(), ParamError> {
    match given.keys().find(|k| !known.contains(&k.as_str())) {
        None => Ok(()),
        Some(k) => Err(ParamError {
            path: String::new(),
            what: format!(
                "unknown parameter {}; accepted are {}",
                shown(&Value::from(k.as_str())),
                known.join(", ")
            ),
        }),
    }
}

/// Declares structs of parameters: `/// doc` `name: Type [= default],`. An `Option` may be left out.
macro_rules! params {
    ($( $(#[doc = $sdoc:literal])* pub struct $name:ident {
        $( $(#[doc = $doc:literal])* $field:ident : $ty:ty $(= $default:expr)? ,)*
    })*) => {$(
        $(#[doc = $sdoc])*
        // Some parameters of SPDK's are accepted and have no effect; their documentation says so.
        #[allow(dead_code)]
        #[derive(Clone, Debug)]
        pub struct $name { $( $(#[doc = $doc])* pub $field: $ty, )* }
        impl $crate::params::Params for $name {
            fn table() -> Vec<$crate::params::Param> {
                vec![$( {
                    #[allow(unused_mut, unused_assignments)]
                    let mut default: Option<String> = None;
                    $( let value: $ty = $default; default = Some(format!("{value:?}")); )?
                    $crate::params::Param {
                        name: stringify!($field),
                        kind: <$ty as $crate::params::FromJson>::kind(),
                        required: <$ty as $crate::params::FromJson>::REQUIRED && default.is_none(),
                        default,
                        secret: <$ty as $crate::params::FromJson>::SECRET,
                        doc: concat!($($doc),*).trim().to_string(),
                        members: <$ty as $crate::params::FromJson>::members(),
                    }
                } ),*]
            }
            fn decode(
                given: &serde_json::Map<String, serde_json::Value>,
            ) -> Result<Self, $crate::params::ParamError> {
                $crate::params::check_known(given, &[$(stringify!($field)),*])?;
                Ok($name { $( $field: {
                    #[allow(unused_mut, unused_assignments)]
                    let mut default: Option<$ty> = None;
                    $( default = Some($default); )?
                    $crate::params::field(given, stringify!($field), default)?
                }, )* })
            }
        }
    )*};
}
pub(crate) use params;

/// Declares an enumeration of words.
macro_rules! choices {
    ($( $(#[doc = $edoc:literal])* pub enum $name:ident {
        $( $(#[doc = $doc:literal])* $variant:ident = $word:literal ,)*
    })*) => {$(
        $(#[doc = $edoc])*
        #[derive(Clone, Copy, PartialEq, Eq)]
        pub enum $name { $( $(#[doc = $doc])* $variant, )* }
        impl $name {
            /// The word in requests and replies.
            #[allow(dead_code)]
            pub fn word(self) -> &'static str {
                match self { $( $name::$variant => $word, )* }
            }
        }
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{:?}", self.word())
            }
        }
        impl $crate::params::FromJson for $name {
            fn kind() -> String { [$( concat!("\"", $word, "\"") ),*].join(" or ") }
            fn from_json(v: &serde_json::Value) -> Result<Self, Option<$crate::params::ParamError>> {
                match v.as_str() { $( Some($word) => Ok($name::$variant), )* _ => Err(None) }
            }
        }
    )*};
}
pub(crate) use choices;

/// Makes a set of parameters usable as a parameter itself.
macro_rules! object_params {
    ($($name:ident),* $(,)?) => {$(
        impl $crate::params::FromJson for $name {
            fn kind() -> String { "an object".into() }
            fn members() -> Vec<$crate::params::Param> { <$name as $crate::params::Params>::table() }
            fn from_json(v: &serde_json::Value) -> Result<Self, Option<$crate::params::ParamError>> {
                let o = v.as_object().ok_or(None)?;
                <$name as $crate::params::Params>::decode(o).map_err(Some)
            }
        }
    )*};
}
pub(crate) use object_params;

/// A whole number, also when it is written as 1.0 or 1e3.
fn whole(v: &Value) -> Option<i128> {
    if let Some(n) = v.as_u64() {
        return Some(n.into());
    }
    if let Some(n) = v.as_i64() {
        return Some(n.into());
    }
    // 2^53: beyond it a floating-point number does not name one whole number.
    v.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= 9_007_199_254_740_992.0).map(|f| f as i128)
}

macro_rules! integers {
    ($($ty:ty),*) => {$(
        impl FromJson for $ty {
            fn kind() -> String { format!("a number from {} to {}", <$ty>::MIN, <$ty>::MAX) }
            fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
                whole(v).and_then(|n| <$ty>::try_from(n).ok()).ok_or(None)
            }
        }
    )*};
}
integers!(u8, u16, u32, u64, i32);

impl FromJson for bool {
    fn kind() -> String {
        "true or false".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_bool().ok_or(None)
    }
}

impl FromJson for String {
    fn kind() -> String {
        "a string".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_str().map(str::to_string).ok_or(None)
    }
}

impl FromJson for Uuid {
    fn kind() -> String {
        "a UUID (xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx)".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_str().and_then(|s| Uuid::parse_str(s).ok()).ok_or(None)
    }
}

impl FromJson for Value {
    fn kind() -> String {
        "any JSON".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        Ok(v.clone())
    }
}

impl<T: FromJson> FromJson for Option<T> {
    const REQUIRED: bool = false;
    const SECRET: bool = T::SECRET;
    fn kind() -> String {
        T::kind()
    }
    fn members() -> Vec<Param> {
        T::members()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        T::from_json(v).map(Some)
    }
    fn absent() -> Option<Self> {
        Some(None)
    }
}

impl<T: FromJson> FromJson for Vec<T> {
    const SECRET: bool = T::SECRET;
    fn kind() -> String {
        format!("an array ({} each)", T::kind())
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_array().ok_or(None)?.iter().map(|x| T::from_json(x).map_err(|_| None)).collect()
    }
}

/// `N` bytes as hexadecimal digits; hyphens and colons between them are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hex<const N: usize>(pub [u8; N]);

impl<const N: usize> FromJson for Hex<N> {
    fn kind() -> String {
        format!("{} hexadecimal digits", 2 * N)
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        let digits: String = v.as_str().ok_or(None)?.chars().filter(|c| !matches!(c, '-' | ':')).collect();
        let bytes = unhex(&digits).ok_or(None)?;
        <[u8; N]>::try_from(bytes.as_slice()).map(Hex).map_err(|_| None)
    }
}

/// Key bytes in hexadecimal; never shown, wiped when dropped.
#[derive(Clone)]
pub struct SecretHex(pub Zeroizing<Vec<u8>>);

impl std::fmt::Debug for SecretHex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SecretHex({} bytes)", self.0.len())
    }
}

impl FromJson for SecretHex {
    const SECRET: bool = true;
    fn kind() -> String {
        "key bytes in hexadecimal".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_str().and_then(unhex).map(|b| SecretHex(Zeroizing::new(b))).ok_or(None)
    }
}

/// A password; never shown, wiped when dropped.
#[derive(Clone)]
pub struct SecretText(pub Zeroizing<String>);

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretText(..)")
    }
}

impl FromJson for SecretText {
    const SECRET: bool = true;
    fn kind() -> String {
        "a password".into()
    }
    fn from_json(v: &Value) -> Result<Self, Option<ParamError>> {
        v.as_str().map(|s| SecretText(Zeroizing::new(s.into()))).ok_or(None)
    }
}

/// Bytes from an even number of hexadecimal digits.
pub fn unhex(s: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = s.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
    let digits = Zeroizing::new(digits?);
    if digits.len() % 2 != 0 {
        return None;
    }
    Some(digits.chunks_exact(2).map(|p| p[0] << 4 | p[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    choices! {
        /// Words.
        pub enum Word {
            /// One.
            One = "one",
            /// Two.
            Two = "two",
        }
    }

    params! {
        /// Inner.
        pub struct Inner {
            /// Address.
            traddr: String,
        }
        /// Outer.
        pub struct Outer {
            /// Name to use.
            name: String,
            /// Size.
            size: u32 = 512,
            /// Maybe.
            uuid: Option<Uuid>,
            /// Word.
            word: Option<Word>,
            /// Inner object.
            addr: Option<Inner>,
            /// Key.
            key: Option<SecretHex>,
            /// List.
            names: Option<Vec<String>>,
        }
    }
    object_params!(Inner);

    fn refused(v: Value) -> String {
        RpcError::from(Outer::decode(v.as_object().unwrap()).unwrap_err()).message
    }

    #[test]
    fn good_parameters() {
        let p = json!({"name": "a", "uuid": "CECCF520691E4B469546-34af789907c5".replace('-', ""), "word": "two",
            "addr": {"traddr": "x"}, "key": "00ff", "names": ["p", "q"], "size": 1e3});
        let p = Outer::decode(p.as_object().unwrap()).unwrap();
        assert_eq!((p.name.as_str(), p.size, p.word), ("a", 1000, Some(Word::Two)));
        assert_eq!(p.addr.unwrap().traddr, "x");
        assert_eq!(p.key.unwrap().0.as_slice(), [0, 0xff]);
        assert_eq!(p.names.unwrap(), ["p", "q"]);
        let p = Outer::decode(json!({"name": "a", "uuid": null}).as_object().unwrap()).unwrap();
        assert_eq!((p.size, p.uuid), (512, None));
    }

    #[test]
    fn refusals_name_parameter_given_and_accepted() {
        assert_eq!(refused(json!({})), "Invalid parameters: name: missing; a string is needed");
        assert_eq!(refused(json!({"name": 5})), "Invalid parameters: name: 5 was given; a string is needed");
        assert_eq!(
            refused(json!({"name": "a", "size": -1})),
            "Invalid parameters: size: -1 was given; a number from 0 to 4294967295 is needed"
        );
        assert_eq!(
            refused(json!({"name": "a", "word": "three"})),
            "Invalid parameters: word: \"three\" was given; \"one\" or \"two\" is needed"
        );
        assert_eq!(
            refused(json!({"name": "a", "addr": {}})),
            "Invalid parameters: addr.traddr: missing; a string is needed"
        );
        assert!(
            refused(json!({"name": "a", "nmae": 1}))
                .contains("unknown parameter \"nmae\"; accepted are name, size")
        );
        assert!(refused(json!({"name": "x".repeat(10), "size": "y".repeat(500)})).len() < 200);
    }

    #[test]
    fn secrets_do_not_show() {
        let m = refused(json!({"name": "a", "key": "secretkeymaterial"}));
        assert!(!m.contains("secretkey"), "{m}");
        let p = Outer::decode(json!({"name": "a", "key": "c0ffee"}).as_object().unwrap()).unwrap();
        assert!(!format!("{p:?}").contains("c0ffee"));
    }

    #[test]
    fn the_table_is_the_declaration() {
        let t = Outer::table();
        assert!(t[0].required && !t[1].required && !t[2].required);
        assert_eq!(t[1].default.as_deref(), Some("512"));
        assert_eq!(t[0].doc, "Name to use.");
        assert_eq!(t[4].members[0].name, "traddr");
    }
}
