//! An association with a controller: the admin queue, what the controller says about itself, and the way to I/O queues.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use cryptfold_bdev::{Op, OpSet};
use cryptfold_nvmf_auth::{Concat, TlsPsk};
use cryptfold_nvmf_spec as spec;
use cryptfold_nvmf_tls::Layer;
use cryptfold_reactor::memory::Buf;
use cryptfold_reactor::sync::mpsc;
use cryptfold_reactor::{self as reactor, Task};
use spec::fabrics::{Cattr, Connect, ConnectData, ConnectResult, PropertyCommand};
use spec::features::{AsyncEvent, AsyncEventConfig, Fid, NumberOfQueues};
use spec::identify::{
    Cns, DescriptorList, IdentifyController, NamespaceId, NamespaceIdentify, NamespaceList, cmic, oncs,
};
use spec::log::{ANA_RGO, AnaGroup, AnaHeader, AnaState, ChangedNamespaces, GetLogPage, Lid};
use spec::nqn::Nqn;
use spec::opcode::Admin;
use spec::pdu::ADMIN_CAPSULE_DATA_BYTES;
use spec::property::{Cap, Cc, Csts, Property};
use spec::{Cid, Cntlid, Nsid, Qid, Sqe};
use uuid::Uuid;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use crate::auth;
use crate::conn::{Conn, Payload};
use crate::dial::{Dial, TcpDial};
use crate::slots::Reply;
use crate::{CloseReason, ConnectOptions, Credentials, Error, IoQueue};

/// Entries of the admin queue.
const ADMIN_ENTRIES: u16 = 32;
/// Between two looks at CSTS.
const READY_POLL: Duration = Duration::from_millis(2);
/// Largest transfer in one command when the controller sets no limit. Bytes.
const MAX_TRANSFER_BYTES: u64 = 1 << 20;
/// In-capsule data that is made use of at most: beyond it, R2T costs less than resending would. Bytes.
const MAX_CAPSULE_BYTES: u32 = 1 << 20;
/// Events kept for whoever asks late.
const EVENTS: usize = 64;
/// Longest answers to wait for: Identify lists of at most so many namespaces. A bound on what a target can make us do.
const MAX_NAMESPACES: usize = 1 << 16;
/// ANA groups of a controller that are looked at, at most.
const MAX_ANA_GROUPS: u64 = 4096;

/// What is needed to open I/O queues, on any reactor.
pub struct Connector {
    options: ConnectOptions,
    dial: Arc<dyn Dial>,
    cntlid: Cntlid,
    /// Entries of an I/O queue: the smaller of what was asked for and what CAP.MQES allows.
    queue_entries: u16,
    capsule_bytes: u32,
    queues: u16,
    next_qid: AtomicU16,
    down: AtomicBool,
}

/// A namespace, as an initiator needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Its identifier.
    pub nsid: Nsid,
    /// Bytes in a block.
    pub block_bytes: u32,
    /// Size in blocks.
    pub blocks: u64,
    /// Operations that the controller has.
    pub ops: OpSet,
    /// Completed writes may be lost until a flush.
    pub write_cache: bool,
    /// Blocks that are never torn.
    pub atomic_blocks: u32,
    /// Deallocated blocks read as zeros.
    pub deallocated_reads_zero: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Data of one command at most, bytes.
    pub max_transfer_bytes: u64,
    /// Blocks in one Copy at most.
    pub max_copy_blocks: u64,
    /// NGUID; zeros = none.
    pub nguid: [u8; 16],
    /// EUI64; zeros = none.
    pub eui64: [u8; 8],
    /// UUID, if it has one.
    pub uuid: Option<Uuid>,
    /// ANA group; 0 = none.
    pub ana_group: u32,
}

impl NamespaceInfo {
    /// Data of one command at most, blocks: 1 to 65,536.
    pub fn max_transfer_blocks(&self) -> u64 {
        (self.max_transfer_bytes / u64::from(self.block_bytes)).clamp(1, 65_536)
    }
}

/// A connected, enabled controller. Lives on the reactor that connected it; dropping it ends the association.
pub struct Controller {
    admin: Rc<Conn>,
    connector: Arc<Connector>,
    identify: Box<IdentifyController>,
    cap: Cap,
    events: RefCell<mpsc::Receiver<AsyncEvent>>,
    /// What has the key that was generated for TLS.
    concatenated: Option<Arc<TcpDial>>,
    _tasks: Vec<Task<()>>,
}

impl Controller {
    /// Connects over TCP, enables the controller and asks what it is.
    ///
    /// # Errors
    /// With the step that failed.
    pub async fn connect(options: &ConnectOptions) -> Result<Controller, Error> {
        options.check()?;
        let dial = Arc::new(TcpDial::new(options));
        if !options.concat {
            return Controller::associate(dial, options).await;
        }
        // Only to generate a key: the association has TLS from its beginning.
        let first = open_queue(&*dial, options, Qid::ADMIN, ADMIN_ENTRIES, Cntlid::DYNAMIC, Concat::New);
        let (admin, _, key) = first.await?;
        admin.close(CloseReason::Local);
        dial.secure(key.ok_or_else(|| no_key(&admin))?);
        let mut controller = Controller::associate(dial.clone(), options).await?;
        controller.concatenated = Some(dial);
        Ok(controller)
    }

    /// As [`Controller::connect`], over streams of the caller's.
    ///
    /// # Errors
    /// With the step that failed; concatenation is not possible.
    pub async fn connect_via(dial: Arc<dyn Dial>, options: &ConnectOptions) -> Result<Controller, Error> {
        options.check()?;
        if options.concat {
            let why = "streams of others can not be given a key".into();
            return Err(Error::Option { option: "concat", why });
        }
        Controller::associate(dial, options).await
    }

    async fn associate(dial: Arc<dyn Dial>, options: &ConnectOptions) -> Result<Controller, Error> {
        let queue = open_queue(&*dial, options, Qid::ADMIN, ADMIN_ENTRIES, Cntlid::DYNAMIC, Concat::None);
        let (admin, cntlid, _) = queue.await?;
        let cap = enable(&admin, options).await?;
        let identify = identify_controller(&admin).await?;
        let discovery = options.subnqn == spec::nqn::DISCOVERY;
        let queues = if discovery || options.io_queues == 0 {
            0
        } else {
            number_of_queues(&admin, options.io_queues).await?
        };
        let entries = u32::try_from(cap.mqes()).map_or(u16::MAX.into(), |m| m + 1);
        let connector = Arc::new(Connector {
            dial,
            cntlid,
            queue_entries: u32::from(options.queue_size).min(entries).max(2) as u16,
            capsule_bytes: identify.capsule_data_bytes().min(MAX_CAPSULE_BYTES),
            queues,
            next_qid: AtomicU16::new(1),
            down: AtomicBool::new(false),
            options: options.clone(),
        });
        let (sender, events) = mpsc::channel(EVENTS);
        let mut tasks = vec![reactor::spawn_local(take_events(Rc::downgrade(&admin), sender))];
        if options.kato_ms > 0 {
            let period = Duration::from_millis(u64::from(options.kato_ms) / 2);
            tasks.push(reactor::spawn_local(keep_alive(Rc::downgrade(&admin), connector.clone(), period)));
        }
        if !discovery {
            configure_events(&admin, &identify).await?;
        }
        let events = RefCell::new(events);
        Ok(Controller { admin, connector, identify, cap, events, concatenated: None, _tasks: tasks })
    }

    /// What opens I/O queues; may go to other reactors.
    pub fn connector(&self) -> &Arc<Connector> {
        &self.connector
    }

    /// What the controller says about itself.
    pub fn identify(&self) -> &IdentifyController {
        &self.identify
    }

    /// Authenticates again on the admin queue, with these credentials (the target's keys may have changed). With concatenation, this
    /// generates another key for the queues that are opened from then on.
    ///
    /// # Errors
    /// With the step that failed; the target ends the association then.
    pub async fn reauthenticate(&self, credentials: &Credentials) -> Result<(), Error> {
        let concat = if self.concatenated.is_some() { Concat::Replace } else { Concat::None };
        let key = auth::authenticate(&self.admin, &self.connector.options, credentials, concat).await?;
        if let Some(dial) = &self.concatenated {
            dial.secure(key.ok_or_else(|| no_key(&self.admin))?);
        }
        Ok(())
    }

    /// The controller's identifier.
    pub fn cntlid(&self) -> Cntlid {
        self.connector.cntlid
    }

    /// With TLS: who makes the records that the admin connection sends, and who opens those that it receives.
    pub fn tls_layers(&self) -> Option<(Layer, Layer)> {
        self.admin.tls_layers()
    }

    /// Why the admin connection ended, if it did. The I/O queues do not survive it.
    pub fn closed(&self) -> Option<CloseReason> {
        self.admin.close_reason()
    }

    /// The next event that the controller reports; `None` when the connection has ended.
    pub async fn next_event(&self) -> Option<AsyncEvent> {
        // One waiter at a time: the receiver is taken out while waiting.
        let (_, empty) = mpsc::channel(1);
        let mut events = self.events.replace(empty);
        let event = events.recv().await;
        self.events.replace(events);
        event
    }

    /// The active namespaces, ascending.
    ///
    /// # Errors
    /// The connection's or the command's.
    pub async fn namespaces(&self) -> Result<Vec<Nsid>, Error> {
        let mut all = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(Nsid::NONE);
            let page: Box<NamespaceList> = identify(&self.admin, Cns::ActiveNamespaces, after).await?;
            let before = all.len();
            for nsid in page.iter() {
                let previous = all.last().copied().unwrap_or(Nsid::NONE);
                if nsid <= previous || !nsid.is_specific() || all.len() >= MAX_NAMESPACES {
                    let why = format!("namespace {nsid} follows {previous}");
                    return Err(Error::Unsupported { what: "list of active namespaces", why });
                }
                all.push(nsid);
            }
            if all.len() - before < spec::identify::MAX_NAMESPACES {
                return Ok(all);
            }
        }
    }

    /// What a namespace is.
    ///
    /// # Errors
    /// The connection's or the command's; [`Error::Unsupported`] for a namespace that is not active or has a format that
    /// is no plain blocks of 512 to 65,536 bytes.
    pub async fn namespace(&self, nsid: Nsid) -> Result<NamespaceInfo, Error> {
        let id: Box<NamespaceIdentify> = identify(&self.admin, Cns::Namespace, nsid).await?;
        let unsupported = |why: String| Error::Unsupported { what: "namespace", why };
        let blocks = id.nsze.get();
        if blocks == 0 {
            return Err(unsupported(format!("{nsid} is not active in {}", self.connector.options.subnqn)));
        }
        let block_bytes = id.block_bytes().filter(|b| *b <= 1 << 16);
        let block_bytes = block_bytes
            .ok_or_else(|| unsupported(format!("{nsid} has blocks of 2^{} bytes", id.format().lbads)))?;
        if id.format().ms.get() != 0 {
            return Err(unsupported(format!("{nsid} has {} bytes of metadata", id.format().ms.get())));
        }
        if blocks.checked_mul(u64::from(block_bytes)).is_none() {
            return Err(unsupported(format!("{nsid} claims {blocks} blocks of {block_bytes} bytes")));
        }
        let mdts = self.identify.max_transfer_bytes(self.cap.mpsmin() as u32);
        let copy = u64::from(id.mssrl.get()).min(u64::from(id.mcl.get())).min(65_536);
        let atomic = if id.nsfeat & spec::identify::nsfeat::ATOMICS != 0 {
            id.nawupf.get()
        } else {
            self.identify.awupf.get()
        };
        let atomic = id.aligned_atomic_blocks(u32::from(atomic) + 1);
        Ok(NamespaceInfo {
            nsid,
            block_bytes,
            blocks,
            ops: self.operations(copy > 0),
            write_cache: self.identify.vwc & 1 != 0,
            atomic_blocks: atomic,
            deallocated_reads_zero: id.dlfeat & 7 == 1,
            read_only: id.nsattr & 1 != 0,
            max_transfer_bytes: mdts.unwrap_or(MAX_TRANSFER_BYTES).min(MAX_TRANSFER_BYTES),
            max_copy_blocks: copy,
            nguid: id.nguid,
            eui64: id.eui64,
            uuid: self.namespace_uuid(nsid).await?,
            ana_group: id.anagrpid.get(),
        })
    }

    /// The UUID among a namespace's identifiers. A controller that has no list of them is asked no further.
    async fn namespace_uuid(&self, nsid: Nsid) -> Result<Option<Uuid>, Error> {
        match identify::<DescriptorList>(&self.admin, Cns::NamespaceDescriptors, nsid).await {
            Ok(list) => Ok(list.iter().find_map(|id| match id {
                NamespaceId::Uuid(bytes) => Some(Uuid::from_bytes(bytes)),
                _ => None,
            })),
            Err(Error::Status { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The states of the ANA groups by identifier; empty where the controller does not report them. Reading them lets
    /// the next change be told.
    ///
    /// # Errors
    /// The connection's or the command's; [`Error::Unsupported`] for a page that makes no sense.
    pub async fn ana_states(&self) -> Result<BTreeMap<u32, AnaState>, Error> {
        if self.identify.cmic & cmic::ANA == 0 {
            return Ok(BTreeMap::new());
        }
        let unsupported = |why: String| Error::Unsupported { what: "ANA log page", why };
        let groups = u64::from(self.identify.nanagrpid.get());
        if groups > MAX_ANA_GROUPS {
            return Err(unsupported(format!("{groups} groups; {MAX_ANA_GROUPS} are taken")));
        }
        let header = size_of::<AnaHeader>();
        let bytes = header as u64 + groups * size_of::<AnaGroup>() as u64;
        let page = self.log_page(Lid::Ana, ANA_RGO, 0, bytes).await?;
        let (head, rest) = AnaHeader::read_from_prefix(&page)
            .map_err(|_| unsupported(format!("{} bytes; {header} are the least", page.len())))?;
        let mut states = BTreeMap::new();
        for group in rest.chunks_exact(size_of::<AnaGroup>()).take(usize::from(head.ngrps.get())) {
            let Ok(group) = AnaGroup::read_from_bytes(group) else { continue };
            let state = AnaState::from_u8(group.state & 0xf).ok_or_else(|| {
                unsupported(format!("group {} is in state {:#x}", group.grpid, group.state))
            })?;
            states.insert(group.grpid.get(), state);
        }
        Ok(states)
    }

    /// Takes note of the list of changed namespaces, so that the next change is told.
    ///
    /// # Errors
    /// The connection's or the command's.
    pub async fn acknowledge_changes(&self) -> Result<(), Error> {
        let size = size_of::<ChangedNamespaces>() as u64;
        self.log_page(Lid::ChangedNamespaces, 0, 0, size).await.map(drop)
    }

    /// So many bytes of a log page, from `offset`; both multiples of 4.
    pub(crate) async fn log_page(
        &self,
        lid: Lid,
        lsp: u8,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, Error> {
        let request = GetLogPage::new(lid, offset, bytes).ok_or_else(|| Error::Unsupported {
            what: "log page",
            why: format!("{bytes} bytes from {offset}; multiples of 4 are needed"),
        })?;
        let sqe = GetLogPage { lsp, ..request }.to_sqe(Cid(0), Nsid::NONE);
        let reply = command(&self.admin, "Get Log Page", sqe, Payload::In(bytes as u32)).await?;
        Ok(reply.data.to_contiguous().to_vec())
    }

    fn operations(&self, copy: bool) -> OpSet {
        let has = |bit: u16| self.identify.oncs.get() & bit != 0;
        let mut ops = OpSet::of(&[Op::Read, Op::Write, Op::Flush]);
        for (on, op) in [
            (has(oncs::COMPARE), Op::Compare),
            (has(oncs::DSM), Op::Unmap),
            (has(oncs::WRITE_ZEROES), Op::WriteZeroes),
            (has(oncs::WRITE_UNCORRECTABLE), Op::WriteUncorrectable),
            (has(oncs::COPY) && copy, Op::Copy),
            (self.identify.fuses.get() & 1 != 0, Op::CompareAndWrite),
        ] {
            if on {
                ops = ops.with(op);
            }
        }
        ops
    }

    /// Opens an I/O queue on the current reactor. See [`Connector::io_queue`].
    ///
    /// # Errors
    /// As there.
    pub async fn io_queue(&self, depth: u16) -> Result<IoQueue, Error> {
        self.connector.clone().io_queue(depth).await
    }

    /// Tells the controller that this host shuts down, waits until it is ready for that, and ends the association.
    /// Dropping the controller instead is legal, and unfriendly.
    pub async fn shutdown(self) {
        self.connector.down.store(true, Ordering::Relaxed);
        let limit = self.connector.options.connect_timeout;
        let quietly = async {
            let cc = get(&self.admin, Property::Cc).await?;
            set(&self.admin, Property::Cc, u64::from(Cc(cc as u32).with_shn(0b01).0)).await?;
            loop {
                let csts = Csts(get(&self.admin, Property::Csts).await? as u32);
                if csts.shst() == 0b10 || csts.cfs() == 1 {
                    return Ok::<(), Error>(());
                }
                reactor::sleep(READY_POLL).await;
            }
        };
        match reactor::timeout(limit, quietly).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::debug!("shutdown: {e}"),
            Err(_) => tracing::debug!("shutdown: {}: not finished in time", self.admin.label()),
        }
        self.admin.close(CloseReason::Local);
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.connector.down.store(true, Ordering::Relaxed);
        self.admin.close(CloseReason::Local);
    }
}

impl Connector {
    /// I/O queues that the controller grants.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Entries of a queue at most; one less can be under way.
    pub fn queue_entries(&self) -> u16 {
        self.queue_entries
    }

    /// Opens the next I/O queue, with up to `depth` commands under way, on the current reactor.
    ///
    /// # Errors
    /// When the association has ended, all granted queues are open already, or a step fails.
    pub async fn io_queue(self: Arc<Self>, depth: u16) -> Result<IoQueue, Error> {
        let address = self.options.address();
        if self.down.load(Ordering::Relaxed) {
            return Err(Error::Closed { address, reason: CloseReason::Local });
        }
        let qid = self
            .next_qid
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |q| (q <= self.queues).then_some(q + 1));
        let Ok(qid) = qid else {
            let why = format!("{address} grants {}, and all are open", self.queues);
            return Err(Error::Unsupported { what: "I/O queues", why });
        };
        let entries = depth.saturating_add(1).min(self.queue_entries).max(2);
        let queue = open_queue(&*self.dial, &self.options, Qid(qid), entries, self.cntlid, Concat::None);
        let (conn, ..) = queue.await?;
        conn.set_capsule_bytes(self.capsule_bytes);
        Ok(IoQueue::new(conn, entries - 1, self))
    }
}

/// Whoever was to generate a key has one when it is done.
fn no_key(conn: &Conn) -> Error {
    Error::Unsupported { what: "authentication", why: format!("{}: it has generated no key", conn.label()) }
}

/// Connects a queue: stream, greeting, Fabrics Connect, authentication. Returns what it has generated, if it was to.
async fn open_queue(
    dial: &dyn Dial,
    options: &ConnectOptions,
    qid: Qid,
    entries: u16,
    cntlid: Cntlid,
    concat: Concat,
) -> Result<(Rc<Conn>, Cntlid, Option<TlsPsk>), Error> {
    let wire = dial.dial().await?;
    let label = match qid {
        Qid::ADMIN => format!("{} admin queue", options.address()),
        Qid(n) => format!("{} queue {n}", options.address()),
    };
    let conn = Conn::open(wire, label, usize::from(entries) - 1, options).await?;
    let kato = if qid.is_admin() { options.kato_ms } else { 0 };
    let mut connect = Connect::new(Cid(0), qid, entries - 1, kato);
    // Slots bound what is under way here, not SQHD; only without flow control may C2HData stand for the response.
    connect.cattr = Cattr::default().with_no_sq_flow_control(u8::from(!qid.is_admin())).0;
    let sqe = Sqe::from_view(&connect);
    let nqn = |text| Nqn::parse(text).map_err(|e| Error::Option { option: "nqn", why: e.to_string() });
    let data = ConnectData::new(options.hostid, cntlid, nqn(&options.subnqn)?, nqn(&options.hostnqn)?);
    let payload = Payload::Out(Buf::from_slice(data.as_bytes()).into());
    let limit = options.connect_timeout;
    let reply = match reactor::timeout(limit, conn.call(sqe, payload, false)).await {
        Ok(reply) => reply?,
        Err(_) => {
            let (address, what) = (conn.label().to_owned(), "Connect");
            return Err(Error::Timeout { address, what, seconds: limit.as_secs() });
        }
    };
    let status = reply.cqe.status();
    if !status.is_success() {
        return Err(Error::Status {
            what: format!("{}: Connect to {}", conn.label(), options.subnqn),
            status,
        });
    }
    let result = ConnectResult(reply.cqe.dw0.get());
    let not_configured = |what| {
        let why = format!("{} requires {what}, which is not configured", options.subnqn);
        Err(Error::Unsupported { what: "Connect", why })
    };
    // With concatenation, the target has proven itself when the key was generated, if it was asked to (a controller key).
    let asks = |c: &Credentials| concat != Concat::None || c.controller.is_some() && !options.concat;
    let key = match &options.credentials {
        _ if result.ascr() == 1 && concat == Concat::None => {
            return not_configured("secure channel concatenation");
        }
        None if result.atr() == 1 => return not_configured("authentication"),
        Some(c) if result.atr() == 1 || asks(c) => auth::authenticate(&conn, options, c, concat).await?,
        _ => None,
    };
    Ok((conn, Cntlid(result.cntlid() as u16), key))
}

async fn command(conn: &Conn, what: &str, sqe: Sqe, payload: Payload) -> Result<Reply, Error> {
    let reply = conn.call(sqe, payload, true).await?;
    match reply.cqe.status() {
        s if s.is_success() => Ok(reply),
        status => Err(Error::Status { what: format!("{}: {what}", conn.label()), status }),
    }
}

async fn get(conn: &Conn, property: Property) -> Result<u64, Error> {
    let sqe = Sqe::from_view(&PropertyCommand::get(Cid(0), property));
    let reply = command(conn, "Property Get", sqe, Payload::Raw).await?;
    let value = reply.cqe.result().get();
    Ok(if property.size_bytes() == 4 { value & 0xffff_ffff } else { value })
}

async fn set(conn: &Conn, property: Property, value: u64) -> Result<(), Error> {
    let sqe = Sqe::from_view(&PropertyCommand::set(Cid(0), property, value));
    command(conn, "Property Set", sqe, Payload::Raw).await.map(drop)
}

/// Enables the controller and waits until it is ready, as long as CAP.TO allows.
async fn enable(conn: &Conn, options: &ConnectOptions) -> Result<Cap, Error> {
    let cap = Cap(get(conn, Property::Cap).await?);
    let cc = Cc::default().with_en(1).with_iosqes(6).with_iocqes(4).with_mps(cap.mpsmin() as u32);
    set(conn, Property::Cc, u64::from(cc.0)).await?;
    let limit = Duration::from_millis(500 * cap.to().max(1)).max(options.connect_timeout);
    let ready = async {
        loop {
            let csts = Csts(get(conn, Property::Csts).await? as u32);
            if csts.cfs() == 1 {
                let why = "it reports a fatal status (CSTS.CFS) when enabled".into();
                return Err(Error::Unsupported { what: "controller", why });
            }
            if csts.rdy() == 1 {
                return Ok(());
            }
            reactor::sleep(READY_POLL).await;
        }
    };
    match reactor::timeout(limit, ready).await {
        Ok(result) => result.map(|()| cap),
        Err(_) => Err(Error::Timeout {
            address: conn.label().to_owned(),
            what: "enabling the controller",
            seconds: limit.as_secs(),
        }),
    }
}

async fn identify<T: FromBytes>(conn: &Conn, cns: Cns, nsid: Nsid) -> Result<Box<T>, Error> {
    let mut sqe = Sqe::admin(Admin::Identify, Cid(0), nsid);
    sqe.cdw10 = U32::new(cns as u32);
    let reply = command(conn, "Identify", sqe, Payload::In(spec::identify::BYTES as u32)).await?;
    let data = reply.data.to_contiguous();
    let short =
        |_| Error::Unsupported { what: "Identify", why: format!("{} bytes, 4096 expected", data.len()) };
    T::read_from_bytes(&data).map(Box::new).map_err(short)
}

async fn identify_controller(conn: &Conn) -> Result<Box<IdentifyController>, Error> {
    identify(conn, Cns::Controller, Nsid::NONE).await
}

/// Asks for `wanted` I/O queues; how many are granted.
async fn number_of_queues(conn: &Conn, wanted: u16) -> Result<u16, Error> {
    let ask = u32::from(wanted) - 1;
    let mut sqe = Sqe::admin(Admin::SetFeatures, Cid(0), Nsid::NONE);
    sqe.cdw10 = U32::new(Fid::NumberOfQueues as u32);
    sqe.cdw11 = U32::new(NumberOfQueues::default().with_nsq(ask).with_ncq(ask).0);
    let reply = command(conn, "Set Features (Number of Queues)", sqe, Payload::Nothing).await?;
    Ok(NumberOfQueues(reply.cqe.dw0.get()).pairs().min(u32::from(wanted)) as u16)
}

/// Turns on the notices that the controller has and this host understands.
async fn configure_events(conn: &Conn, id: &IdentifyController) -> Result<(), Error> {
    let known = AsyncEventConfig::default().with_namespace_attributes(1).with_ana_change(1);
    let config = known.0 & id.oaes.get();
    if config == 0 {
        return Ok(());
    }
    let mut sqe = Sqe::admin(Admin::SetFeatures, Cid(0), Nsid::NONE);
    sqe.cdw10 = U32::new(Fid::AsyncEventConfig as u32);
    sqe.cdw11 = U32::new(config);
    command(conn, "Set Features (Asynchronous Event Configuration)", sqe, Payload::Nothing).await.map(drop)
}

/// Keeps one Asynchronous Event Request with the controller.
async fn take_events(admin: Weak<Conn>, events: mpsc::Sender<AsyncEvent>) {
    loop {
        let Some(conn) = admin.upgrade() else { return };
        let sqe = Sqe::admin(Admin::AsyncEventRequest, Cid(0), Nsid::NONE);
        let Ok(reply) = conn.call(sqe, Payload::Nothing, false).await else { return };
        if !reply.cqe.status().is_success() {
            tracing::debug!("{}: no events: {}", conn.label(), reply.cqe.status());
            return;
        }
        // When nobody takes them, later events are dropped: they say that something changed, not what.
        let _ = events.try_send(AsyncEvent(reply.cqe.dw0.get()));
    }
}

async fn keep_alive(admin: Weak<Conn>, connector: Arc<Connector>, period: Duration) {
    loop {
        reactor::sleep(period).await;
        let Some(conn) = admin.upgrade() else { return };
        let sqe = Sqe::admin(Admin::KeepAlive, Cid(0), Nsid::NONE);
        // Half of the timeout has passed since the last one; the other half is there for the answer.
        let answer = reactor::timeout(period, conn.call(sqe, Payload::Nothing, true)).await;
        let reason = match answer {
            Ok(Ok(reply)) if reply.cqe.status().is_success() => continue,
            Ok(Ok(_)) => CloseReason::Answer("Keep Alive was refused"),
            Ok(Err(_)) => CloseReason::Local,
            Err(_) => CloseReason::Timeout(period.as_secs()),
        };
        connector.down.store(true, Ordering::Relaxed);
        conn.close(reason);
        return;
    }
}

const _: () = assert!(size_of::<ConnectData>() <= ADMIN_CAPSULE_DATA_BYTES as usize);
