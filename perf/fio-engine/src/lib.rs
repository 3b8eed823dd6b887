//! An I/O engine for fio over this project's NVMe/TCP initiator: `ioengine=external:libcryptfold_fio.so`.
//!
//! ```text
//!   fio's job thread --> shim.c (fio's headers) --> ffi --> engine: a reactor that this thread runs --> initiator --> socket
//! ```
//!
//! Nothing runs beside fio's thread: submitting queues a command, fio's asking for completions runs the reactor's turns. `ffi` is
//! the only Rust module with `unsafe` code; `shim.c` is compiled where `FIO_SRC` names fio's source, see perf/README.md.

pub mod engine;
mod ffi;
