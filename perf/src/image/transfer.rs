//! An image to a namespace, and back.
//!
//! The calling thread reads the file and runs the cipher; a reactor does the I/O. A bounded number of pieces is between
//! them, so memory is bounded too.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Instant;

use cryptfold_bdev::{Complete, Frame, Io, Op, Queue, Status};
use cryptfold_bdev_crypto::engine::{Direction, XtsContext, XtsKey};
use cryptfold_nvmf_initiator::{IoQueue, NamespaceQueue};
use cryptfold_reactor::memory::{Buf, SgList};
use cryptfold_reactor::{Handle, Runtime};

use crate::load::{Bytes, Cores};
use crate::session::{Namespace, Session, start};

/// dm-crypt counts 512-byte sectors in `plain64`, whatever its sector size is (kernel documentation, dm-crypt,
/// without `iv_large_sectors`).
const TWEAK_UNIT_BYTES: u64 = 512;

/// What to transfer.
#[derive(clap::Args, Clone, Debug)]
pub struct TransferArgs {
    #[command(flatten)]
    namespace: Namespace,
    /// The image
    #[arg(long)]
    file: PathBuf,
    /// Encrypt what is written, decrypt what is read, as the host's dm-crypt (aes-xts-plain64) with the volume key in this
    /// file does: 32 or 64 bytes, raw or hexadecimal, readable by its owner only
    #[arg(long)]
    hostcrypt_key: Option<PathBuf>,
    /// dm-crypt's sector size
    #[arg(long, default_value_t = 512, value_parser = sector_size)]
    sector_size: u32,
    /// Bytes per I/O
    #[arg(long, default_value = "128k")]
    bs: Bytes,
    /// I/Os under way
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    iodepth: u32,
    /// CPU to run on (the first of a list)
    #[arg(long, default_value = "0")]
    cores: Cores,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

fn sector_size(s: &str) -> Result<u32, String> {
    match s {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("512 or 4096".into()),
    }
}

/// What was transferred.
#[derive(Clone, Debug)]
pub struct Transferred {
    bytes: u64,
    seconds: f64,
    /// Comparison only: address of the first difference, if there is one.
    difference: Option<Option<u64>>,
}

impl Transferred {
    /// Prints it.
    ///
    /// # Errors
    /// When there is a difference.
    pub fn report(&self, args: &TransferArgs) -> Result<(), String> {
        let mb_s = self.bytes as f64 / 1e6 / self.seconds.max(1e-9);
        let mb_s = (mb_s * 10.0).round() / 10.0;
        if args.json {
            let mut out = serde_json::json!({"mb_s": mb_s, "bytes": self.bytes});
            if let Some(difference) = self.difference {
                out["equal"] = difference.is_none().into();
            }
            println!("{out}");
        } else {
            let done = if self.difference.is_some() { "compared" } else { "written" };
            println!("{} bytes {done} in {:.2} s: {mb_s} MB/s", self.bytes, self.seconds);
        }
        match self.difference {
            Some(Some(at)) => Err(format!("{} and the namespace differ at byte {at}", args.file.display())),
            _ => Ok(()),
        }
    }
}

thread_local! {
    /// On the reactor: the queue of the transfer.
    static QUEUE: RefCell<Option<(IoQueue, Rc<NamespaceQueue>)>> = const { RefCell::new(None) };
}

/// What comes back: where, how, and what was read.
type Answer = (u64, Status, SgList);

struct Piece(mpsc::Sender<Answer>);

impl Complete for Piece {
    fn complete(self: Rc<Self>, mut io: Box<Io>, frame: Frame) {
        let data = if io.op == Op::Read { std::mem::take(&mut io.data) } else { SgList::new() };
        // The receiver has gone when an earlier piece failed.
        let _ = self.0.send((frame.lba, io.status(), data));
        io.recycle();
    }
}

struct Image<'a> {
    args: &'a TransferArgs,
    file: File,
    /// Bytes of the file, rounded up to the namespace's blocks.
    bytes: u64,
    block_bytes: u64,
    step: u64,
    cipher: Option<XtsContext>,
    handle: Handle,
    // Dropped in this order.
    _session: Session,
    _runtime: Runtime,
}

impl<'a> Image<'a> {
    fn open(args: &'a TransferArgs) -> Result<Image<'a>, String> {
        let path = args.file.display();
        let file = File::open(&args.file).map_err(|e| format!("{path}: {e}"))?;
        let meta = file.metadata().map_err(|e| format!("{path}: {e}"))?;
        if !meta.is_file() || meta.len() == 0 {
            return Err(format!("{path} is no file with content"));
        }
        let cipher = args.hostcrypt_key.as_ref().map(|key| -> Result<_, String> {
            let bytes = cryptfold_control::keys::read_key(key, &[32, 64]).map_err(|e| e.to_string())?;
            let key = XtsKey::new(&bytes).map_err(|e| format!("{}: {e}", key.display()))?;
            XtsContext::new(&key).map_err(|e| e.to_string())
        });
        let cipher = cipher.transpose()?;
        let runtime = start(&Cores(args.cores.0[..1].to_vec()))?;
        let handle = runtime.handles()[0].clone();
        let session = Session::open(&handle, &args.namespace, 1, args.iodepth)?;
        let block_bytes = u64::from(session.info.block_bytes);
        let unit = block_bytes.max(cipher.as_ref().map_or(0, |_| u64::from(args.sector_size)));
        if args.bs.0 == 0 || !args.bs.0.is_multiple_of(unit) || args.bs.0 > 16 << 20 {
            return Err(format!("--bs {}: a multiple of {unit} up to 16M is possible", args.bs.0));
        }
        let bytes = meta.len().next_multiple_of(unit);
        let room = session.info.blocks.saturating_mul(block_bytes);
        if bytes > room {
            return Err(format!("{path} has {} bytes, the namespace {room}", meta.len()));
        }
        let (connector, info) = (session.connector.clone(), session.info.clone());
        let depth = args.iodepth as u16;
        let opened = handle.block_on(move || async move {
            let queue = connector.io_queue(depth).await?;
            let namespace = queue.namespace(&info);
            QUEUE.set(Some((queue, namespace)));
            Ok(())
        });
        opened.map_err(|e| e.to_string())?.map_err(|e: cryptfold_nvmf_initiator::Error| e.to_string())?;
        let step = args.bs.0;
        Ok(Image {
            args,
            file,
            bytes,
            block_bytes,
            step,
            cipher,
            handle,
            _session: session,
            _runtime: runtime,
        })
    }

    /// The file's bytes at `at`, zeros beyond its end.
    fn read(&self, at: u64, len: usize) -> Result<Buf, String> {
        let mut buf = Buf::alloc(len);
        let bytes = buf.make_mut();
        let mut have = 0;
        while have < len {
            match self.file.read_at(&mut bytes[have..], at + have as u64) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(format!("{}: {e}", self.args.file.display())),
            }
        }
        bytes[have..].fill(0);
        Ok(buf)
    }

    fn crypt(&self, direction: Direction, at: u64, bytes: &mut [u8]) {
        let Some(cipher) = &self.cipher else { return };
        let sector = self.args.sector_size as usize;
        let mut tweak = u128::from(at / TWEAK_UNIT_BYTES);
        for unit in bytes.chunks_exact_mut(sector) {
            cipher.unit_in_place(direction, tweak, unit);
            tweak += u128::from(sector as u64 / TWEAK_UNIT_BYTES);
        }
    }

    fn submit(&self, op: Op, at: u64, len: u64, data: SgList, back: &mpsc::Sender<Answer>) {
        let (lba, blocks, back) = (at / self.block_bytes, len / self.block_bytes, back.clone());
        self.handle.send(move || {
            let queue = QUEUE.with_borrow(|q| q.as_ref().map(|(_, namespace)| namespace.clone()));
            let Some(queue) = queue else { return };
            let mut io = Io::new(op, lba, blocks);
            io.data = data;
            io.push(Rc::new(Piece(back)), at, 0);
            queue.submit(io);
        });
    }

    /// Runs one operation over the image; `before` makes what is sent, `after` takes what came.
    fn run(
        &self,
        op: Op,
        before: impl Fn(u64, u64) -> Result<SgList, String>,
        mut after: impl FnMut(u64, SgList) -> Result<(), String>,
    ) -> Result<(), String> {
        let (back, answers) = mpsc::channel();
        let (mut next, mut under_way) = (0, 0);
        while next < self.bytes || under_way > 0 {
            while next < self.bytes && under_way < self.args.iodepth {
                let len = self.step.min(self.bytes - next);
                let data = before(next, len)?;
                self.submit(op, next, len, data, &back);
                next += len;
                under_way += 1;
            }
            // This side holds a sender, so the channel does not close; the initiator ends every I/O.
            let (at, status, data) = answers.recv().map_err(|e| e.to_string())?;
            under_way -= 1;
            status.ok().map_err(|e| self.failure(op, at, e))?;
            after(at, data)?;
        }
        Ok(())
    }

    /// The connection's end explains more than the I/O's status.
    fn failure(&self, op: Op, at: u64, status: Status) -> String {
        let closed = self.handle.block_on(|| async {
            QUEUE.with_borrow(|q| q.as_ref().and_then(|(queue, _)| queue.check().err()))
        });
        match closed {
            Ok(Some(e)) => e.to_string(),
            _ => format!("{op:?} at byte {at}: {status}"),
        }
    }

    fn flush(&self) -> Result<(), String> {
        let (back, answers) = mpsc::channel();
        self.submit(Op::Flush, 0, 0, SgList::new(), &back);
        let (_, status, _) = answers.recv().map_err(|e| e.to_string())?;
        status.ok().map_err(|e| self.failure(Op::Flush, 0, e))
    }
}

impl Drop for Image<'_> {
    fn drop(&mut self) {
        // A reactor that has stopped has closed the queue itself.
        let _ = self.handle.block_on(|| async { drop(QUEUE.take()) });
    }
}

/// Writes the image and flushes.
///
/// # Errors
/// What went wrong, in one line.
pub fn write(args: &TransferArgs) -> Result<Transferred, String> {
    let image = Image::open(args)?;
    let start = Instant::now();
    let before = |at: u64, len: u64| {
        let mut buf = image.read(at, len as usize)?;
        image.crypt(Direction::Encrypt, at, buf.make_mut());
        Ok(buf.into())
    };
    image.run(Op::Write, before, |_, _| Ok(()))?;
    image.flush()?;
    Ok(Transferred { bytes: image.bytes, seconds: start.elapsed().as_secs_f64(), difference: None })
}

/// Reads the image's length and compares.
///
/// # Errors
/// What went wrong, in one line; a difference is no error here.
pub fn compare(args: &TransferArgs) -> Result<Transferred, String> {
    let image = Image::open(args)?;
    let start = Instant::now();
    let mut difference: Option<u64> = None;
    let after = |at: u64, data: SgList| {
        let mut found = data.to_contiguous();
        let want = image.read(at, found.len())?;
        image.crypt(Direction::Decrypt, at, found.make_mut());
        if found[..] != want[..] {
            let first = found.iter().zip(&want[..]).take_while(|(a, b)| a == b).count() as u64;
            difference = Some(difference.unwrap_or(u64::MAX).min(at + first));
        }
        Ok(())
    };
    image.run(Op::Read, |_, _| Ok(SgList::new()), after)?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Transferred { bytes: image.bytes, seconds, difference: Some(difference) })
}
