//! Commands on their way: what a queue pair sends, for whom, and how their data is described to a controller.
//!
//! Data goes by PRP entries (NVMe Base 2.0 section 4.1.1; memory page size 4 KiB: every entry but the first begins a page, every
//! piece but the last ends one) or by SGL (section 4.1.2) where the controller takes that. What can be described by neither (memory
//! outside of the arena, odd pieces) goes through a buffer of our own.
//!
//! Units: `lba` and `blocks` are the namespace's.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use cryptfold_bdev::{Io, Op, Status};
use cryptfold_nvmf_spec::dsm::DsmRange;
use cryptfold_nvmf_spec::sgl::ID_LAST_SEGMENT;
use cryptfold_nvmf_spec::sqe::Psdt;
use cryptfold_nvmf_spec::{Sgl, Sqe};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::sync::oneshot;
use zerocopy::little_endian::{U32, U64};

use crate::bus;
use crate::dma::DmaBuf;
use crate::identity::{Target, command};

/// Memory page size that controllers are configured for, bytes (CC.MPS = 0).
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Largest transfer of one command: what a page of PRP entries and one piece of the arena hold. Bytes.
pub(crate) const MAX_TRANSFER_BYTES: u64 = 1 << 20;
/// SGL descriptors in a list page.
const MAX_DESCRIPTORS: usize = PAGE_BYTES as usize / 16;

/// Who waits for a command.
pub(crate) enum Owner {
    /// A whole I/O.
    Io(Box<Io>),
    /// A part of one.
    Part(Rc<Split>),
    /// A task.
    Task(oneshot::Sender<Status>),
}

/// A command to send, perhaps again.
pub(crate) struct Request {
    /// Without CID and data pointer.
    pub sqe: Sqe,
    /// What the controller moves.
    pub data: SgList,
    /// Where data of a read goes in the end, if not where the controller puts it. Boxed: it is rare, and requests are moved.
    pub destination: Option<Box<SgList>>,
    /// The range of a Dataset Management command: first block, count.
    pub range: Option<(u64, u32)>,
    pub owner: Owner,
    /// Times it was sent.
    pub attempts: u8,
}

/// An I/O that takes several commands.
pub(crate) struct Split {
    io: RefCell<Option<Box<Io>>>,
    left: Cell<u32>,
    status: Cell<Status>,
    /// All of a read's data, as the parts see it.
    whole: RefCell<SgList>,
    /// Where it goes in the end, if elsewhere.
    destination: RefCell<Option<SgList>>,
}

impl Request {
    pub fn new(sqe: Sqe, data: SgList, owner: Owner) -> Request {
        Request { sqe, data, destination: None, range: None, owner, attempts: 0 }
    }

    /// Ends it for whoever waits. The controller must be done with the data.
    #[inline]
    pub fn end(self, status: Status) {
        match self.owner {
            Owner::Io(mut io) => {
                let status = if io.op == Op::Read {
                    give(&mut io, self.data, self.destination.map(|d| *d), status)
                } else {
                    status
                };
                io.finish(status);
            }
            Owner::Part(split) => {
                // Parts are cut from memory that the drive reaches. One that was read elsewhere all the same has not filled its place.
                let is_elsewhere = status.is_ok() && self.destination.is_some();
                drop(self.data);
                split.part_ended(if is_elsewhere { Status::DATA_TRANSFER_ERROR } else { status });
            }
            Owner::Task(task) => {
                // A task that no longer waits needs no answer.
                let _ = task.send(status);
            }
        }
    }

    /// The tag of the I/O, if it is a whole one.
    pub fn tag(&self) -> Option<u64> {
        match &self.owner {
            Owner::Io(io) => Some(io.tag),
            Owner::Part(split) => split.io.borrow().as_ref().map(|io| io.tag),
            Owner::Task(_) => None,
        }
    }

    /// Puts a read's data through a buffer of our own, or gathers a write's in one.
    pub fn bounce(&mut self, read: bool) {
        let len = self.data.len_bytes();
        let mut buf = Buf::alloc(len);
        if read {
            self.destination = Some(Box::new(std::mem::take(&mut self.data)));
        } else if let Some(bytes) = buf.get_mut() {
            self.data.copy_to_slice(bytes);
        }
        self.data = buf.into();
    }
}

/// Hands a read its data.
#[inline]
fn give(io: &mut Io, data: SgList, destination: Option<SgList>, status: Status) -> Status {
    let Some(mut destination) = destination else {
        io.data = data;
        return status;
    };
    let copied = !status.is_ok() || destination.copy_from(&data);
    io.data = destination;
    if copied { status } else { Status::DATA_TRANSFER_ERROR }
}

impl Split {
    fn part_ended(&self, status: Status) {
        if !status.is_ok() && self.status.get().is_ok() {
            self.status.set(status);
        }
        self.left.set(self.left.get() - 1);
        if self.left.get() > 0 {
            return;
        }
        let Some(mut io) = self.io.borrow_mut().take() else { return };
        let mut status = self.status.get();
        if io.op == Op::Read {
            status = give(&mut io, self.whole.take(), self.destination.take(), status);
        }
        io.finish(status);
    }
}

/// The commands of an I/O, in order, each given to `each`. `fits` tells whether a piece of data can be described.
#[inline]
pub(crate) fn requests(
    target: &Target,
    mut io: Box<Io>,
    fits: impl Fn(&SgList) -> bool,
    mut each: impl FnMut(Request),
) {
    let limit = target.limit(io.op);
    if io.op == Op::Read {
        if io.data.is_empty() && io.blocks <= limit {
            io.data = Buf::alloc((io.blocks << target.block_shift) as usize).into();
        } else if io.data.segments_mut().iter_mut().any(|b| b.get_mut().is_none()) {
            return io.finish(Status::DATA_TRANSFER_ERROR);
        }
    }
    if io.blocks == 0 && io.op != Op::Flush {
        return io.finish(Status::SUCCESS);
    }
    if io.blocks <= limit {
        let (lba, blocks) = (io.lba, io.blocks);
        let (sqe, range) = command(target, &io, lba, blocks);
        let data = std::mem::take(&mut io.data);
        let mut request = Request::new(sqe, data, Owner::Io(io));
        request.range = range;
        return each(request);
    }
    split(target, io, limit, fits, each);
}

#[cold]
fn split(
    target: &Target,
    mut io: Box<Io>,
    limit: u64,
    fits: impl Fn(&SgList) -> bool,
    mut each: impl FnMut(Request),
) {
    let (lba, blocks) = (io.lba, io.blocks);
    let (mut whole, mut destination) = (std::mem::take(&mut io.data), None);
    if io.op == Op::Read {
        let described = !whole.is_empty() && {
            let mut rest = whole.clone();
            let mut left = blocks;
            loop {
                let n = left.min(limit);
                if !fits(&rest.split_to((n << target.block_shift) as usize)) {
                    break false;
                }
                left -= n;
                if left == 0 {
                    break true;
                }
            }
        };
        if !described {
            let wanted = std::mem::take(&mut whole);
            // Without buffers: what was read is handed up.
            destination = (!wanted.is_empty()).then_some(wanted);
            let mut left = blocks;
            while left > 0 {
                let n = left.min(limit);
                whole.push(Buf::alloc((n << target.block_shift) as usize));
                left -= n;
            }
        }
    }
    let mut rest = whole.clone();
    let reads = io.op == Op::Read;
    let split = Rc::new(Split {
        left: Cell::new(blocks.div_ceil(limit) as u32),
        status: Cell::new(Status::SUCCESS),
        whole: RefCell::new(if reads { whole } else { SgList::new() }),
        destination: RefCell::new(destination),
        io: RefCell::new(None),
    });
    let mut parts = Vec::with_capacity(split.left.get() as usize);
    let mut done = 0;
    while done < blocks {
        let n = limit.min(blocks - done);
        let (sqe, range) = command(target, &io, lba + done, n);
        let data = match rest.is_empty() {
            true => SgList::new(),
            false => rest.split_to((n << target.block_shift) as usize),
        };
        let mut request = Request::new(sqe, data, Owner::Part(split.clone()));
        request.range = range;
        parts.push(request);
        done += n;
    }
    *split.io.borrow_mut() = Some(io);
    parts.into_iter().for_each(&mut each);
}

/// The data can not be described to the controller as it lies.
#[derive(Debug)]
pub(crate) struct Indescribable;

/// Describes `data` in `sqe`. `list` is a page of this command's own, at byte `list_at`; `window` is where the controller sees
/// slab 0. `mapped` slabs are visible to it.
#[inline]
pub(crate) fn describe(
    sqe: &mut Sqe,
    data: &SgList,
    list: &DmaBuf,
    list_at: usize,
    window: u64,
    sgl: bool,
) -> Result<(), Indescribable> {
    sqe.set_psdt(Psdt::Prp);
    if let [one] = data.segments() {
        let address = bus::iova(window, one.place().ok_or(Indescribable)?);
        let len = one.len() as u64;
        let first = PAGE_BYTES - address % PAGE_BYTES;
        if !address.is_multiple_of(4) {
            return Err(Indescribable);
        }
        if len <= first + PAGE_BYTES {
            let second = if len > first { address + first } else { 0 };
            sqe.sgl = Sgl::from_prps(address, second);
            return Ok(());
        }
        if sgl {
            sqe.set_psdt(Psdt::Sgl);
            sqe.sgl = Sgl::data_block(address, one.len() as u32);
            return Ok(());
        }
    }
    if sgl {
        describe_sgl(sqe, data, list, list_at, window)
    } else {
        describe_prp(sqe, data, list, list_at, window)
    }
}

#[cold]
fn describe_sgl(
    sqe: &mut Sqe,
    data: &SgList,
    list: &DmaBuf,
    list_at: usize,
    window: u64,
) -> Result<(), Indescribable> {
    let pieces = data.segments();
    if pieces.len() > MAX_DESCRIPTORS {
        return Err(Indescribable);
    }
    for (n, piece) in pieces.iter().enumerate() {
        let address = bus::iova(window, piece.place().ok_or(Indescribable)?);
        if !address.is_multiple_of(4) || !piece.len().is_multiple_of(4) {
            return Err(Indescribable);
        }
        list.write(list_at + n * 16, &Sgl::data_block(address, piece.len() as u32));
    }
    sqe.set_psdt(Psdt::Sgl);
    let mut last = Sgl::data_block(list.iova() + list_at as u64, pieces.len() as u32 * 16);
    last.id = ID_LAST_SEGMENT;
    sqe.sgl = last;
    Ok(())
}

fn describe_prp(
    sqe: &mut Sqe,
    data: &SgList,
    list: &DmaBuf,
    list_at: usize,
    window: u64,
) -> Result<(), Indescribable> {
    let (mut first, mut second, mut entries) = (0, 0, 0usize);
    let last = data.segments().len() - 1;
    for (n, piece) in data.iter().enumerate() {
        let start = bus::iova(window, piece.place().ok_or(Indescribable)?);
        let end = start + piece.len() as u64;
        let begins = start.is_multiple_of(PAGE_BYTES) || (n == 0 && start.is_multiple_of(4));
        if !begins || (n != last && !end.is_multiple_of(PAGE_BYTES)) {
            return Err(Indescribable);
        }
        let mut address = start;
        while address < end {
            match entries {
                0 => first = address,
                n if n <= PAGE_BYTES as usize / 8 => {
                    if n == 1 {
                        second = address;
                    }
                    list.store(list_at + (n - 1) * 8, address.to_le());
                }
                _ => return Err(Indescribable),
            }
            entries += 1;
            address = (address / PAGE_BYTES + 1) * PAGE_BYTES;
        }
    }
    let second = if entries > 2 { list.iova() + list_at as u64 } else { second };
    sqe.sgl = Sgl::from_prps(first, second);
    Ok(())
}

/// Whether [`describe`] will succeed.
pub(crate) fn fits(data: &SgList, sgl: bool) -> bool {
    let last = data.segments().len().saturating_sub(1);
    data.segments().len() <= MAX_DESCRIPTORS
        && data.iter().enumerate().all(|(n, piece)| {
            let Some(place) = piece.place() else { return false };
            let (start, end) = (u64::from(place.offset), u64::from(place.offset) + piece.len() as u64);
            let aligned = start.is_multiple_of(4) && end.is_multiple_of(4);
            let begins = n == 0 || start.is_multiple_of(PAGE_BYTES);
            let ends = n == last || end.is_multiple_of(PAGE_BYTES);
            aligned && (sgl || (begins && ends))
        })
}

/// Writes the range of a Dataset Management command (NVM 1.0 section 3.2.3) to its page and points at it.
pub(crate) fn describe_range(sqe: &mut Sqe, (lba, blocks): (u64, u32), list: &DmaBuf, list_at: usize) {
    let range = DsmRange { cattr: U32::new(0), blocks: U32::new(blocks), slba: U64::new(lba) };
    list.write(list_at, &range);
    sqe.set_psdt(Psdt::Prp);
    sqe.sgl = Sgl::from_prps(list.iova() + list_at as u64, 0);
}
