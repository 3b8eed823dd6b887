//! What lies between s2n-tls and the stream: two buffers of records. The only place of `unsafe` code of this crate.
//!
//! s2n-tls calls [`receive`] and [`send`] from within calls of ours, on the same thread, with the address of the pipe. The
//! pipe lives in a cell on the heap that its session owns longer than its connection; each side borrows it only while it
//! moves bytes, and a second borrow is refused.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};

use s2n_tls::connection::Connection;
use s2n_tls::error::Error;

/// Records that wait.
#[derive(Default)]
pub(super) struct Pipe {
    incoming: Vec<u8>,
    /// Where the bytes in `incoming` start and end that s2n-tls has not taken.
    start: usize,
    end: usize,
    /// The stream has ended.
    pub ended: bool,
    /// Bytes that s2n-tls asked for last, and did not get.
    pub wanted: usize,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that the stream has taken.
    sent: usize,
}

impl Pipe {
    /// Bytes received that s2n-tls has not taken.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// Whether the first byte that s2n-tls has not taken is one of these.
    pub fn begins_with(&self, bytes: &[u8]) -> bool {
        self.buffered() > 0 && bytes.contains(&self.incoming[self.start])
    }

    /// Room for `n` more bytes, to be followed by [`Pipe::filled`].
    pub fn room(&mut self, n: usize) -> &mut [u8] {
        if self.buffered() == 0 && self.incoming.len() > 2 * n {
            // It was busier once.
            self.incoming = vec![0; n];
            (self.start, self.end) = (0, 0);
        }
        if self.start > 0 {
            self.incoming.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.incoming.len() < self.end + n {
            self.incoming.resize(self.end + n, 0);
        }
        &mut self.incoming[self.end..self.end + n]
    }

    /// So many bytes of the room are records now.
    pub fn filled(&mut self, n: usize) {
        self.end = (self.end + n).min(self.incoming.len());
    }

    /// Bytes that the stream has to take.
    pub fn unsent(&self) -> &[u8] {
        &self.outgoing[self.sent..]
    }

    /// The stream has taken so many.
    pub fn sent(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.outgoing.len());
        if self.sent == self.outgoing.len() {
            self.outgoing.clear();
            self.sent = 0;
        }
    }
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: the address of this thread's errno is always valid.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// s2n-tls wants `len` bytes.
unsafe extern "C" fn receive(context: *mut c_void, buf: *mut u8, len: u32) -> c_int {
    // SAFETY: the context is the pipe that `attach` was given; it is alive as long as the connection that calls this.
    let pipe = unsafe { &*context.cast::<RefCell<Pipe>>() };
    let Ok(mut pipe) = pipe.try_borrow_mut() else { return fail(libc::EIO) };
    let n = pipe.buffered().min(len as usize);
    if n == 0 && pipe.ended {
        return 0;
    }
    if n == 0 {
        pipe.wanted = len as usize;
        return fail(libc::EAGAIN);
    }
    let bytes = &pipe.incoming[pipe.start..pipe.start + n];
    // SAFETY: s2n-tls gives room for `len` bytes, n is not more, and the room is not part of our buffer.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buf, n) };
    pipe.start += n;
    n as c_int
}

/// s2n-tls has `len` bytes to send.
unsafe extern "C" fn send(context: *mut c_void, buf: *const u8, len: u32) -> c_int {
    // SAFETY: as in `receive`.
    let pipe = unsafe { &*context.cast::<RefCell<Pipe>>() };
    let Ok(mut pipe) = pipe.try_borrow_mut() else { return fail(libc::EIO) };
    // A record is far shorter; that the count fits is what matters.
    let len = len.min(i32::MAX as u32);
    // SAFETY: s2n-tls names `len` initialised bytes of its own.
    pipe.outgoing.extend_from_slice(unsafe { std::slice::from_raw_parts(buf, len as usize) });
    len as c_int
}

/// Has a connection use a pipe. The pipe has to outlive the connection and stay where it is.
///
/// # Errors
/// s2n-tls refuses.
pub(super) fn attach(connection: &mut Connection, pipe: &RefCell<Pipe>) -> Result<(), Error> {
    let context = std::ptr::from_ref(pipe).cast_mut().cast::<c_void>();
    connection.set_receive_callback(Some(receive))?;
    connection.set_send_callback(Some(send))?;
    // SAFETY: the callbacks take the context for what it is. They run only within calls on the connection, during which
    // the session (its caller) holds the pipe.
    unsafe {
        connection.set_receive_context(context)?;
        connection.set_send_context(context)?;
    }
    Ok(())
}
