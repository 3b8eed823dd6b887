//! `cryptfold-perf nvmf`: load over NVMe/TCP, with the project's own initiator.

use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Io, Queue};
use cryptfold_nvmf_initiator::{Connector, IoQueue, NamespaceInfo, NamespaceQueue};

use crate::load::{self, Geometry, LoadArgs, LoadResult, Opener, Sink};
use crate::session::{Namespace, Session, start};

/// Loads a namespace over NVMe/TCP.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    namespace: Namespace,
    #[command(flatten)]
    load: LoadArgs,
}

struct Queues {
    connector: Arc<Connector>,
    info: NamespaceInfo,
    depth: u16,
}

struct NvmfSink {
    queue: IoQueue,
    namespace: Rc<NamespaceQueue>,
}

impl Sink for NvmfSink {
    #[inline]
    fn submit(&self, io: Box<Io>) {
        self.namespace.clone().submit(io);
    }
}

impl Opener for Queues {
    type Sink = NvmfSink;

    async fn open(&self, _job: u32) -> Result<NvmfSink, String> {
        let queue = self.connector.clone().io_queue(self.depth).await.map_err(|e| e.to_string())?;
        let namespace = queue.namespace(&self.info);
        Ok(NvmfSink { queue, namespace })
    }

    async fn close(&self, sink: Rc<NvmfSink>) -> Result<(), String> {
        sink.queue.check().map_err(|e| e.to_string())
    }
}

/// Runs and reports.
///
/// # Errors
/// What went wrong, in one line; also when an I/O failed or a block was wrong.
pub fn run(args: &Args) -> Result<(), String> {
    load(&args.namespace, &args.load)?.report(args.load.json)
}

/// Runs the load.
///
/// # Errors
/// What went wrong, in one line.
pub(crate) fn load(namespace: &Namespace, args: &LoadArgs) -> Result<LoadResult, String> {
    args.check()?;
    let runtime = start(&args.cores)?;
    let queues = args.jobs * args.cores.0.len() as u32;
    let session = Session::open(&runtime.handles()[0], namespace, queues, args.iodepth)?;
    let info = &session.info;
    let geometry = Geometry { block_size_bytes: u64::from(info.block_bytes), blocks: info.blocks };
    let depth = args.iodepth.min(u32::from(u16::MAX)) as u16;
    let opener = Queues { connector: session.connector.clone(), info: info.clone(), depth };
    let result = load::run(runtime.handles(), args, geometry, opener)?;
    drop(session);
    Ok(result)
}
