//! Socket options that the standard library does not have. With [`crate::watch`] the only place of `unsafe` code.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Idle time before the first keep-alive probe, s.
const KEEPALIVE_IDLE_S: i32 = 30;
/// Time between probes, s.
const KEEPALIVE_INTERVAL_S: i32 = 10;
/// Probes without an answer that end a connection.
const KEEPALIVE_PROBES: i32 = 3;

fn set(socket: &TcpStream, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: `value` lives through the call and the length is its own; the descriptor is that of a live socket.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Prepares an accepted socket: non-blocking, no delay, probes for dead peers. Zero leaves a value as the system has it.
///
/// # Errors
/// The first option that is refused.
pub(crate) fn prepare(socket: &TcpStream, priority: u32, user_timeout_ms: u32) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_S)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
    if user_timeout_ms != 0 {
        let ms = i32::try_from(user_timeout_ms).unwrap_or(i32::MAX);
        set(socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, ms)?;
    }
    if priority != 0 {
        set(socket, libc::SOL_SOCKET, libc::SO_PRIORITY, i32::try_from(priority).unwrap_or(i32::MAX))?;
    }
    Ok(())
}
