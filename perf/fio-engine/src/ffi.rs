//! What `shim.c` calls. Every function is called on the thread of the job that the queue belongs to; fio's buffers belong to a
//! command from its submission until fio has taken its event. They lie in memory of ours, so that writes go out from where fio
//! filled them in. A panic becomes an error: it must not pass through C.

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use cryptfold_bdev::Op;
use cryptfold_reactor::Buf;

use crate::engine::{Engine, Target};

/// `struct cryptfold_target` of shim.c.
#[repr(C)]
pub struct CTarget {
    traddr: *const c_char,
    trsvcid: *const c_char,
    subnqn: *const c_char,
    hostnqn: *const c_char,
    psk: *const c_char,
    dhchap_key: *const c_char,
    nsid: u32,
    psk_version: u32,
    hdgst: u32,
    ddgst: u32,
    ktls: u32,
    io_timeout: u32,
    depth: u32,
}

/// `struct cryptfold_event` of shim.c.
#[repr(C)]
pub struct CEvent {
    tag: *mut c_void,
    error: i32,
}

/// A command under way: fio's `io_u`, and where a read's data goes.
struct Place {
    io_u: *mut c_void,
    data: *mut u8,
    bytes: usize,
}

/// What fio holds as one job's data.
pub struct Job {
    engine: Engine,
    /// By tag.
    places: Vec<Place>,
    /// Tags that no command has.
    free: Vec<usize>,
    /// What the last wait handed out.
    events: Vec<(*mut c_void, i32)>,
    /// Whether the end of the connection has been said.
    said: bool,
    /// Where fio's buffers lie. No reference to its bytes is made: fio writes them.
    memory: Option<Buf>,
}

impl Job {
    /// What a write writes: fio's bytes themselves when they lie in our memory, or a copy.
    ///
    /// # Safety
    /// As for [`cryptfold_fio_submit`].
    unsafe fn data(&self, data: *const u8, bytes: usize) -> Buf {
        let own = |memory: &&Buf| {
            let from = data.addr().checked_sub(memory.as_ptr().addr());
            from.is_some_and(|from| from + bytes <= memory.len())
        };
        // SAFETY: the owner keeps the memory, and the caller does not write these bytes before the command is done, which it is
        // when no reference to them is left (`Engine::submit`). Without an owner they are read at once.
        unsafe {
            match self.memory.as_ref().filter(own) {
                Some(memory) => Buf::from_owner(data, bytes, Box::new(memory.clone())),
                None => Buf::from_slice(std::slice::from_raw_parts(data, bytes)),
            }
        }
    }
}

/// # Safety
/// A string that ends with zero, or null.
unsafe fn text(p: *const c_char) -> String {
    if p.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
}

/// The text, cut to the room and ended with zero.
///
/// # Safety
/// `room` bytes can be written at `to`.
unsafe fn tell(text: &str, to: *mut c_char, room: usize) {
    let Some(most) = room.checked_sub(1) else { return };
    let n = text.len().min(most);
    // SAFETY: n + 1 bytes fit by the above, and the text is no part of the caller's room.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), n);
        *to.add(n) = 0;
    }
}

/// Connects; null, and why not, when it fails.
///
/// # Safety
/// The strings of `target` end with zero or are null; `bytes` and `block_bytes` can be written, and `why_bytes` at `why`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptfold_fio_open(
    target: *const CTarget,
    bytes: *mut u64,
    block_bytes: *mut u32,
    why: *mut c_char,
    why_bytes: usize,
) -> *mut Job {
    // SAFETY: the caller's promise.
    let (t, target) = unsafe {
        let t = &*target;
        let strings = [t.traddr, t.trsvcid, t.subnqn, t.hostnqn, t.psk, t.dhchap_key].map(|p| text(p));
        (t, strings)
    };
    let [traddr, trsvcid, subnqn, hostnqn, psk, dhchap_key] = target;
    let target = Target {
        traddr,
        trsvcid,
        subnqn,
        hostnqn,
        psk,
        dhchap_key,
        nsid: t.nsid,
        psk_version: t.psk_version,
        hdgst: t.hdgst != 0,
        ddgst: t.ddgst != 0,
        ktls: t.ktls != 0,
        io_timeout_s: t.io_timeout.into(),
        depth: t.depth,
    };
    let opened =
        catch_unwind(|| Engine::open(&target)).unwrap_or_else(|_| Err("a panic while connecting".into()));
    match opened {
        Ok(engine) => {
            let info = engine.info();
            // SAFETY: the caller's promise.
            unsafe {
                *bytes = info.blocks * u64::from(info.block_bytes);
                *block_bytes = info.block_bytes;
            }
            Box::into_raw(Box::new(Job {
                engine,
                places: Vec::new(),
                free: Vec::new(),
                events: Vec::new(),
                said: false,
                memory: None,
            }))
        }
        Err(e) => {
            // SAFETY: the caller's promise.
            unsafe { tell(&e, why, why_bytes) };
            std::ptr::null_mut()
        }
    }
}

/// Memory for the buffers of all commands, as long as the job is open and once per job; null when it is too much (4 GiB).
///
/// # Safety
/// `job` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptfold_fio_memory(job: *mut Job, bytes: u64) -> *mut c_void {
    let made = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the job is open, and its thread calls one function at a time.
        let job = unsafe { &mut *job };
        let bytes = u32::try_from(bytes).ok().filter(|_| job.memory.is_none())?;
        let memory = job.memory.insert(Buf::alloc_zeroed(bytes as usize));
        Some(memory.as_ptr().cast_mut().cast())
    }));
    made.ok().flatten().unwrap_or(std::ptr::null_mut())
}

/// Queues a command; 0, or an errno.
///
/// # Safety
/// `job` is open; `bytes` at `data` stay fio's command's until its event was taken; a write's do not change until then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptfold_fio_submit(
    job: *mut Job,
    op: u32,
    offset: u64,
    bytes: u64,
    data: *mut c_void,
    io_u: *mut c_void,
) -> i32 {
    let (op, offset, bytes) = match op {
        0 => (Op::Read, offset, bytes),
        1 => (Op::Write, offset, bytes),
        2 => (Op::Unmap, offset, bytes),
        _ => (Op::Flush, 0, 0),
    };
    let submitted = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the job is open, and its thread calls one function at a time.
        let job = unsafe { &mut *job };
        // SAFETY: the caller's promise.
        let out = (op == Op::Write).then(|| unsafe { job.data(data.cast(), bytes as usize) });
        let tag = job.free.pop().unwrap_or(job.places.len());
        if let Err(e) = job.engine.submit(op, offset, bytes, out, tag as u64) {
            job.free.extend((tag < job.places.len()).then_some(tag));
            eprintln!("cryptfold: {e}");
            return libc::EINVAL;
        }
        let bytes = if op == Op::Read { bytes as usize } else { 0 };
        let place = Place { io_u, data: data.cast(), bytes };
        match job.places.get_mut(tag) {
            Some(free) => *free = place,
            None => job.places.push(place),
        }
        0
    }));
    submitted.unwrap_or(libc::EFAULT)
}

/// Waits for `min` commands and makes up to `max` events of those that are done; how many, or -errno. `timeout_ns` < 0: for ever.
///
/// # Safety
/// `job` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptfold_fio_wait(job: *mut Job, min: u32, max: u32, timeout_ns: i64) -> i32 {
    let waited = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as for submitting.
        let job = unsafe { &mut *job };
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        let min = (min as usize).min(job.places.len() - job.free.len());
        job.engine.wait(min, timeout);
        job.events.clear();
        while job.events.len() < max.max(1) as usize {
            let Some(done) = job.engine.take() else { break };
            let Some(place) = job.places.get(done.tag as usize) else { continue };
            job.free.push(done.tag as usize);
            let mut error = if done.status.is_ok() { 0 } else { libc::EIO };
            if error == 0 && place.bytes > 0 {
                if done.data.len_bytes() == place.bytes {
                    // SAFETY: fio's buffer, which is this command's until its event was taken, and nobody else's.
                    let mut to = unsafe { std::slice::from_raw_parts_mut(place.data, place.bytes) };
                    for piece in done.data.iter() {
                        let (now, rest) = to.split_at_mut(piece.len());
                        now.copy_from_slice(piece);
                        to = rest;
                    }
                } else {
                    error = libc::EIO;
                }
            }
            if error != 0 && !job.said {
                job.said = true;
                let why = job.engine.ended().unwrap_or_else(|| done.status.to_string());
                eprintln!("cryptfold: {why}");
            }
            job.events.push((place.io_u, error));
        }
        job.events.len() as i32
    }));
    waited.unwrap_or(-libc::EFAULT)
}

/// One of the events of the last wait; 0, or 1 when there is none.
///
/// # Safety
/// `job` is open; `event` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptfold_fio_event(job: *mut Job, index: u32, event: *mut CEvent) -> i32 {
    // SAFETY: as for submitting.
    let job = unsafe { &*job };
    let Some(&(tag, error)) = job.events.get(index as usize) else { return 1 };
    // SAFETY: the caller's promise.
    unsafe { *event = CEvent { tag, error } };
    0
}

/// Disconnects.
///
/// # Safety
/// `job` is open, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cryptfold_fio_close(job: *mut Job) {
    // SAFETY: it comes from Box::into_raw, once.
    let job = unsafe { Box::from_raw(job) };
    // Whoever closes has nobody to tell.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(job)));
}

#[cfg(fio)]
unsafe extern "C" {
    fn cryptfold_fio_ops() -> *mut c_void;
}

/// fio asks for the engine.
///
/// # Safety
/// `ops` can be written.
#[cfg(fio)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn get_ioengine(ops: *mut *mut c_void) {
    // SAFETY: the shim's function returns a static; the rest is the caller's promise.
    unsafe { *ops = cryptfold_fio_ops() };
}
