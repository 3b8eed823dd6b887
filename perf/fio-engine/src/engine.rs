//! The engine without fio: one queue to one namespace, on the thread that opened it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_nvmf_initiator::{
    ConnectOptions, Controller, Credentials, IoQueue, NamespaceInfo, NamespaceQueue, Offer, Psk, Secret,
    TlsKey, Version,
};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_reactor::{Buf, Inline, MemoryConfig, RuntimeConfig, SgList};
use zeroize::Zeroizing;

/// What to connect to, as the job says. Options that were not given are empty.
#[derive(Clone, Debug, Default)]
pub struct Target {
    /// Address.
    pub traddr: String,
    /// Port; 4420 when empty.
    pub trsvcid: String,
    /// Subsystem.
    pub subnqn: String,
    /// Namespace.
    pub nsid: u32,
    /// This host's name; drawn at random when empty.
    pub hostnqn: String,
    /// File with the key for TLS.
    pub psk: String,
    /// Version of the TLS identity, 0 or 1.
    pub psk_version: u32,
    /// File with the secret for authentication.
    pub dhchap_key: String,
    /// Header digests.
    pub hdgst: bool,
    /// Data digests.
    pub ddgst: bool,
    /// The kernel makes TLS records.
    pub ktls: bool,
    /// Seconds until a command that is not answered ends the connection.
    pub io_timeout_s: u64,
    /// Commands under way.
    pub depth: u32,
}

impl Target {
    fn options(&self) -> Result<ConnectOptions, String> {
        for (name, value) in [("traddr", &self.traddr), ("subnqn", &self.subnqn)] {
            if value.is_empty() {
                return Err(format!(
                    "the job needs {name}= (and traddr=, trsvcid=, subnqn= say where the namespace is)"
                ));
            }
        }
        let keyed = !self.psk.is_empty() || !self.dhchap_key.is_empty();
        if keyed && self.hostnqn.is_empty() {
            return Err("psk= and dhchap_key= need hostnqn=, the name that the key belongs to".into());
        }
        if !(1..4096).contains(&self.depth) {
            return Err(format!("iodepth={}: 1 to 4095", self.depth));
        }
        if self.psk_version > 1 {
            return Err(format!("psk_version={}: 0 or 1", self.psk_version));
        }
        let port = if self.trsvcid.is_empty() { "4420" } else { &self.trsvcid };
        let mut options = ConnectOptions::new(&self.traddr, port, &self.subnqn);
        if !self.hostnqn.is_empty() {
            options.hostnqn.clone_from(&self.hostnqn);
        }
        // One entry of a queue always stays empty.
        options.queue_size = self.depth as u16 + 1;
        (options.hdgst, options.ddgst, options.kernel_tls) = (self.hdgst, self.ddgst, self.ktls);
        // Between jobs nobody runs the reactor, so nobody could keep it alive.
        options.kato_ms = 0;
        options.io_timeout = Duration::from_secs(self.io_timeout_s.max(1));
        if !self.psk.is_empty() {
            let psk = key(&self.psk, Psk::parse)?;
            let version = if self.psk_version == 0 { Version::V0 } else { Version::V1 };
            options.tls = Some(TlsKey { psk, version });
        }
        if !self.dhchap_key.is_empty() {
            let secret = key(&self.dhchap_key, Secret::parse)?;
            options.credentials = Some(Credentials { secret, controller: None, offer: Offer::default() });
        }
        Ok(options)
    }
}

fn key<T, E: std::fmt::Display>(file: &str, parse: fn(&str) -> Result<T, E>) -> Result<T, String> {
    let text = Zeroizing::new(fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?);
    parse(&text).map_err(|e| format!("{file}: {e}"))
}

/// A command that is done.
#[derive(Debug)]
pub struct Done {
    /// As submitted.
    pub tag: u64,
    /// How it ended.
    pub status: Status,
    /// What a read returned.
    pub data: SgList,
}

/// Where I/O comes back to.
#[derive(Default)]
struct Returned {
    done: RefCell<VecDeque<Done>>,
    /// Answered writes to whose data something else still refers: a target may answer before all of it has gone out.
    going_out: RefCell<Vec<Done>>,
}

impl Complete for Returned {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let (op, status, data) = (io.op, io.status(), std::mem::take(&mut io.data));
        io.recycle();
        let done = Done { tag: frame.lba, status, data };
        if op == Op::Write && done.data.iter().any(Buf::is_shared) {
            self.going_out.borrow_mut().push(done);
        } else {
            self.done.borrow_mut().push_back(done);
        }
    }
}

impl Returned {
    /// How many are done.
    fn count(&self) -> usize {
        let mut done = self.done.borrow_mut();
        done.extend(self.going_out.borrow_mut().extract_if(.., |w| !w.data.iter().any(Buf::is_shared)));
        done.len()
    }
}

/// What lives on the reactor.
struct Connected {
    controller: Controller,
    queue: IoQueue,
    namespace: Rc<NamespaceQueue>,
}

/// A connected queue.
pub struct Engine {
    /// Taken when it ends.
    connected: Option<Connected>,
    returned: Rc<Returned>,
    info: NamespaceInfo,
    reactor: Inline,
}

async fn connect(target: Target, options: ConnectOptions) -> Result<(Connected, NamespaceInfo), String> {
    let text = |e: cryptfold_nvmf_initiator::Error| e.to_string();
    let controller = Controller::connect(&options).await.map_err(text)?;
    let info = controller.namespace(Nsid(target.nsid)).await.map_err(text)?;
    let queue = controller.io_queue(target.depth as u16).await.map_err(text)?;
    if u32::from(queue.depth()) < target.depth {
        let most = queue.depth();
        return Err(format!(
            "{}: queues of {most} commands at most, iodepth={}",
            target.subnqn, target.depth
        ));
    }
    let namespace = queue.namespace(&info);
    Ok((Connected { controller, queue, namespace }, info))
}

impl Engine {
    /// Connects.
    ///
    /// # Errors
    /// What is wrong with the job, or what failed; in one line.
    pub fn open(target: &Target) -> Result<Engine, String> {
        let options = target.options()?;
        // fio forks: reserved hugepages would have to be there twice.
        let memory = MemoryConfig { hugepages: false, fixed_buffers: false, ..MemoryConfig::default() };
        let config = RuntimeConfig { memory, ..RuntimeConfig::default() };
        let mut reactor = Inline::new(&config).map_err(|e| e.to_string())?;
        let (connected, info) = reactor.block_on(connect(target.clone(), options))?;
        Ok(Engine { connected: Some(connected), returned: Rc::default(), info, reactor })
    }

    /// The namespace.
    pub fn info(&self) -> &NamespaceInfo {
        &self.info
    }

    /// Queues a command; it goes out with the next [`Engine::wait`]. `offset` and `bytes` are whole blocks, nothing for a flush;
    /// `data` is what a write writes, and nobody else's: the command is done when it was answered *and* that is so again.
    ///
    /// # Errors
    /// When they are not.
    pub fn submit(
        &mut self,
        op: Op,
        offset: u64,
        bytes: u64,
        data: Option<Buf>,
        tag: u64,
    ) -> Result<(), String> {
        let block = u64::from(self.info.block_bytes);
        if !offset.is_multiple_of(block) || !bytes.is_multiple_of(block) {
            return Err(format!("{bytes} bytes at {offset}: no whole blocks of {block}"));
        }
        let (returned, connected) = (self.returned.clone(), &self.connected);
        let namespace = connected.as_ref().ok_or("the queue is closed")?.namespace.clone();
        self.reactor.enter(|| {
            let mut io = Io::new(op, offset / block, bytes / block);
            if let Some(data) = data {
                io.data = data.into();
            }
            io.push(returned, tag, 0);
            namespace.submit(io);
        });
        Ok(())
    }

    /// Runs the reactor until `min` commands are done, or the time is over. How many are.
    pub fn wait(&mut self, min: usize, timeout: Option<Duration>) -> usize {
        let begin = timeout.map(|limit| (Instant::now(), limit));
        if min == 0 {
            self.reactor.turn(false);
        }
        loop {
            let done = self.returned.count();
            if done >= min || begin.is_some_and(|(begin, limit)| begin.elapsed() >= limit) {
                return done;
            }
            self.reactor.turn(true);
        }
    }

    /// The next command that is done.
    pub fn take(&mut self) -> Option<Done> {
        self.returned.done.borrow_mut().pop_front()
    }

    /// Why the connection ended, if it did.
    pub fn ended(&self) -> Option<String> {
        self.connected.as_ref()?.queue.check().err().map(|e| e.to_string())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(Connected { controller, queue, namespace }) = self.connected.take() {
            self.reactor.enter(|| drop((queue, namespace)));
            self.reactor.block_on(controller.shutdown());
        }
        self.reactor.enter(|| {
            self.returned.done.borrow_mut().clear();
            self.returned.going_out.borrow_mut().clear();
        });
    }
}
