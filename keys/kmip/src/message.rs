//! KMIP's messages, as far as keys for disks need them (KMIP 1.4 specification, sections 2 to 9). No I/O.
//!
//! A request holds one operation; a response answers it. Structures that are not known are passed over, as the protocol
//! asks for; what is missing or of another type is an error.

use std::fmt;

use thiserror::Error;
use zeroize::Zeroizing;

use crate::ttlv::{Item, MAX_MESSAGE_BYTES, Secret, Tag, TtlvError, Value};

macro_rules! tags {
    ($($name:ident = $number:expr;)*) => { $(const $name: Tag = Tag($number);)* };
}

// Section 9.1.3.1, table 286.
tags! {
    ATTRIBUTE = 0x42_0008;
    ATTRIBUTE_NAME = 0x42_000A;
    ATTRIBUTE_VALUE = 0x42_000B;
    BATCH_COUNT = 0x42_000D;
    BATCH_ITEM = 0x42_000F;
    COMPROMISE_OCCURRENCE_DATE = 0x42_0021;
    CRYPTOGRAPHIC_ALGORITHM = 0x42_0028;
    CRYPTOGRAPHIC_LENGTH = 0x42_002A;
    KEY = 0x42_003F;
    KEY_BLOCK = 0x42_0040;
    KEY_FORMAT_TYPE = 0x42_0042;
    KEY_MATERIAL = 0x42_0043;
    KEY_VALUE = 0x42_0045;
    KEY_WRAPPING_DATA = 0x42_0046;
    MAXIMUM_ITEMS = 0x42_004F;
    MAXIMUM_RESPONSE_SIZE = 0x42_0050;
    NAME_TYPE = 0x42_0054;
    NAME_VALUE = 0x42_0055;
    OBJECT_TYPE = 0x42_0057;
    OPERATION = 0x42_005C;
    PROTOCOL_VERSION = 0x42_0069;
    PROTOCOL_VERSION_MAJOR = 0x42_006A;
    PROTOCOL_VERSION_MINOR = 0x42_006B;
    QUERY_FUNCTION = 0x42_0074;
    REQUEST_HEADER = 0x42_0077;
    REQUEST_MESSAGE = 0x42_0078;
    REQUEST_PAYLOAD = 0x42_0079;
    RESPONSE_HEADER = 0x42_007A;
    RESPONSE_MESSAGE = 0x42_007B;
    RESPONSE_PAYLOAD = 0x42_007C;
    RESULT_MESSAGE = 0x42_007D;
    RESULT_REASON = 0x42_007E;
    RESULT_STATUS = 0x42_007F;
    REVOCATION_MESSAGE = 0x42_0080;
    REVOCATION_REASON = 0x42_0081;
    REVOCATION_REASON_CODE = 0x42_0082;
    SECRET_DATA = 0x42_0085;
    SECRET_DATA_TYPE = 0x42_0086;
    SYMMETRIC_KEY = 0x42_008F;
    TEMPLATE_ATTRIBUTE = 0x42_0091;
    UNIQUE_IDENTIFIER = 0x42_0094;
    VENDOR_IDENTIFICATION = 0x42_009D;
}

/// Longest unique identifier or name that is sent or taken, in bytes.
pub const MAX_TEXT_BYTES: usize = 512;
/// Objects that one Locate may answer with.
pub const MAX_LOCATED: usize = 256;

const AES: u32 = 3;
const FORMAT_RAW: u32 = 1;
const FORMAT_OPAQUE: u32 = 2;
const FORMAT_TRANSPARENT_SYMMETRIC: u32 = 7;
const NAME_UNINTERPRETED: u32 = 1;
const SECRET_DATA_SEED: u32 = 2;

/// A version of the protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Version {
    /// Always 1 here.
    pub major: i32,
    /// 2, 3 or 4.
    pub minor: i32,
}

impl Version {
    /// What this client speaks, the best first.
    pub const OURS: [Version; 3] =
        [Version { major: 1, minor: 4 }, Version { major: 1, minor: 3 }, Version { major: 1, minor: 2 }];

    fn item(self) -> Item {
        Item::structure(
            PROTOCOL_VERSION,
            vec![
                Item::integer(PROTOCOL_VERSION_MAJOR, self.major),
                Item::integer(PROTOCOL_VERSION_MINOR, self.minor),
            ],
        )
    }

    fn from_item(item: &Item) -> Result<Version, MessageError> {
        let fields = structure(item)?;
        Ok(Version {
            major: integer(find(fields, PROTOCOL_VERSION_MAJOR)?)?,
            minor: integer(find(fields, PROTOCOL_VERSION_MINOR)?)?,
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

macro_rules! codes {
    ($($(#[doc = $tdoc:literal])* $name:ident { $($(#[doc = $doc:literal])* $variant:ident = $code:expr, $text:expr;)* })*) => {$(
        $(#[doc = $tdoc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum $name { $($(#[doc = $doc])* $variant,)* }
        impl $name {
            /// The number on the wire.
            pub fn code(self) -> u32 {
                match self { $($name::$variant => $code,)* }
            }
            /// From the wire.
            pub fn from_code(code: u32) -> Option<$name> {
                match code { $($code => Some($name::$variant),)* _ => None }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($name::$variant => $text,)* })
            }
        }
    )*};
}

codes! {
    /// Operations (section 9.1.3.2.27) that this client uses.
    Operation {
        /// Makes a key at the server.
        Create = 1, "Create";
        /// Hands a key to the server.
        Register = 3, "Register";
        /// Finds objects by attributes.
        Locate = 8, "Locate";
        /// Fetches a key.
        Get = 10, "Get";
        /// Fetches attributes.
        GetAttributes = 11, "Get Attributes";
        /// Makes a key active.
        Activate = 18, "Activate";
        /// Deactivates a key, or calls it compromised.
        Revoke = 19, "Revoke";
        /// Destroys a key.
        Destroy = 20, "Destroy";
        /// What the server can do.
        Query = 24, "Query";
        /// Which versions it speaks.
        DiscoverVersions = 30, "Discover Versions";
    }
    /// Objects that hold a key (section 9.1.3.2.12).
    ObjectType {
        /// A symmetric key.
        SymmetricKey = 2, "symmetric key";
        /// Bytes that the server does not interpret.
        SecretData = 7, "secret data";
    }
    /// Where a key is in its life (section 3.22, 9.1.3.2.18).
    State {
        /// Not in use yet.
        PreActive = 1, "pre-active";
        /// In use.
        Active = 2, "active";
        /// Not to be used any more.
        Deactivated = 3, "deactivated";
        /// Somebody else may have it.
        Compromised = 4, "compromised";
        /// Gone.
        Destroyed = 5, "destroyed";
        /// Gone, and somebody else may have it.
        DestroyedCompromised = 6, "destroyed and compromised";
    }
    /// Why a key is revoked (section 9.1.3.2.20). Compromise makes it compromised, all others deactivated.
    RevocationReason {
        /// None given.
        Unspecified = 1, "unspecified";
        /// Somebody else may have the key.
        KeyCompromise = 2, "key compromise";
        /// Another key has taken its place.
        Superseded = 5, "superseded";
        /// It is not needed any more.
        CessationOfOperation = 6, "cessation of operation";
        /// Its user may not use it any more.
        PrivilegeWithdrawn = 7, "privilege withdrawn";
    }
}

impl Operation {
    /// Whether it only reads: may be sent again when no answer came.
    pub fn is_read_only(self) -> bool {
        use Operation as O;
        matches!(self, O::Locate | O::Get | O::GetAttributes | O::Query | O::DiscoverVersions)
    }
}

/// Why a server refused (section 9.1.3.2.29).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reason(pub u32);

impl Reason {
    /// No such object.
    pub const ITEM_NOT_FOUND: Reason = Reason(1);
    /// Who asked is not known.
    pub const AUTHENTICATION_NOT_SUCCESSFUL: Reason = Reason(3);
    /// The message, or its version, is not understood.
    pub const INVALID_MESSAGE: Reason = Reason(4);
    /// The server does not have this operation.
    pub const OPERATION_NOT_SUPPORTED: Reason = Reason(5);
    /// A field is wrong.
    pub const INVALID_FIELD: Reason = Reason(7);
    /// Not possible in the object's state.
    pub const ILLEGAL_OPERATION: Reason = Reason(11);
    /// Who asked may not.
    pub const PERMISSION_DENIED: Reason = Reason(12);
    /// The object lies in the server's archive.
    pub const OBJECT_ARCHIVED: Reason = Reason(13);
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            1 => "item not found",
            2 => "response too large",
            3 => "authentication not successful",
            4 => "invalid message",
            5 => "operation not supported",
            6 => "missing data",
            7 => "invalid field",
            8 => "feature not supported",
            10 => "cryptographic failure",
            11 => "illegal operation",
            12 => "permission denied",
            13 => "object archived",
            16 => "key format type not supported",
            19 => "key value not present",
            22 => "sensitive",
            23 => "not extractable",
            24 => "object already exists",
            256 => "general failure",
            other => return write!(f, "reason {other:#x}"),
        };
        f.write_str(text)
    }
}

/// A message that is TTLV but not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MessageError {
    /// No TTLV.
    #[error(transparent)]
    Ttlv(#[from] TtlvError),
    /// An item that must be there is not.
    #[error("item {0} is missing")]
    Missing(Tag),
    /// An item is of another type than its tag says.
    #[error("item {0} is of the wrong type")]
    WrongType(Tag),
    /// The response answers something else.
    #[error("the response answers another operation than {0}")]
    OtherOperation(Operation),
    /// Neither done nor failed ("pending", "undone"): not asked for.
    #[error("unexpected result status {0}")]
    Status(u32),
    /// More or less than one answer.
    #[error("{0} answers to one request")]
    Batch(usize),
    /// The version is none that was offered.
    #[error("the server speaks KMIP {0}, which was not offered")]
    Version(Version),
    /// A key in a form that is not supported.
    #[error("the key has {0}; raw bytes are needed")]
    KeyForm(&'static str),
    /// Text or a list that is longer than it may be.
    #[error("item {tag} is longer than {limit}")]
    TooLong {
        /// The item.
        tag: Tag,
        /// The limit, in bytes or items.
        limit: usize,
    },
}

/// The server's no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// What it says about it: at most 200 characters, escaped.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, " ({})", self.message) }
    }
}

/// A key as a server holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyObject {
    /// What it is.
    pub object_type: ObjectType,
    /// The key.
    pub key: Secret,
}

/// Attributes of an object, as far as they are of use here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Where it is in its life; none for objects that have no life.
    pub state: Option<State>,
    /// What it is; none when it is nothing that this client uses.
    pub object_type: Option<ObjectType>,
    /// Length of the key, in bits.
    pub length_bits: Option<i32>,
    /// Its names.
    pub names: Vec<String>,
}

/// What to look for. All that is given must fit.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// A name.
    pub name: Option<String>,
    /// A kind of object.
    pub object_type: Option<ObjectType>,
    /// A state.
    pub state: Option<State>,
}

/// What a new object gets.
#[derive(Clone, Debug)]
pub struct NewObject {
    /// Its name; servers may insist on unique ones.
    pub name: Option<String>,
    /// Length of the key, in bits.
    pub length_bits: i32,
    /// Uses: KMIP's cryptographic usage mask.
    pub usage: i32,
    /// Operation Policy Name, for servers that have policies.
    pub policy: Option<String>,
}

/// Encrypt and Decrypt (section 9.1.3.3.1).
pub const USAGE_ENCRYPT_DECRYPT: i32 = 0x0C;
/// Wrap Key and Unwrap Key.
pub const USAGE_WRAP_UNWRAP: i32 = 0x30;

/// One operation of a request.
#[derive(Debug)]
pub struct Request {
    /// Which.
    pub operation: Operation,
    payload: Vec<Item>,
}

fn attribute(name: &str, value: Value) -> Item {
    Item::structure(ATTRIBUTE, vec![Item::text(ATTRIBUTE_NAME, name), Item::new(ATTRIBUTE_VALUE, value)])
}

fn name_attribute(name: &str) -> Item {
    let value = vec![Item::text(NAME_VALUE, name), Item::enumeration(NAME_TYPE, NAME_UNINTERPRETED)];
    attribute("Name", Value::Structure(value))
}

impl NewObject {
    fn template(&self, with_key: bool) -> Item {
        let mut attributes = Vec::new();
        if with_key {
            attributes.push(attribute("Cryptographic Algorithm", Value::Enumeration(AES)));
            attributes.push(attribute("Cryptographic Length", Value::Integer(self.length_bits)));
        }
        attributes.push(attribute("Cryptographic Usage Mask", Value::Integer(self.usage)));
        attributes.extend(self.name.as_deref().map(name_attribute));
        let policy = self.policy.clone().map(|p| attribute("Operation Policy Name", Value::Text(p)));
        attributes.extend(policy);
        Item::structure(TEMPLATE_ATTRIBUTE, attributes)
    }
}

impl Request {
    fn about(operation: Operation, id: &str) -> Request {
        Request { operation, payload: vec![Item::text(UNIQUE_IDENTIFIER, id)] }
    }

    /// Which of these versions the server speaks (section 4.26).
    pub fn discover_versions(versions: &[Version]) -> Request {
        let payload = versions.iter().map(|v| v.item()).collect();
        Request { operation: Operation::DiscoverVersions, payload }
    }

    /// What the server can do: operations, and who made it (section 4.25).
    pub fn query() -> Request {
        let payload = [1, 3].map(|function| Item::enumeration(QUERY_FUNCTION, function)).into();
        Request { operation: Operation::Query, payload }
    }

    /// Finds objects (section 4.9).
    pub fn locate(filter: &Filter) -> Request {
        let mut payload = vec![Item::integer(MAXIMUM_ITEMS, MAX_LOCATED as i32)];
        payload.extend(filter.name.as_deref().map(name_attribute));
        let kind = |t: ObjectType| attribute("Object Type", Value::Enumeration(t.code()));
        payload.extend(filter.object_type.map(kind));
        payload.extend(filter.state.map(|s| attribute("State", Value::Enumeration(s.code()))));
        Request { operation: Operation::Locate, payload }
    }

    /// The attributes of [`Attributes`] (section 4.12).
    pub fn get_attributes(id: &str) -> Request {
        let mut request = Request::about(Operation::GetAttributes, id);
        let names = ["State", "Object Type", "Cryptographic Length", "Name"];
        request.payload.extend(names.map(|n| Item::text(ATTRIBUTE_NAME, n)));
        request
    }

    /// The key (section 4.11).
    pub fn get(id: &str) -> Request {
        Request::about(Operation::Get, id)
    }

    /// A new AES key, made by the server (section 4.1).
    pub fn create(new: &NewObject) -> Request {
        let kind = Item::enumeration(OBJECT_TYPE, ObjectType::SymmetricKey.code());
        Request { operation: Operation::Create, payload: vec![kind, new.template(true)] }
    }

    /// Hands a key to the server (section 4.3).
    pub fn register(new: &NewObject, object_type: ObjectType, key: &Secret) -> Request {
        let material = Item::new(KEY_MATERIAL, Value::Bytes(key.clone()));
        let symmetric = object_type == ObjectType::SymmetricKey;
        let format = if symmetric { FORMAT_RAW } else { FORMAT_OPAQUE };
        let mut block =
            vec![Item::enumeration(KEY_FORMAT_TYPE, format), Item::structure(KEY_VALUE, vec![material])];
        if symmetric {
            block.push(Item::enumeration(CRYPTOGRAPHIC_ALGORITHM, AES));
            block.push(Item::integer(CRYPTOGRAPHIC_LENGTH, new.length_bits));
        }
        let block = Item::structure(KEY_BLOCK, block);
        let object = if symmetric {
            Item::structure(SYMMETRIC_KEY, vec![block])
        } else {
            Item::structure(SECRET_DATA, vec![Item::enumeration(SECRET_DATA_TYPE, SECRET_DATA_SEED), block])
        };
        let kind = Item::enumeration(OBJECT_TYPE, object_type.code());
        Request { operation: Operation::Register, payload: vec![kind, new.template(symmetric), object] }
    }

    /// Makes an object active (section 4.19).
    pub fn activate(id: &str) -> Request {
        Request::about(Operation::Activate, id)
    }

    /// Deactivates an object, or calls it compromised as of `now` (seconds since 1970; section 4.20).
    pub fn revoke(id: &str, reason: RevocationReason, message: &str, now: i64) -> Request {
        let mut request = Request::about(Operation::Revoke, id);
        let mut why = vec![Item::enumeration(REVOCATION_REASON_CODE, reason.code())];
        if !message.is_empty() {
            why.push(Item::text(REVOCATION_MESSAGE, message));
        }
        request.payload.push(Item::structure(REVOCATION_REASON, why));
        if reason == RevocationReason::KeyCompromise {
            request.payload.push(Item::new(COMPROMISE_OCCURRENCE_DATE, Value::DateTime(now)));
        }
        request
    }

    /// Destroys an object (section 4.21).
    pub fn destroy(id: &str) -> Request {
        Request::about(Operation::Destroy, id)
    }

    /// The message's bytes.
    ///
    /// # Errors
    /// [`TtlvError::Limit`] when names make it too long.
    pub fn encode(&self, version: Version) -> Result<Zeroizing<Vec<u8>>, TtlvError> {
        let header = vec![
            version.item(),
            Item::integer(MAXIMUM_RESPONSE_SIZE, MAX_MESSAGE_BYTES as i32),
            Item::integer(BATCH_COUNT, 1),
        ];
        let batch = vec![
            Item::enumeration(OPERATION, self.operation.code()),
            Item::structure(REQUEST_PAYLOAD, self.payload.clone()),
        ];
        let message = vec![Item::structure(REQUEST_HEADER, header), Item::structure(BATCH_ITEM, batch)];
        Item::structure(REQUEST_MESSAGE, message).encode()
    }
}

/// The answer to one operation.
#[derive(Debug)]
pub struct Answer {
    payload: Vec<Item>,
}

fn find(items: &[Item], tag: Tag) -> Result<&Item, MessageError> {
    items.iter().find(|i| i.tag == tag).ok_or(MessageError::Missing(tag))
}

fn structure(item: &Item) -> Result<&[Item], MessageError> {
    match &item.value {
        Value::Structure(items) => Ok(items),
        _ => Err(MessageError::WrongType(item.tag)),
    }
}

fn integer(item: &Item) -> Result<i32, MessageError> {
    match item.value {
        Value::Integer(n) => Ok(n),
        _ => Err(MessageError::WrongType(item.tag)),
    }
}

fn enumeration(item: &Item) -> Result<u32, MessageError> {
    match item.value {
        Value::Enumeration(n) => Ok(n),
        _ => Err(MessageError::WrongType(item.tag)),
    }
}

fn text(item: &Item) -> Result<&str, MessageError> {
    match &item.value {
        Value::Text(t) if t.len() > MAX_TEXT_BYTES => {
            Err(MessageError::TooLong { tag: item.tag, limit: MAX_TEXT_BYTES })
        }
        Value::Text(t) => Ok(t),
        _ => Err(MessageError::WrongType(item.tag)),
    }
}

/// Parses the response to `operation`. `Ok(Err)` is the server's no.
///
/// # Errors
/// When it is no response to that operation.
pub fn parse_response(bytes: &[u8], operation: Operation) -> Result<Result<Answer, Refusal>, MessageError> {
    let message = Item::decode(bytes)?;
    if message.tag != RESPONSE_MESSAGE {
        return Err(MessageError::Missing(RESPONSE_MESSAGE));
    }
    let items = structure(&message)?;
    // The version in the header is the server's business: one that refuses ours answers with its own.
    Version::from_item(find(structure(find(items, RESPONSE_HEADER)?)?, PROTOCOL_VERSION)?)?;
    let batch: Vec<&Item> = items.iter().filter(|i| i.tag == BATCH_ITEM).collect();
    let [answer] = batch[..] else { return Err(MessageError::Batch(batch.len())) };
    let answer = structure(answer)?;
    let failed = match enumeration(find(answer, RESULT_STATUS)?)? {
        0 => false,
        1 => true,
        other => return Err(MessageError::Status(other)),
    };
    // A message that could not be parsed is refused without saying what it asked for.
    match find(answer, OPERATION) {
        Ok(named) if enumeration(named)? != operation.code() => {
            return Err(MessageError::OtherOperation(operation));
        }
        Err(missing) if !failed => return Err(missing),
        _ => {}
    }
    if failed {
        let reason = find(answer, RESULT_REASON).and_then(enumeration).unwrap_or(0x100);
        let said = find(answer, RESULT_MESSAGE).ok().map(|i| &i.value);
        let message = match said {
            Some(Value::Text(t)) => t.chars().take(200).flat_map(char::escape_default).collect(),
            _ => String::new(),
        };
        return Ok(Err(Refusal { reason: Reason(reason), message }));
    }
    let payload = match find(answer, RESPONSE_PAYLOAD) {
        Ok(p) => structure(p)?.to_vec(),
        Err(_) => Vec::new(),
    };
    Ok(Ok(Answer { payload }))
}

impl Answer {
    /// Discover Versions: the best version that both speak.
    ///
    /// # Errors
    /// When there is none.
    pub fn version(&self) -> Result<Version, MessageError> {
        let theirs = self.payload.iter().filter(|i| i.tag == PROTOCOL_VERSION).map(Version::from_item);
        let theirs = theirs.collect::<Result<Vec<_>, _>>()?;
        let best = Version::OURS.into_iter().find(|v| theirs.contains(v));
        best.ok_or(match theirs.first() {
            Some(v) => MessageError::Version(*v),
            None => MessageError::Missing(PROTOCOL_VERSION),
        })
    }

    /// Query: the operations, by number, and the maker's name.
    ///
    /// # Errors
    /// Items of wrong types.
    pub fn capabilities(&self) -> Result<(Vec<u32>, String), MessageError> {
        let operations = self.payload.iter().filter(|i| i.tag == OPERATION).map(enumeration);
        let vendor = find(&self.payload, VENDOR_IDENTIFICATION).ok().map(text).transpose()?;
        Ok((operations.collect::<Result<_, _>>()?, vendor.unwrap_or_default().to_owned()))
    }

    /// Create, Register, Activate, ...: the object's identifier.
    ///
    /// # Errors
    /// When there is none.
    pub fn id(&self) -> Result<String, MessageError> {
        text(find(&self.payload, UNIQUE_IDENTIFIER)?).map(str::to_owned)
    }

    /// Locate: the identifiers, at most [`MAX_LOCATED`].
    ///
    /// # Errors
    /// More than that, or items of wrong types.
    pub fn ids(&self) -> Result<Vec<String>, MessageError> {
        let found = self.payload.iter().filter(|i| i.tag == UNIQUE_IDENTIFIER);
        let ids = found.map(|i| text(i).map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
        if ids.len() > MAX_LOCATED {
            return Err(MessageError::TooLong { tag: UNIQUE_IDENTIFIER, limit: MAX_LOCATED });
        }
        Ok(ids)
    }

    /// Get Attributes.
    ///
    /// # Errors
    /// Items of wrong types.
    pub fn attributes(&self) -> Result<Attributes, MessageError> {
        let mut found = Attributes::default();
        for item in self.payload.iter().filter(|i| i.tag == ATTRIBUTE) {
            let fields = structure(item)?;
            // Attributes without a value exist (section 2.1.1).
            let Ok(value) = find(fields, ATTRIBUTE_VALUE) else { continue };
            match text(find(fields, ATTRIBUTE_NAME)?)? {
                "State" => {
                    let code = enumeration(value)?;
                    found.state = Some(State::from_code(code).ok_or(MessageError::WrongType(value.tag))?);
                }
                "Object Type" => found.object_type = ObjectType::from_code(enumeration(value)?),
                "Cryptographic Length" => found.length_bits = Some(integer(value)?),
                "Name" => found.names.push(text(find(structure(value)?, NAME_VALUE)?)?.to_owned()),
                _ => {}
            }
        }
        Ok(found)
    }

    /// Get: the key, of the object `id`.
    ///
    /// # Errors
    /// Another object, no key, or a key that is wrapped or in another form than bytes.
    pub fn key(&self, id: &str) -> Result<KeyObject, MessageError> {
        if self.id()? != id {
            return Err(MessageError::KeyForm("another identifier than the one asked for"));
        }
        let code = enumeration(find(&self.payload, OBJECT_TYPE)?)?;
        let object_type = ObjectType::from_code(code)
            .ok_or(MessageError::KeyForm("an object type that holds no such key"))?;
        let tag = match object_type {
            ObjectType::SymmetricKey => SYMMETRIC_KEY,
            ObjectType::SecretData => SECRET_DATA,
        };
        let block = structure(find(structure(find(&self.payload, tag)?)?, KEY_BLOCK)?)?;
        if find(block, KEY_WRAPPING_DATA).is_ok() {
            return Err(MessageError::KeyForm("a wrap around it"));
        }
        let material = find(structure(find(block, KEY_VALUE)?)?, KEY_MATERIAL)?;
        let key = match (enumeration(find(block, KEY_FORMAT_TYPE)?)?, &material.value) {
            (FORMAT_RAW | FORMAT_OPAQUE, Value::Bytes(key)) => key,
            (FORMAT_TRANSPARENT_SYMMETRIC, Value::Structure(fields)) => match &find(fields, KEY)?.value {
                Value::Bytes(key) => key,
                _ => return Err(MessageError::WrongType(KEY)),
            },
            (FORMAT_RAW | FORMAT_OPAQUE | FORMAT_TRANSPARENT_SYMMETRIC, _) => {
                return Err(MessageError::WrongType(KEY_MATERIAL));
            }
            _ => return Err(MessageError::KeyForm("a key format for other kinds of keys")),
        };
        if key.is_empty() {
            return Err(MessageError::KeyForm("no bytes"));
        }
        Ok(KeyObject { object_type, key: key.clone() })
    }
}

/// Parses any bytes as any answer: what a fuzzer calls. True when one of them was understood.
pub fn understand(bytes: &[u8]) -> bool {
    use Operation as O;
    let all = [O::DiscoverVersions, O::Query, O::Locate, O::Get, O::GetAttributes, O::Create];
    let mut understood = false;
    for operation in all {
        if let Ok(Ok(answer)) = parse_response(bytes, operation) {
            understood |= answer.version().is_ok()
                | answer.capabilities().is_ok()
                | answer.ids().is_ok()
                | answer.attributes().is_ok()
                | answer.id().is_ok_and(|id| answer.key(&id).is_ok());
        }
    }
    understood
}

/// Responses as servers send them, for tests.
#[doc(hidden)]
pub mod testing {
    use super::*;

    /// A response with this payload.
    pub fn success(operation: Operation, payload: Vec<Item>) -> Vec<u8> {
        let batch = vec![
            Item::enumeration(OPERATION, operation.code()),
            Item::enumeration(RESULT_STATUS, 0),
            Item::structure(RESPONSE_PAYLOAD, payload),
        ];
        response(batch)
    }

    /// A refusal.
    pub fn failure(operation: Option<Operation>, reason: Reason, message: &str) -> Vec<u8> {
        let mut batch: Vec<Item> =
            operation.map(|o| Item::enumeration(OPERATION, o.code())).into_iter().collect();
        batch.push(Item::enumeration(RESULT_STATUS, 1));
        batch.push(Item::enumeration(RESULT_REASON, reason.0));
        batch.push(Item::text(RESULT_MESSAGE, message));
        response(batch)
    }

    /// Payload of Discover Versions.
    pub fn versions(versions: &[Version]) -> Vec<Item> {
        versions.iter().map(|v| v.item()).collect()
    }

    /// Payload of Get Attributes with a state.
    pub fn state(id: &str, state: State) -> Vec<Item> {
        vec![
            Item::text(UNIQUE_IDENTIFIER, id),
            attribute("State", Value::Enumeration(state.code())),
            attribute("x-unknown", Value::Interval(5)),
        ]
    }

    /// Payload of Get with a raw key.
    pub fn key(id: &str, key: &[u8]) -> Vec<Item> {
        key_in(id, FORMAT_RAW, Value::Bytes(Secret::new(key.to_vec())), false)
    }

    /// Payload of Get with a key in any form.
    pub fn key_in(id: &str, format: u32, material: Value, wrapped: bool) -> Vec<Item> {
        let mut block = vec![
            Item::enumeration(KEY_FORMAT_TYPE, format),
            Item::structure(KEY_VALUE, vec![Item::new(KEY_MATERIAL, material)]),
        ];
        if wrapped {
            block.push(Item::structure(KEY_WRAPPING_DATA, Vec::new()));
        }
        vec![
            Item::enumeration(OBJECT_TYPE, ObjectType::SymmetricKey.code()),
            Item::text(UNIQUE_IDENTIFIER, id),
            Item::structure(SYMMETRIC_KEY, vec![Item::structure(KEY_BLOCK, block)]),
        ]
    }

    /// The version and the operation of a request.
    pub fn request(bytes: &[u8]) -> Option<(Version, Operation)> {
        let message = Item::decode(bytes).ok()?;
        let items = structure(&message).ok()?;
        let header = structure(find(items, REQUEST_HEADER).ok()?).ok()?;
        let version = Version::from_item(find(header, PROTOCOL_VERSION).ok()?).ok()?;
        let batch = structure(find(items, BATCH_ITEM).ok()?).ok()?;
        let code = enumeration(find(batch, OPERATION).ok()?).ok()?;
        Some((version, Operation::from_code(code)?))
    }

    fn response(batch: Vec<Item>) -> Vec<u8> {
        let header = vec![Version::OURS[0].item(), Item::integer(BATCH_COUNT, 1)];
        let message = vec![Item::structure(RESPONSE_HEADER, header), Item::structure(BATCH_ITEM, batch)];
        Item::structure(RESPONSE_MESSAGE, message).encode().expect("a small message").to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(bytes: &[u8], operation: Operation) -> Answer {
        parse_response(bytes, operation).unwrap().unwrap()
    }

    #[test]
    fn keys_are_taken_as_bytes_only() {
        let raw = answer(&testing::success(Operation::Get, testing::key("7", &[9; 32])), Operation::Get);
        assert_eq!(raw.key("7").unwrap().key.expose(), [9; 32]);
        assert!(matches!(raw.key("8"), Err(MessageError::KeyForm(_))), "the key of another object");
        let bytes = || Value::Bytes(Secret::new(vec![1; 16]));
        let transparent = Value::Structure(vec![Item::new(KEY, bytes())]);
        for (format, material, wrapped, good) in [
            (2, bytes(), false, true),
            (7, transparent.clone(), false, true),
            (1, bytes(), true, false),
            (1, transparent, false, false),
            (7, bytes(), false, false),
            (3, bytes(), false, false),
            (1, Value::Bytes(Secret::new(Vec::new())), false, false),
            (1, Value::Text("key".into()), false, false),
        ] {
            let message = testing::success(Operation::Get, testing::key_in("7", format, material, wrapped));
            assert_eq!(
                answer(&message, Operation::Get).key("7").is_ok(),
                good,
                "format {format} wrapped {wrapped}"
            );
        }
    }

    #[test]
    fn refusals_and_strange_answers() {
        let no = testing::failure(None, Reason::INVALID_MESSAGE, "bad\n\u{1b}[31m version");
        let refusal = parse_response(&no, Operation::Get).unwrap().unwrap_err();
        assert_eq!(refusal.to_string(), "invalid message (bad\\n\\u{1b}[31m version)");
        let long = testing::failure(Some(Operation::Get), Reason::ITEM_NOT_FOUND, &"x".repeat(5000));
        assert_eq!(parse_response(&long, Operation::Get).unwrap().unwrap_err().message.len(), 200);
        let other = testing::success(Operation::Locate, Vec::new());
        assert_eq!(
            parse_response(&other, Operation::Get).unwrap_err(),
            MessageError::OtherOperation(Operation::Get)
        );
        let request = Request::get("1").encode(Version::OURS[0]).unwrap();
        assert_eq!(
            parse_response(&request, Operation::Get).unwrap_err(),
            MessageError::Missing(RESPONSE_MESSAGE)
        );
    }

    #[test]
    fn the_best_common_version() {
        let v = |minor| Version { major: 1, minor };
        let best = |theirs: &[Version]| {
            let bytes = testing::success(Operation::DiscoverVersions, testing::versions(theirs));
            answer(&bytes, Operation::DiscoverVersions).version()
        };
        assert_eq!(best(&[v(2), v(3)]), Ok(v(3)));
        assert_eq!(best(&[Version { major: 2, minor: 0 }, v(4), v(2)]), Ok(v(4)));
        assert_eq!(best(&[v(1), v(0)]), Err(MessageError::Version(v(1))));
        assert!(best(&[]).is_err());
    }

    #[test]
    fn states() {
        let bytes = testing::success(Operation::GetAttributes, testing::state("1", State::Compromised));
        let found = answer(&bytes, Operation::GetAttributes).attributes().unwrap();
        assert_eq!(found.state, Some(State::Compromised));
        let odd = vec![attribute("State", Value::Enumeration(77))];
        let bytes = testing::success(Operation::GetAttributes, odd);
        assert!(
            answer(&bytes, Operation::GetAttributes).attributes().is_err(),
            "an unknown state is not ignored"
        );
    }

    proptest! {
        #[test]
        fn damaged_answers_do_not_panic(flips in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
            let mut bytes = testing::success(Operation::Get, testing::key("7", &[9; 32]));
            for (at, bits) in flips {
                let at = usize::from(at) % bytes.len();
                bytes[at] ^= bits;
            }
            understand(&bytes);
        }
    }
}
