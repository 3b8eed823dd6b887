//! The RAM disk.
//!
//! Memory is kept in 4 KiB pages, each its own reference-counted buffer. A read *lends* the pages; a write of a page
//! that is lent out goes to a fresh page which takes the old one's place, so a slow reader neither sees a mixture nor
//! holds writers up. A page-sized buffer that nobody else holds is taken over as it is: a 4 KiB write copies nothing.
//!
//! A random access would wait for memory three times: for the page's place in the table, its reference count, its first
//! bytes. So I/O is not worked on when it is submitted but together with what is submitted after it, a step at a time for
//! all of them, with hints to the processor before each step.

mod pages;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Bdev, BdevError, Device, DeviceInfo, Io, Op, OpSet, Queue, Registry, Status};
use cryptfold_reactor as reactor;
use reactor::memory::{Buf, SgList, fence_streams};
use serde_json::{Value, json};
use uuid::Uuid;

use pages::Pages;

/// What `bdev_malloc_create` takes.
#[derive(Clone, Debug)]
pub struct MallocOptions {
    /// Name in the registry.
    pub name: String,
    /// Size in blocks.
    pub num_blocks: u64,
    /// Bytes in a block.
    pub block_size_bytes: u32,
    /// Identity; random when not given.
    pub uuid: Option<Uuid>,
    /// Preferred write size in blocks (0 = none).
    pub optimal_io_boundary: u32,
}

struct Malloc {
    info: DeviceInfo,
    pages: Pages,
}

/// Bytes in a page.
pub(crate) const PAGE: usize = 4096;

/// Creates a RAM disk; all of its memory is taken now, zeroed.
///
/// # Errors
/// Name taken, a geometry that the registry refuses, or no memory.
pub fn create(registry: &Arc<Registry>, options: MallocOptions) -> Result<Arc<Bdev>, BdevError> {
    let bs = u64::from(options.block_size_bytes);
    let Some(bytes) = options.num_blocks.checked_mul(bs).filter(|b| *b > 0) else {
        return Err(BdevError::Invalid("num_blocks must be greater than 0 and not overflow".into()));
    };
    if let Some(free) = available_bytes()
        && bytes > free
    {
        return Err(BdevError::NoResources(format!(
            "a RAM disk of {} MiB does not fit into the {} MiB that are available",
            bytes >> 20,
            free >> 20
        )));
    }
    let mut info = DeviceInfo::new(options.name, "Malloc disk", options.block_size_bytes, options.num_blocks);
    info.uuid = options.uuid.unwrap_or(info.uuid);
    info.ops =
        OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Compare, Op::Reset]);
    info.atomic_blocks = (PAGE as u32 / options.block_size_bytes.max(1)).max(1);
    info.keeps_bytes = PAGE as u32;
    info.optimal_io_blocks = options.optimal_io_boundary;
    let pages = Pages::new(bytes.div_ceil(PAGE as u64) as usize);
    registry.register(Arc::new(Malloc { info, pages }))
}

/// What the kernel thinks can be allocated without swapping.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

impl Device for Malloc {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        Ok(Rc::new(MallocQueue {
            disk: self,
            pending: RefCell::default(),
            spare: Cell::default(),
            drain: Cell::new(Some(Box::default())),
        }))
    }

    fn config(&self) -> Vec<(String, Value)> {
        let params = json!({
            "name": self.info.name,
            "num_blocks": self.info.blocks,
            "block_size": self.info.block_size_bytes,
            "uuid": self.info.uuid.to_string(),
            "optimal_io_boundary": self.info.optimal_io_blocks,
        });
        vec![("bdev_malloc_create".into(), params)]
    }
}

struct MallocQueue {
    disk: Arc<Malloc>,
    /// Submitted, hinted, waiting for the drain.
    pending: RefCell<Vec<Pending>>,
    /// The empty list that takes turns with it.
    spare: Cell<Vec<Pending>>,
    /// The drain, when it is not under way.
    drain: Cell<Option<Box<Drain>>>,
}

struct Pending {
    io: Box<Io>,
    /// A read without a buffer of its own.
    lends: bool,
    status: Status,
}

/// Works on everything pending, one turn of the reactor's queue after the first of it was submitted.
#[derive(Default)]
struct Drain {
    queue: Option<Rc<MallocQueue>>,
}

impl Queue for MallocQueue {
    #[inline]
    fn submit(self: Rc<Self>, io: Box<Io>) {
        let (at, len) = self.place(&io);
        self.disk.pages.hint_places(at, len);
        self.pending.borrow_mut().push(Pending {
            lends: io.op == Op::Read && io.data.is_empty(),
            io,
            status: Status::SUCCESS,
        });
        if let Some(mut drain) = self.drain.take() {
            drain.queue = Some(self);
            reactor::defer(drain);
        }
    }
}

impl reactor::Deferred for Drain {
    fn run(mut self: Box<Self>) {
        let Some(queue) = self.queue.take() else { return };
        let mut batch = queue.pending.replace(queue.spare.take());
        // What is submitted from here on waits for the next drain.
        queue.drain.set(Some(self));
        fence_streams();
        for Pending { io, .. } in &batch {
            let (at, len) = queue.place(io);
            queue.disk.pages.hint_counts(at, len);
        }
        // All pages change before anybody hears of it: the exchange of a page is a locked instruction, which waits until all
        // that the completion before it has stored (the next write's data) is in memory.
        for pending in &mut batch {
            pending.status = queue.work(&mut pending.io);
        }
        for Pending { io, lends, status } in batch.drain(..) {
            // What is lent goes through the reactor's queue: its first bytes are on their way.
            if lends { io.finish(status) } else { io.up(status) }
        }
        queue.spare.set(batch);
    }
}

impl MallocQueue {
    /// First byte on the disk and number of bytes.
    #[inline]
    fn place(&self, io: &Io) -> (usize, usize) {
        let bs = self.disk.info.block_size_bytes as usize;
        (io.lba as usize * bs, io.blocks as usize * bs)
    }

    fn work(&self, io: &mut Io) -> Status {
        let (at, len) = self.place(io);
        let pages = &self.disk.pages;
        match io.op {
            Op::Read if io.data.is_empty() => io.data = pages.lend(at, len),
            Op::Read => {
                let lent = pages.lend(at, len);
                let mut out = std::mem::take(&mut io.data);
                let copied = out.copy_from(&lent);
                io.data = out;
                if !copied {
                    return Status::DATA_TRANSFER_ERROR;
                }
            }
            Op::Write => match io.data.take_single() {
                Some(buf) => pages.write_buf(at, buf),
                None => pages.write(at, std::mem::take(&mut io.data)),
            },
            Op::WriteZeroes | Op::Unmap => pages.write(at, SgList::zeroes(len)),
            Op::Compare if !pages.lend(at, len).eq_bytes(&io.data) => return Status::COMPARE_FAILURE,
            _ => {}
        }
        Status::SUCCESS
    }
}

/// Cuts `data` at page boundaries of the disk: calls `f(page, offset in page, piece)`.
pub(crate) fn by_page(at: usize, data: SgList, mut f: impl FnMut(usize, usize, Buf)) {
    let mut at = at;
    for mut buf in data {
        while !buf.is_empty() {
            let room = PAGE - at % PAGE;
            let piece = if buf.len() > room { buf.split_to(room) } else { std::mem::take(&mut buf) };
            let n = piece.len();
            f(at / PAGE, at % PAGE, piece);
            at += n;
        }
    }
}
