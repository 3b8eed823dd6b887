//! Who is at the other end of a Unix socket. The only `unsafe` of this crate: std's way is not stable, and rustix's type has no
//! room for process 0, which is what a process of another PID namespace looks like.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use crate::access::Peer;

/// The other end, as the kernel knows it from its connect (SO_PEERCRED, unix(7)).
pub fn credentials(stream: &UnixStream) -> io::Result<Peer> {
    let mut c = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are to live variables, `len` says how large the first one is, and any bytes are a ucred.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut c).cast(),
            &raw mut len,
        )
    };
    match result {
        0 if len as usize == size_of::<libc::ucred>() => Ok(Peer { pid: c.pid, uid: c.uid, gid: c.gid }),
        0 => Err(io::Error::other("the kernel knows no credentials")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The user that this process acts as.
pub fn own_uid() -> u32 {
    // SAFETY: takes nothing, touches no memory, can not fail.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_at_both_ends() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = credentials(&a).unwrap();
        assert_eq!((peer.uid, peer.pid), (own_uid(), std::process::id() as i32));
    }
}
