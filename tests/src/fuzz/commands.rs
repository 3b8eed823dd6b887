//! Random commands, and what the specification says must become of some of them: a model of what may not succeed.

use cryptfold_bdev_sim::Rng;
use cryptfold_nvmf_spec::fabrics::{Authentication, Connect, ConnectData, Disconnect, PropertyCommand};
use cryptfold_nvmf_spec::opcode::{Admin, FABRICS, Fabrics, Io};
use cryptfold_nvmf_spec::property::Property;
use cryptfold_nvmf_spec::sqe::{Fuse, Psdt, RwControl};
use cryptfold_nvmf_spec::{Cid, Cntlid, Nqn, Nsid, Qid, Sgl, Sqe, auth};
use zerocopy::IntoBytes;

/// A namespace of the subsystem that is fuzzed; its identifier is its place in the list, from 1.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Size, blocks.
    pub blocks: u64,
    /// Bytes in a block.
    pub block_bytes: u32,
}

/// Largest transfer that the target takes, bytes.
pub const MAX_TRANSFER_BYTES: u32 = 131_072;
/// Data of an I/O capsule, bytes.
pub const IO_CAPSULE_BYTES: u32 = 4096;
/// Data of an admin or Fabrics capsule, bytes.
pub const ADMIN_CAPSULE_BYTES: u32 = 8192;

/// A command with its data.
#[derive(Clone, Debug)]
pub struct Command {
    /// What is sent.
    pub sqe: Sqe,
    /// In the capsule.
    pub capsule: Vec<u8>,
    /// For requests: as many bytes as the descriptor says, up to the largest transfer.
    pub payload: Vec<u8>,
    /// Why it must not succeed.
    pub must_fail: Option<&'static str>,
}

impl Command {
    fn new(sqe: Sqe) -> Command {
        Command { sqe, capsule: Vec::new(), payload: Vec::new(), must_fail: None }
    }
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.below(from.len() as u64) as usize]
}

/// Small, near a power of two, or anything.
fn number(rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 => rng.below(8) as u32,
        1 => (1u32 << rng.below(32)).wrapping_sub(rng.below(2) as u32),
        2 => rng.magnitude(u64::from(u32::MAX)) as u32,
        _ => rng.next() as u32,
    }
}

fn nsid(rng: &mut Rng, namespaces: &[Geometry]) -> u32 {
    match rng.below(20) {
        0 => 0,
        1 => u32::MAX,
        2 => number(rng),
        3 => namespaces.len() as u32 + 1,
        _ => rng.range(1, namespaces.len() as u64) as u32,
    }
}

/// Puts data where the descriptor says it is: right most of the time, else whatever.
fn describe(rng: &mut Rng, command: &mut Command, data: Vec<u8>, capsule_limit: u32) {
    let len = data.len() as u32;
    command.payload = data;
    command.sqe.sgl = match rng.below(24) {
        0 => Sgl::transport(number(rng)),
        1 => Sgl::in_capsule(u64::from(number(rng)), number(rng)),
        2 => {
            let mut sgl = Sgl::transport(len);
            sgl.id = rng.next() as u8;
            sgl
        }
        3 => Sgl::from_prps(rng.next(), rng.next()),
        4 => Sgl::data_block(rng.next(), len),
        5..14 if len > 0 && len <= capsule_limit => {
            command.capsule = std::mem::take(&mut command.payload);
            Sgl::in_capsule(0, len)
        }
        _ => Sgl::transport(len),
    };
    if rng.one_in(40) {
        // Data that nobody announced.
        command.capsule = vec![0x5a; rng.range(1, u64::from(capsule_limit)) as usize];
    }
    if rng.one_in(30) {
        command.sqe.set_psdt(pick(rng, &[Psdt::Prp, Psdt::SglMetadataSegment, Psdt::Reserved]));
    }
    let asked = command.sqe.sgl.length.get().min(MAX_TRANSFER_BYTES) as usize;
    command.payload.resize(asked, 0xa5);
}

fn scramble(rng: &mut Rng, sqe: &mut Sqe) {
    for dword in [&mut sqe.cdw2, &mut sqe.cdw3, &mut sqe.cdw13, &mut sqe.cdw14, &mut sqe.cdw15] {
        if rng.one_in(6) {
            *dword = number(rng).into();
        }
    }
    if rng.one_in(25) {
        sqe.flags |= (rng.next() as u8) & 0x3f;
    }
}

/// Any command for an I/O queue.
pub fn io(rng: &mut Rng, namespaces: &[Geometry]) -> Command {
    let opcode = if rng.one_in(8) { rng.next() as u8 } else { pick(rng, Io::ALL) as u8 };
    if opcode == FABRICS {
        return fabrics(rng, false);
    }
    let mut c = Command::new(Sqe::io(Io::Flush, Cid(0), Nsid(nsid(rng, namespaces))));
    c.sqe.opcode = opcode;
    let ns = (c.sqe.nsid.get() as usize).checked_sub(1).and_then(|n| namespaces.get(n).copied());
    let data = match Io::from_u8(opcode) {
        Some(
            Io::ReservationRegister | Io::ReservationAcquire | Io::ReservationRelease | Io::ReservationReport,
        ) => reservation(rng, &mut c),
        Some(Io::DatasetManagement | Io::Copy) => ranges(rng, &mut c, ns),
        _ => blocks(rng, &mut c, ns),
    };
    scramble(rng, &mut c.sqe);
    if rng.one_in(12) {
        c.sqe.set_fuse(pick(rng, &[Fuse::First, Fuse::Second, Fuse::Reserved]));
    }
    describe(rng, &mut c, data, IO_CAPSULE_BYTES);
    c.must_fail = io_must_fail(&c.sqe, ns);
    c
}

/// A reservation command: few keys and types, so that hosts meet.
fn reservation(rng: &mut Rng, c: &mut Command) -> Vec<u8> {
    let any = number(rng);
    let cdw10 = match rng.below(5) {
        0 => any,
        1 => rng.below(64) as u32,
        // Action in bits 2:0, type in bits 15:8, what to do with persistence in bits 31:30.
        _ => (rng.below(4) | rng.range(1, 6) << 8 | rng.below(2) << 3 | rng.below(4) << 30) as u32,
    };
    // Mostly a Release clears, or there would soon be a reservation on everything.
    let clear = c.sqe.opcode == Io::ReservationRelease as u8 && !rng.one_in(4);
    c.sqe.cdw10 = if clear { 1 } else { cdw10 }.into();
    c.sqe.cdw11 = rng.below(3).try_into().unwrap_or(0u32).into();
    if c.sqe.opcode == Io::ReservationReport as u8 {
        c.sqe.cdw10 = pick(rng, &[0, 5, 15, 1023, any & 0xffff]).into();
        let asked = c.sqe.cdw10.get().saturating_add(1).saturating_mul(4);
        return vec![0; asked.min(2 * MAX_TRANSFER_BYTES) as usize];
    }
    let keys = [rng.below(3), rng.below(3)].map(u64::to_le_bytes).concat();
    let len = if rng.one_in(10) { rng.below(64) as usize } else { keys.len() };
    let mut data = keys;
    data.resize(len, 0);
    data
}

/// Ranges of Dataset Management and Copy.
fn ranges(rng: &mut Rng, c: &mut Command, ns: Option<Geometry>) -> Vec<u8> {
    let count = if rng.one_in(6) { rng.range(1, 256) } else { rng.range(1, 6) };
    let size = ns.map_or(1000, |n| n.blocks);
    let mut data = Vec::new();
    for _ in 0..count {
        let lba = if rng.one_in(20) { rng.next() } else { rng.below(size) };
        let blocks = rng.magnitude(64) as u32;
        if c.sqe.opcode == Io::Copy as u8 {
            let mut raw = [0u8; 32];
            raw[8..16].copy_from_slice(&lba.to_le_bytes());
            raw[16..18].copy_from_slice(&(blocks as u16).to_le_bytes());
            data.extend(raw);
        } else {
            data.extend(number(rng).to_le_bytes());
            data.extend(blocks.to_le_bytes());
            data.extend(lba.to_le_bytes());
        }
    }
    if c.sqe.opcode == Io::Copy as u8 {
        c.sqe.set_slba(rng.below(size + 8));
        c.sqe.cdw12 = if rng.one_in(10) { number(rng) } else { count as u32 - 1 }.into();
    } else {
        c.sqe.cdw10 = if rng.one_in(10) { number(rng) } else { count as u32 - 1 }.into();
        let any = number(rng);
        c.sqe.cdw11 = pick(rng, &[4, 4, 4, 0, 1, any]).into();
    }
    data
}

/// A range of blocks, and data as long as it.
fn blocks(rng: &mut Rng, c: &mut Command, ns: Option<Geometry>) -> Vec<u8> {
    let ns = ns.unwrap_or(Geometry { blocks: 1000, block_bytes: 512 });
    let most = u64::from(MAX_TRANSFER_BYTES / ns.block_bytes);
    let count = match rng.below(10) {
        0 => rng.range(1, 65_536),
        1 => rng.range(1, most),
        _ => rng.magnitude(16) + 1,
    };
    let lba = match rng.below(12) {
        0 => rng.next(),
        1 => ns.blocks - rng.below(3),
        2 => u64::MAX - rng.below(70_000),
        _ => rng.below(ns.blocks),
    };
    let control = if rng.one_in(4) { RwControl(rng.next() as u32) } else { RwControl(0) };
    c.sqe.set_rw(lba, count as u32, control);
    let moves = matches!(Io::from_u8(c.sqe.opcode), Some(Io::Read | Io::Write | Io::Compare));
    let bytes = count * u64::from(ns.block_bytes);
    if !moves || bytes > u64::from(2 * MAX_TRANSFER_BYTES) {
        return Vec::new();
    }
    // Few contents, so that the pool's volumes share.
    vec![rng.below(7) as u8; bytes as usize]
}

/// Why this I/O command must not succeed.
fn io_must_fail(sqe: &Sqe, ns: Option<Geometry>) -> Option<&'static str> {
    let Some(opcode) = Io::from_u8(sqe.opcode) else { return Some("reserved opcode") };
    let Some(ns) = ns else {
        // Flush may name all namespaces.
        return (opcode != Io::Flush).then_some("no such namespace");
    };
    let ranged = matches!(
        opcode,
        Io::Read | Io::Write | Io::Compare | Io::WriteZeroes | Io::Verify | Io::WriteUncorrectable
    );
    let end = sqe.slba().checked_add(sqe.block_count().into());
    if ranged && end.is_none_or(|e| e > ns.blocks) {
        return Some("blocks beyond the end");
    }
    if opcode == Io::Copy && sqe.slba() >= ns.blocks {
        return Some("a destination beyond the end");
    }
    if !matches!(opcode, Io::Read | Io::Write | Io::Compare) {
        return None;
    }
    let bytes = u64::from(sqe.block_count()) * u64::from(ns.block_bytes);
    match sqe.sgl.id {
        _ if sqe.psdt() != Psdt::Sgl => Some("no SGL"),
        0x5a => None,
        0x01 if opcode != Io::Read => None,
        _ => Some("a descriptor that this transport does not have"),
    }
    .or((u64::from(sqe.sgl.length.get()) != bytes).then_some("a length that is not the blocks'"))
    .or((bytes > u64::from(MAX_TRANSFER_BYTES)).then_some("more than the largest transfer"))
}

/// Any command for an admin queue. `enabled`: of an enabled controller.
pub fn admin(rng: &mut Rng, namespaces: &[Geometry], enabled: bool) -> Command {
    let opcode = if rng.one_in(8) { rng.next() as u8 } else { pick(rng, Admin::ALL) as u8 };
    if opcode == FABRICS {
        return fabrics(rng, true);
    }
    let mut c = Command::new(Sqe::admin(Admin::Identify, Cid(0), Nsid(nsid(rng, namespaces))));
    c.sqe.opcode = opcode;
    let known = Admin::from_u8(opcode);
    let any = rng.below(256) as u32;
    (c.sqe.cdw10, c.sqe.cdw11, c.sqe.cdw12) = match known {
        Some(Admin::Identify) => {
            (pick(rng, &[0, 1, 2, 3, 0x10, 0x13, 0x1c, any]).into(), number(rng).into(), 0.into())
        }
        Some(Admin::GetLogPage) => {
            let lid = pick(rng, &[1, 2, 3, 4, 5, 6, 0xc, 0x70, 0x80, any]);
            let dwords = pick(rng, &[0, 15, 127, 1023, 0xffff]);
            (
                ((dwords << 16) | lid).into(),
                rng.below(2).try_into().unwrap_or(0u32).into(),
                number(rng).into(),
            )
        }
        Some(Admin::GetFeatures | Admin::SetFeatures) => {
            let fid = pick(rng, &[1, 2, 4, 5, 7, 0xb, 0xf, 0x16, 0x81, 0x82, 0x83, 0x84, any]);
            let value = match fid {
                // Write protection that stays would leave the others nothing to do.
                0x84 => rng.one_in(20).into(),
                _ => number(rng),
            };
            (fid.into(), value.into(), number(rng).into())
        }
        // An I/O queue's and one's own commands.
        Some(Admin::Abort) => {
            ((rng.below(3) as u32 | (rng.below(64) as u32) << 16).into(), 0.into(), 0.into())
        }
        _ => (number(rng).into(), number(rng).into(), number(rng).into()),
    };
    scramble(rng, &mut c.sqe);
    let room = pick(rng, &[0, 16, 64, 512, 4096, 4096, 4096, 8192]);
    let mut data = vec![0; room];
    rng.fill(&mut data);
    describe(rng, &mut c, data, ADMIN_CAPSULE_BYTES);
    c.must_fail = if !enabled {
        Some("the controller is not enabled")
    } else if known.is_none() {
        Some("reserved opcode")
    } else {
        None
    };
    c
}

/// Any Fabrics command on a queue that exists.
pub fn fabrics(rng: &mut Rng, is_admin: bool) -> Command {
    let kind = if rng.one_in(6) { rng.next() as u8 } else { pick(rng, Fabrics::ALL) as u8 };
    let property = pick(
        rng,
        &[Property::Cap, Property::Vs, Property::Cc, Property::Csts, Property::Nssr, Property::Crto],
    );
    let mut c = Command::new(match Fabrics::from_u8(kind) {
        Some(Fabrics::PropertyGet) => Sqe::from_view(&PropertyCommand::get(Cid(0), property)),
        Some(Fabrics::PropertySet) => {
            let value = if rng.one_in(2) { 0x0046_0001 } else { u64::from(number(rng)) };
            Sqe::from_view(&PropertyCommand::set(Cid(0), property, value))
        }
        Some(Fabrics::AuthenticationSend) => {
            Sqe::from_view(&Authentication::send(Cid(0), number(rng) & 0x1fff))
        }
        Some(Fabrics::AuthenticationReceive) => {
            Sqe::from_view(&Authentication::receive(Cid(0), number(rng) & 0x1fff))
        }
        Some(Fabrics::Disconnect) => Sqe::from_view(&Disconnect::new(Cid(0))),
        Some(Fabrics::Connect) | None => {
            let mut sqe = Sqe::new(FABRICS);
            sqe.nsid = u32::from(kind).into();
            sqe.set_psdt(Psdt::Sgl);
            sqe
        }
    });
    if rng.one_in(3) {
        c.sqe.cdw10 = number(rng).into();
        c.sqe.cdw12 = number(rng).into();
    }
    let asked = c.sqe.sgl.length.get().min(MAX_TRANSFER_BYTES) as usize;
    c.payload = vec![0; asked];
    c.must_fail = match Fabrics::from_u8(kind) {
        Some(Fabrics::PropertyGet | Fabrics::PropertySet) if !is_admin => Some("properties of an I/O queue"),
        Some(Fabrics::Connect) => Some("a second Connect"),
        None => Some("reserved Fabrics type"),
        _ => None,
    };
    c
}

/// Connect, right.
pub fn connect(subnqn: &str, host: &Identity, qid: u16, entries: u16, cntlid: Cntlid) -> Option<Command> {
    let names = (Nqn::parse(subnqn).ok()?, Nqn::parse(&host.nqn).ok()?);
    let data = ConnectData::new(host.id, cntlid, names.0, names.1);
    let sqe = Sqe::from_view(&Connect::new(Cid(0), Qid(qid), entries - 1, 0));
    Some(Command { capsule: data.as_bytes().to_vec(), ..Command::new(sqe) })
}

/// Who a host says it is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Name.
    pub nqn: String,
    /// Identifier.
    pub id: [u8; 16],
}

/// A few bits or a field of a right Connect changed.
pub fn damage_connect(rng: &mut Rng, c: &mut Command) {
    for _ in 0..rng.range(1, 3) {
        match rng.below(7) {
            0 => c.sqe.cdw10 = number(rng).into(),
            1 => c.sqe.cdw11 = number(rng).into(),
            2 => {
                let at = rng.below(c.capsule.len() as u64) as usize;
                c.capsule[at] ^= 1 << rng.below(8);
            }
            // Names without an end, and with bytes that no name has.
            3 => c.capsule.iter_mut().skip(256).take(256).for_each(|b| *b = b'x'),
            4 => {
                let byte = rng.next() as u8;
                c.capsule.iter_mut().skip(512).take(256).for_each(|b| *b = byte);
            }
            5 => c.sqe.sgl = Sgl::in_capsule(rng.below(2000), rng.below(2000) as u32),
            _ => c.capsule.truncate(rng.range(1, 1024) as usize),
        }
    }
}

/// A message of DH-HMAC-CHAP, right, damaged or random.
pub fn auth_message(rng: &mut Rng) -> Command {
    use auth::{DhGroup, Failure, HashId};
    if rng.one_in(3) {
        let mut c = Command::new(Sqe::from_view(&Authentication::receive(Cid(0), 4096)));
        if rng.one_in(4) {
            c.sqe = Sqe::from_view(&Authentication::receive(Cid(0), number(rng) & 0x1fff));
        }
        return c;
    }
    let mut message = match rng.below(6) {
        0..3 => auth::negotiate(
            3,
            pick(rng, auth::Concat::ALL),
            HashId::ALL,
            pick(rng, &[&[DhGroup::Null][..], DhGroup::ALL]),
        ),
        3 => auth::success2(3),
        4 => auth::failure(true, 3, Failure::Failed),
        _ => {
            let response = [0x11; 32];
            auth::Reply { t_id: 3, seqnum: 1, response: &response, challenge: None, public: &[] }.build()
        }
    };
    if rng.one_in(3) && !message.is_empty() {
        let at = rng.below(message.len() as u64) as usize;
        message[at] ^= 1 << rng.below(8);
    }
    if rng.one_in(6) {
        message.truncate(rng.range(1, message.len() as u64) as usize);
    }
    let mut c = Command::new(Sqe::from_view(&Authentication::send(Cid(0), message.len() as u32)));
    if rng.one_in(2) {
        c.sqe.sgl = Sgl::in_capsule(0, message.len() as u32);
        c.capsule = message;
    } else {
        c.payload = message;
    }
    c
}
