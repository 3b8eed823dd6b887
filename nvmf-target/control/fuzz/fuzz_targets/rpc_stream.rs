//! Any bytes on the RPC socket: no panic, the same messages however the stream is cut, agreement with the JSON parser,
//! and parameters of every method decoded. Methods do not run: some of them write files.
//!
//! The first byte is the size of the pieces.
#![no_main]

use std::sync::{Arc, LazyLock};

use cryptfold_control::jsonrpc::{FrameError, Framer, Handler, RpcResult, answer};
use cryptfold_control::{Control, ControlConfig};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

struct Dry(Arc<Control>);

impl Handler for Dry {
    fn call(&self, method: &str, params: Option<&Value>) -> RpcResult {
        self.0.table().find(method)?.check(params)?;
        Ok(Value::Null)
    }
}

static DRY: LazyLock<Dry> = LazyLock::new(|| Dry(Control::new(ControlConfig::default())));

fn cut(bytes: &[u8], piece: usize) -> (Vec<Value>, Option<FrameError>) {
    let mut framer = Framer::new(1 << 16);
    let mut all = Vec::new();
    for part in bytes.chunks(piece) {
        framer.push(part);
        loop {
            match framer.next_message() {
                Ok(Some(v)) => all.push(v),
                Ok(None) => break,
                Err(e) => return (all, Some(e)),
            }
        }
    }
    (all, None)
}

fuzz_target!(|input: &[u8]| {
    let Some((piece, bytes)) = input.split_first() else { return };
    let (whole, error) = cut(bytes, bytes.len().max(1));
    assert_eq!((&whole, &error), (&cut(bytes, usize::from(*piece).max(1)).0, &cut(bytes, 1).1));
    for message in &whole {
        if let Some(reply) = answer(&*DRY, message) {
            let text = reply.to_string();
            assert!(serde_json::from_str::<Value>(&text).is_ok());
        }
    }
    // Whatever the parser takes as the first value, the framer must take too (it is stricter in depth only).
    let mut oracle = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    if let Some(Ok(first)) = oracle.next()
        && (first.is_array() || first.is_object())
        && whole.is_empty()
    {
        assert!(error.is_some_and(|e| e.to_string().contains("deeply")));
    }
});
