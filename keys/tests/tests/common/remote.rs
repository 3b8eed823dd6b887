//! A host that is connected over NVMe/TCP.

use std::cell::RefCell;
use std::rc::Rc;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_nvmf_initiator::{ConnectOptions, Controller, Credentials, NamespaceQueue, Offer, Secret};
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::sync::oneshot;
use cryptfold_reactor::{IdlePolicy, MemoryConfig, Runtime, RuntimeConfig};

use super::PATIENCE;

thread_local! {
    static KEPT: RefCell<Option<(Controller, Option<Rc<NamespaceQueue>>)>> = const { RefCell::new(None) };
}

struct One(RefCell<Option<oneshot::Sender<Box<Io>>>>);

impl Complete for One {
    fn complete(self: Rc<Self>, io: Box<Io>, _: Frame) {
        let sender = self.0.borrow_mut().take().expect("completes once");
        assert!(sender.send(io).is_ok(), "the test waits");
    }
}

/// Connected until it is dropped.
pub struct Remote {
    runtime: Runtime,
}

impl Remote {
    /// Connects an admin and an I/O queue; takes the first namespace that there is, if any.
    pub fn connect(port: u16, nqn: &str, host: &str, secret: Option<Secret>) -> Remote {
        let runtime = Runtime::start(RuntimeConfig {
            cores: vec![0],
            policy: IdlePolicy::Interrupt,
            pin: false,
            memory: MemoryConfig { hugepages: false, fixed_buffers: false, arena_bytes: 4 << 20 },
            ..Default::default()
        })
        .expect("a reactor");
        let mut options = ConnectOptions::new("127.0.0.1", port.to_string(), nqn);
        options.hostnqn = host.into();
        options.kato_ms = 0;
        (options.connect_timeout, options.io_timeout) = (PATIENCE, PATIENCE);
        options.credentials =
            secret.map(|secret| Credentials { secret, controller: None, offer: Offer::default() });
        runtime.handles()[0]
            .block_on(move || async move {
                let controller = Controller::connect(&options).await.expect("connects");
                let queue = controller.io_queue(16).await.expect("opens");
                let mut first = None;
                if let Some(nsid) = controller.namespaces().await.expect("namespaces").first() {
                    first = Some(queue.namespace(&controller.namespace(*nsid).await.expect("a namespace")));
                }
                KEPT.with_borrow_mut(|kept| *kept = Some((controller, first)));
            })
            .expect("the reactor runs");
        Remote { runtime }
    }

    fn io(&self, op: Op, at: usize, data: Vec<u8>, blocks: u64) -> Result<Vec<u8>, Status> {
        let done = self.runtime.handles()[0].block_on(move || async move {
            let queue = KEPT.with_borrow(|kept| kept.as_ref().and_then(|k| k.1.clone()));
            let mut io = Io::new(op, (at / 4096) as u64, blocks);
            io.data = data.chunks(4096).map(Buf::from_slice).collect();
            let (sender, receiver) = oneshot::channel();
            io.push(Rc::new(One(RefCell::new(Some(sender)))), 0, 0);
            queue.expect("a namespace").submit(io);
            let io = receiver.await.expect("every I/O comes back");
            let mut data = Vec::new();
            if op == Op::Read && io.status().is_ok() {
                data.resize(io.data.len_bytes(), 0);
                io.data.copy_to_slice(&mut data);
            }
            io.status().ok().map(|()| data)
        });
        done.expect("the reactor runs")
    }

    /// Reads a block at this byte.
    pub fn read(&self, at: usize) -> Result<Vec<u8>, Status> {
        self.io(Op::Read, at, Vec::new(), 1)
    }

    /// Writes a block at this byte.
    pub fn write(&self, at: usize, data: &[u8]) -> Result<(), Status> {
        self.io(Op::Write, at, data.to_vec(), 1).map(drop)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.runtime.handles()[0].block_on(|| async { drop(KEPT.take()) });
    }
}
