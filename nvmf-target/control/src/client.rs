//! A small client of the socket, for the program's own commands.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use crate::jsonrpc::{Framer, RpcError};

/// Replies may be long (statistics of many devices).
const MAX_REPLY_BYTES: usize = 256 << 20;

/// What can go wrong with a call.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody there.
    #[error(
        "no target answers on {path}: {error}; start one with `cryptfold target`, or name its socket with -r"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        error: std::io::Error,
    },
    /// The connection broke.
    #[error("the target closed the connection before it answered {method}: {what}")]
    Broken {
        /// The method called.
        method: String,
        /// What happened.
        what: String,
    },
    /// The target refused.
    #[error("{method}: {error}")]
    Rpc {
        /// The method called.
        method: String,
        /// Its answer.
        error: RpcError,
    },
}

/// A connection.
pub struct Client {
    stream: UnixStream,
    framer: Framer,
    next_id: u64,
}

impl Client {
    /// Connects; a call waits at most `limit` for its reply.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: &Path, limit: Duration) -> Result<Client, ClientError> {
        let stream = UnixStream::connect(path)
            .and_then(|s| s.set_read_timeout(Some(limit)).map(|()| s))
            .map_err(|error| ClientError::Connect { path: path.into(), error })?;
        Ok(Client { stream, framer: Framer::new(MAX_REPLY_BYTES), next_id: 1 })
    }

    /// Calls a method.
    ///
    /// # Errors
    /// The target's error, or a broken connection.
    pub fn call(&mut self, method: &str, params: Option<Value>) -> Result<Value, ClientError> {
        let broken = |what: String| ClientError::Broken { method: method.into(), what };
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": id, "method": method});
        if let Some(p) = params {
            request["params"] = p;
        }
        // Who is turned away finds the reason on the socket, even if it was closed before the call was written.
        let sent = self.stream.write_all(request.to_string().as_bytes());
        let lost = |what: String| broken(sent.as_ref().map_or_else(ToString::to_string, |()| what));
        let mut piece = vec![0; 64 << 10];
        let mut reply = loop {
            if let Some(v) = self.framer.next_message().map_err(|e| broken(e.to_string()))? {
                break v;
            }
            match self.stream.read(&mut piece).map_err(|e| lost(e.to_string()))? {
                0 => return Err(lost("end of stream".into())),
                n => self.framer.push(&piece[..n]),
            }
        };
        if let Some(e) = reply.get("error") {
            let error = RpcError::new(
                e["code"].as_i64().unwrap_or(RpcError::INTERNAL),
                e["message"].as_str().unwrap_or("error without a message"),
            );
            return Err(ClientError::Rpc { method: method.into(), error });
        }
        Ok(reply["result"].take())
    }
}
