//! Signals of the process: SIGINT, SIGTERM and SIGQUIT arrive on one thread and ask for an orderly end; a second one
//! ends at once. With the first call of `target.rs` the only `unsafe` of the program.

use std::sync::mpsc::{Receiver, Sender, channel};

/// Where requests to end come in, from signals and from `spdk_kill_instance`.
pub struct EndRequests {
    /// To hand out.
    pub sender: Sender<()>,
    receiver: Receiver<()>,
}

impl EndRequests {
    /// Must be called before other threads exist, so that they inherit the mask.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn new() -> std::io::Result<EndRequests> {
        let (sender, receiver) = channel();
        let set = block()?;
        let from_signals = sender.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            while let Ok(signal) = wait(&set) {
                if signal == libc::SIGHUP || signal == libc::SIGUSR1 {
                    tracing::info!(signal, "signal ignored");
                    continue;
                }
                let already = ENDING.swap(true, std::sync::atomic::Ordering::SeqCst);
                if already {
                    eprintln!("cryptfold: second signal; ending at once");
                    std::process::exit(1);
                }
                let _ = from_signals.send(());
            }
        })?;
        Ok(EndRequests { sender, receiver })
    }

    /// Waits for a request for at most so long; true when one came.
    pub fn wait_for(&self, limit: std::time::Duration) -> bool {
        self.receiver.recv_timeout(limit).is_ok()
    }

    /// Waits for the first request.
    pub fn wait(&self) {
        // An error means that no sender is left, which is an end as well.
        let _ = self.receiver.recv();
    }
}

static ENDING: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

fn block() -> std::io::Result<libc::sigset_t> {
    // SAFETY: sigset_t is plain data that sigemptyset fills; all pointers are to this live variable.
    let (set, error) = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGHUP, libc::SIGUSR1] {
            libc::sigaddset(&mut set, s);
        }
        (set, libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))
    };
    if error == 0 { Ok(set) } else { Err(std::io::Error::from_raw_os_error(error)) }
}

fn wait(set: &libc::sigset_t) -> std::io::Result<i32> {
    let mut signal = 0;
    // SAFETY: both pointers are to live variables of the right types.
    let error = unsafe { libc::sigwait(set, &mut signal) };
    if error == 0 { Ok(signal) } else { Err(std::io::Error::from_raw_os_error(error)) }
}

/// A command whose output nobody reads any more (`cryptfold rpc ... | head`) ends quietly, as others do.
pub fn end_with_pipes() {
    // SAFETY: no handler is installed, the default one needs no memory of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// SIGKILL to this process.
pub fn kill_self() {
    // SAFETY: no memory is involved; the process is this one.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
}
