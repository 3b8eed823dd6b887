//! The kernel's record layer on a TCP socket (Linux: Documentation/networking/tls.rst). With `session::pipe` the only place of
//! `unsafe` code of this crate.

use std::io;
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_void};
use zeroize::Zeroizing;

use crate::session::{Direction, Offload, RecordKeys};

/// Room for one control message with a record type, aligned as its header.
type Cmsg = [u64; 4];

const _: () = {
    // `crypto_info` writes these by hand, so that nothing of them stays on the stack.
    assert!(size_of::<libc::tls12_crypto_info_aes_gcm_128>() == 40);
    assert!(size_of::<libc::tls12_crypto_info_aes_gcm_256>() == 56);
    // CMSG_SPACE(1).
    assert!(size_of::<Cmsg>() >= size_of::<libc::cmsghdr>() + 8);
};

/// `struct tls12_crypto_info_aes_gcm_*`: version, cipher, IV (its last 8 bytes), key, salt (the first 4 of the IV), sequence.
fn crypto_info(keys: &RecordKeys) -> io::Result<Zeroizing<Vec<u8>>> {
    let cipher = match keys.key.len() {
        libc::TLS_CIPHER_AES_GCM_128_KEY_SIZE => libc::TLS_CIPHER_AES_GCM_128,
        libc::TLS_CIPHER_AES_GCM_256_KEY_SIZE => libc::TLS_CIPHER_AES_GCM_256,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    let (salt, iv) = keys.iv.split_at(libc::TLS_CIPHER_AES_GCM_128_SALT_SIZE);
    // Large enough from the start: growing would leave a copy behind.
    let mut info = Zeroizing::new(Vec::with_capacity(size_of::<libc::tls12_crypto_info_aes_gcm_256>()));
    info.extend(libc::TLS_1_3_VERSION.to_ne_bytes());
    info.extend(cipher.to_ne_bytes());
    for part in [iv, &keys.key, salt, &keys.sequence.to_be_bytes()] {
        info.extend_from_slice(part);
    }
    Ok(info)
}

fn set(socket: &TcpStream, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: `value` lives through the call and the length is its own; the descriptor is that of a live socket.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the kernel lists the module.
fn listed() -> bool {
    match std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp") {
        Ok(list) => list.split_whitespace().any(|name| name == "tls"),
        Err(_) => true,
    }
}

/// Has the kernel load its `tls` module, if it is not there. The first call may take as long as a program that looks for the module: not
/// for reactors. Without it no stream is left to the kernel, unless the module is there already.
pub fn load_kernel_tls() {
    static ASKED: Mutex<bool> = Mutex::new(false);
    // Held while the kernel looks: who comes meanwhile waits for the answer.
    let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    if *asked {
        return;
    }
    // SAFETY: no pointers; the descriptor is new and nobody else's.
    let socket = unsafe {
        match libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) {
            -1 => return,
            fd => TcpStream::from(OwnedFd::from_raw_fd(fd)),
        }
    };
    *asked = true;
    // Not connected, so the module takes it not; but it has been looked for.
    let _ = set(&socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls");
}

impl Offload for TcpStream {
    fn attach(&self) -> io::Result<()> {
        // Asked for a module that it has not loaded, the kernel would look for it now, each time.
        if !listed() {
            return Err(io::ErrorKind::NotFound.into());
        }
        set(self, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
    }

    fn install(&self, direction: Direction, keys: &RecordKeys) -> io::Result<()> {
        let info = crypto_info(keys)?;
        match direction {
            Direction::Send => set(self, libc::SOL_TLS, libc::TLS_TX, &info),
            // Without TLS_RX_EXPECT_NO_PAD: hosts are not trusted, and could have every record decrypted twice (the kernel's
            // Documentation/networking/tls.rst); before CVE-2025-39682 was mended it did worse.
            Direction::Receive => set(self, libc::SOL_TLS, libc::TLS_RX, &info),
        }
    }

    fn send_control(&self, kind: u8, data: &[u8]) -> io::Result<()> {
        let mut control = Cmsg::default();
        let mut part =
            libc::iovec { iov_base: data.as_ptr().cast_mut().cast::<c_void>(), iov_len: data.len() };
        let message = message(&mut part, &mut control);
        // SAFETY: the message names `control`, which is aligned and has room for a header and one byte (asserted above); CMSG_FIRSTHDR
        // gives its start. The kernel only reads `data`, which lives through the call.
        let sent = unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_TLS;
            (*header).cmsg_type = libc::TLS_SET_RECORD_TYPE;
            (*header).cmsg_len = libc::CMSG_LEN(1) as _;
            libc::CMSG_DATA(header).write(kind);
            libc::sendmsg(self.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
        };
        match usize::try_from(sent) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(n) if n == data.len() => Ok(()),
            Ok(n) => {
                Err(io::Error::other(format!("the kernel took {n} of {} bytes of a record", data.len())))
            }
        }
    }

    fn recv_control(&self, buf: &mut [u8]) -> io::Result<(u8, usize)> {
        let mut control = Cmsg::default();
        let mut part = libc::iovec { iov_base: buf.as_mut_ptr().cast::<c_void>(), iov_len: buf.len() };
        let mut message = message(&mut part, &mut control);
        // SAFETY: `buf` and `control` are ours, live through the call, and are as long as the message says.
        let got = unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let Ok(got) = usize::try_from(got) else { return Err(io::Error::last_os_error()) };
        // SAFETY: the kernel has set how much of `control` it has filled, and CMSG_FIRSTHDR looks at that.
        let kind = unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            let named = !header.is_null()
                && ((*header).cmsg_level, (*header).cmsg_type) == (libc::SOL_TLS, libc::TLS_GET_RECORD_TYPE);
            named.then(|| libc::CMSG_DATA(header).read())
        };
        let kind = kind.ok_or_else(|| io::Error::other("the kernel does not say what record it is"))?;
        Ok((kind, got))
    }
}

/// A message of one part with room for a control message.
fn message(part: &mut libc::iovec, control: &mut Cmsg) -> libc::msghdr {
    // SAFETY: a message header is numbers and pointers, for which zero is legal.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CMSG_SPACE as _;
    message
}

/// Of one control message with a record type, bytes.
const CMSG_SPACE: usize = size_of::<libc::cmsghdr>() + size_of::<u64>();

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's layout (include/uapi/linux/tls.h), field by field.
    #[test]
    fn keys_lie_as_the_kernel_wants_them() {
        for len in [16, 32] {
            let keys = RecordKeys {
                key: Zeroizing::new((0..len).collect()),
                iv: Zeroizing::new(std::array::from_fn(|i| 0x80 + i as u8)),
                sequence: 0x0102_0304,
            };
            let info = crypto_info(&keys).expect("AES-GCM");
            let mut want = vec![4, 3, if len == 16 { 51 } else { 52 }, 0];
            want.extend(0x84..0x8c);
            want.extend(0..len);
            want.extend(0x80..0x84);
            want.extend([0, 0, 0, 0, 1, 2, 3, 4]);
            assert_eq!(*info, want);
        }
        let none = RecordKeys { key: Zeroizing::new(vec![0; 24]), iv: Zeroizing::default(), sequence: 0 };
        assert!(crypto_info(&none).is_err());
    }
}
