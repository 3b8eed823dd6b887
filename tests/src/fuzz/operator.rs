//! The operator beside the storm: asks for everything, and takes a namespace of the fuzzed subsystem away and back.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::host::PATIENCE;
use crate::kill::Program;

struct Socket {
    stream: UnixStream,
    calls: u64,
    slowest: Duration,
}

impl Socket {
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, String> {
        let start = Instant::now();
        self.calls += 1;
        let request = json!({"jsonrpc": "2.0", "id": self.calls, "method": method, "params": params});
        self.stream.write_all(request.to_string().as_bytes()).map_err(|e| format!("{method}: {e}"))?;
        let (mut reply, mut piece) = (Vec::new(), [0; 65_536]);
        loop {
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(format!("{method}: the target closed its socket")),
                Ok(n) => reply.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("{method}: {e}")),
            }
            if let Ok(v) = serde_json::from_slice::<Value>(&reply) {
                self.slowest = self.slowest.max(start.elapsed());
                return match v["error"].is_null() && v["id"] == self.calls {
                    true => Ok(v["result"].clone()),
                    false => Err(format!("{method}: {v}")),
                };
            }
        }
    }
}

/// Works until told to stop. How many calls were answered, and the slowest answer.
pub fn run(program: &Program, nqn: &str, stop: &AtomicBool) -> Result<(u64, Duration), String> {
    let stream = UnixStream::connect(program.socket()).map_err(|e| format!("the RPC socket: {e}"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
    let mut socket = Socket { stream, calls: 0, slowest: Duration::ZERO };
    let questions = [
        ("nvmf_get_subsystems", json!({})),
        ("nvmf_subsystem_get_controllers", json!({"nqn": nqn})),
        ("nvmf_subsystem_get_qpairs", json!({"nqn": nqn})),
        ("nvmf_get_stats", json!({})),
        ("bdev_get_iostat", json!({})),
        ("framework_get_reactors", json!({})),
        ("thread_get_io_channels", json!({})),
    ];
    for round in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (method, params) = &questions[round as usize % questions.len()];
        // Methods without parameters take none at all.
        let params = if params.as_object().is_some_and(|p| p.is_empty()) { &Value::Null } else { params };
        socket.call(method, params)?;
        if round % 40 == 39 {
            socket.call("nvmf_subsystem_remove_ns", &json!({"nqn": nqn, "nsid": 2}))?;
            std::thread::sleep(Duration::from_millis(2));
            let namespace = json!({"nsid": 2, "bdev_name": "ram2"});
            socket.call("nvmf_subsystem_add_ns", &json!({"nqn": nqn, "namespace": namespace}))?;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((socket.calls, socket.slowest))
}
