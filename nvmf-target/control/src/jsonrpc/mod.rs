//! JSON-RPC 2.0 without I/O: bytes in, replies out. <https://www.jsonrpc.org/specification>, with what SPDK's server
//! does where clients rely on it: requests may follow each other without separators, `jsonrpc` may be missing, a null
//! or missing id asks for no reply.

mod scan;

use std::fmt;

use serde_json::{Map, Value, json};
use zeroize::Zeroize as _;

pub use scan::{FrameError, Framer, MAX_DEPTH};

/// Result of a method.
pub type RpcResult = Result<Value, RpcError>;

/// An error reply: JSON-RPC's codes, or a negative errno as SPDK's methods give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RpcError {
    /// -32700..-32600, or a negative errno.
    pub code: i64,
    /// One line for people; clients match on parts of it.
    pub message: String,
}

impl RpcError {
    /// The JSON could not be parsed.
    pub const PARSE: i64 = -32700;
    /// Not a request.
    pub const INVALID_REQUEST: i64 = -32600;
    /// No such method.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// Bad, missing or unknown parameter.
    pub const INVALID_PARAMS: i64 = -32602;
    /// Anything else.
    pub const INTERNAL: i64 = -32603;
    /// The method can not be called in this state.
    pub const INVALID_STATE: i64 = -1;
    /// The caller may not do that.
    pub const EPERM: i64 = -1;
    /// No such file.
    pub const ENOENT: i64 = -2;
    /// The key that is needed is not at hand.
    pub const ENOKEY: i64 = -126;
    /// Busy.
    pub const EBUSY: i64 = -16;
    /// Exists already.
    pub const EEXIST: i64 = -17;
    /// No such device.
    pub const ENODEV: i64 = -19;
    /// No space.
    pub const ENOSPC: i64 = -28;

    /// An error with any code.
    pub fn new(code: i64, message: impl Into<String>) -> RpcError {
        RpcError { code, message: message.into() }
    }
    /// -32602, with the words that clients look for.
    pub fn params(what: impl fmt::Display) -> RpcError {
        RpcError::new(RpcError::INVALID_PARAMS, format!("Invalid parameters: {what}"))
    }
    /// -32603.
    pub fn internal(what: impl Into<String>) -> RpcError {
        RpcError::new(RpcError::INTERNAL, what)
    }
    /// -19 for a name that leads to no device.
    pub fn no_device(name: &str) -> RpcError {
        RpcError::new(RpcError::ENODEV, format!("\"{name}\": No such device"))
    }
    /// -17 for a name that is taken.
    pub fn exists(what: impl fmt::Display) -> RpcError {
        RpcError::new(RpcError::EEXIST, format!("{what}: File exists"))
    }
    /// -2 for a thing that is not there.
    pub fn not_found(what: impl fmt::Display) -> RpcError {
        RpcError::new(RpcError::ENOENT, format!("{what}: No such file or directory"))
    }
    /// -16.
    pub fn busy(what: impl fmt::Display) -> RpcError {
        RpcError::new(RpcError::EBUSY, format!("{what}: Device or resource busy"))
    }

    fn json(&self) -> Value {
        json!({"code": self.code, "message": self.message})
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for RpcError {}

/// Whoever knows the methods.
pub trait Handler: Send + Sync + 'static {
    /// Calls one. `params` is `None` when they were missing or null.
    ///
    /// # Errors
    /// What the caller is told.
    fn call(&self, method: &str, params: Option<&Value>) -> RpcResult;
}

/// Calls in a batch: all replies are kept until the last one is there.
pub const MAX_BATCH: usize = 1024;

/// Answers one message (a request or a batch); `None` when nobody wants a reply.
pub fn answer(handler: &dyn Handler, message: &Value) -> Option<Value> {
    let Value::Array(batch) = message else { return answer_one(handler, message) };
    if batch.is_empty() {
        return Some(reply(
            Value::Null,
            Err(RpcError::new(RpcError::INVALID_REQUEST, "Invalid request: empty batch")),
        ));
    }
    if batch.len() > MAX_BATCH {
        let why = format!("Invalid request: a batch of {}, at most {MAX_BATCH} calls", batch.len());
        return Some(reply(Value::Null, Err(RpcError::new(RpcError::INVALID_REQUEST, why))));
    }
    let replies: Vec<Value> = batch.iter().filter_map(|r| answer_one(handler, r)).collect();
    (!replies.is_empty()).then_some(Value::Array(replies))
}

/// Zeroes the texts in a message that has been answered: passwords and keys are among them.
pub fn wipe(message: &mut Value) {
    match message {
        Value::String(text) => text.zeroize(),
        Value::Array(all) => all.iter_mut().for_each(wipe),
        Value::Object(all) => all.values_mut().for_each(wipe),
        _ => {}
    }
}

/// The reply to bytes that are not JSON, sent before the connection is closed.
pub fn malformed(e: &FrameError) -> Value {
    let code = match e {
        FrameError::Malformed { .. } => RpcError::PARSE,
        FrameError::TooLarge { .. } => RpcError::INVALID_REQUEST,
    };
    refusal(RpcError::new(code, e.to_string()))
}

/// An error that answers no request in particular.
pub fn refusal(e: RpcError) -> Value {
    reply(Value::Null, Err(e))
}

fn reply(id: Value, result: RpcResult) -> Value {
    match result {
        Ok(v) => json!({"jsonrpc": "2.0", "id": id, "result": v}),
        Err(e) => json!({"jsonrpc": "2.0", "id": id, "error": e.json()}),
    }
}

fn answer_one(handler: &dyn Handler, request: &Value) -> Option<Value> {
    match parse(request) {
        Ok(r) => {
            let result = guarded(handler, r.method, r.params);
            r.id.map(|id| reply(id.clone(), result))
        }
        Err((id, what)) => {
            let e = RpcError::new(RpcError::INVALID_REQUEST, format!("Invalid request: {what}"));
            Some(reply(id, Err(e)))
        }
    }
}

struct Request<'a> {
    id: Option<&'a Value>,
    method: &'a str,
    params: Option<&'a Value>,
}

/// The error carries the id to answer to, null when there is none.
fn parse(v: &Value) -> Result<Request<'_>, (Value, String)> {
    let Value::Object(o) = v else { return Err((Value::Null, "a request must be an object".into())) };
    let id = match o.get("id") {
        None | Some(Value::Null) => None,
        Some(id @ (Value::Number(_) | Value::String(_))) => Some(id),
        Some(_) => return Err((Value::Null, "\"id\" must be a number or a string".into())),
    };
    parse_members(o, id).map_err(|what| (id.cloned().unwrap_or(Value::Null), what))
}

fn parse_members<'a>(o: &'a Map<String, Value>, id: Option<&'a Value>) -> Result<Request<'a>, String> {
    if let Some(extra) = o.keys().find(|k| !matches!(k.as_str(), "jsonrpc" | "id" | "method" | "params")) {
        return Err(format!("unknown member \"{extra}\"; a request has jsonrpc, id, method and params"));
    }
    match o.get("jsonrpc") {
        None => {}
        Some(Value::String(v)) if v == "2.0" => {}
        Some(other) => return Err(format!("\"jsonrpc\" is {other}; this server speaks \"2.0\"")),
    }
    let method = match o.get("method") {
        Some(Value::String(m)) => m,
        Some(_) => return Err("\"method\" must be a string".into()),
        None => return Err("\"method\" is missing".into()),
    };
    let params = match o.get("params") {
        None | Some(Value::Null) => None,
        Some(p @ (Value::Object(_) | Value::Array(_))) => Some(p),
        Some(_) => return Err("\"params\" must be an object".into()),
    };
    Ok(Request { id, method, params })
}

/// A panic in a handler is a bug of ours; it must not take the server down.
fn guarded(handler: &dyn Handler, method: &str, params: Option<&Value>) -> RpcResult {
    let call = std::panic::AssertUnwindSafe(|| handler.call(method, params));
    std::panic::catch_unwind(call).unwrap_or_else(|_| {
        tracing::error!(method, "handler panicked");
        Err(RpcError::internal(format!("Internal error in {method}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Handler for Echo {
        fn call(&self, method: &str, params: Option<&Value>) -> RpcResult {
            match method {
                "echo" => Ok(params.cloned().unwrap_or(Value::Null)),
                "panic" => panic!("on purpose"),
                _ => Err(RpcError::new(RpcError::METHOD_NOT_FOUND, "Method not found")),
            }
        }
    }

    fn code(v: &Value) -> i64 {
        answer(&Echo, v).unwrap()["error"]["code"].as_i64().unwrap()
    }

    #[test]
    fn ids_come_back_as_they_were() {
        for id in [json!(1), json!("a-b"), json!(-3), json!(1.5), json!("")] {
            let r = answer(&Echo, &json!({"id": id, "method": "echo"})).unwrap();
            assert_eq!(r, json!({"jsonrpc": "2.0", "id": id, "result": null}));
        }
        assert_eq!(answer(&Echo, &json!({"method": "echo"})), None);
        assert_eq!(
            answer(&Echo, &json!({"id": null, "method": "nothing"})),
            None,
            "no reply to errors either"
        );
    }

    #[test]
    fn versions() {
        assert!(answer(&Echo, &json!({"id": 1, "method": "echo"})).unwrap().get("result").is_some());
        assert_eq!(code(&json!({"jsonrpc": "1.0", "id": 1, "method": "echo"})), -32600);
        assert_eq!(code(&json!({"jsonrpc": 2.0, "id": 1, "method": "echo"})), -32600);
    }

    #[test]
    fn not_requests() {
        for r in [
            json!({"id": 1}),
            json!({"id": 1, "method": 5}),
            json!({"id": {}, "method": "echo"}),
            json!({"id": 1, "method": "echo", "params": 5}),
            json!({"id": 1, "method": "echo", "extra": 1}),
            json!([]),
        ] {
            assert_eq!(code(&r), -32600, "{r}");
        }
        assert_eq!(code(&json!({"id": 1, "method": "nothing"})), -32601);
    }

    #[test]
    fn batches() {
        let batch = json!([
            {"id": 1, "method": "echo", "params": {"a": 1}},
            {"method": "echo"},
            7,
            {"id": "x", "method": "nothing"}
        ]);
        let r = answer(&Echo, &batch).unwrap();
        let r = r.as_array().unwrap();
        assert_eq!(r.len(), 3, "no reply to a notification");
        assert_eq!(r[0]["result"], json!({"a": 1}));
        assert_eq!((r[1]["id"].clone(), r[1]["error"]["code"].clone()), (Value::Null, json!(-32600)));
        assert_eq!((r[2]["id"].clone(), r[2]["error"]["code"].clone()), (json!("x"), json!(-32601)));
        assert_eq!(answer(&Echo, &json!([{"method": "echo"}])), None);
    }

    #[test]
    fn a_panic_is_an_internal_error() {
        assert_eq!(code(&json!({"id": 1, "method": "panic"})), -32603);
    }
}
