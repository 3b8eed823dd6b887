//! Reservations and write protection of a namespace: what its commands do to them, and who may do what because of them.
//!
//! I/O commands look at two atomics while nobody holds a reservation. While somebody does, a connection remembers what its
//! host may do together with the epoch in which that was true; every change moves the epoch.
//!
//! A change counts from the moment it is made, and its command completes when it is durable, if it has to be. If the file can not be
//! written the change is taken back, with whatever was done on top of it, and all those commands fail. Notices that others were sent
//! meanwhile, commands that were aborted and writes that were let through are not taken back.

mod file;
mod state;

pub(crate) use file::{Kept, StateFile};
pub(crate) use state::{HostId, Notice, Outcome};

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cryptfold_nvmf_spec::opcode::Io;
use cryptfold_nvmf_spec::reservation::{
    AcquireAction, AcquireCdw10, AcquireData, RegisterAction, RegisterCdw10, RegisterData,
    RegisteredControllerExt, ReleaseAction, ReleaseCdw10, ReleaseData, ReportCdw11, ReservationStatusExt,
    ReservationType,
};
use cryptfold_nvmf_spec::{Cntlid, Sqe, Status};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::later::Later;
use crate::subsystem::{locked, unique};
use state::State;

/// RESCAP: all types and IEKEY as of NVMe 1.3; bit 0, persistence, depends.
pub(crate) const CAPABILITIES: u8 = 0xfe;

/// States of write protection (NVMe Base 2.0 section 5.27.1.29).
pub(crate) mod protection {
    pub const NONE: u8 = 0;
    /// Survives power cycles.
    pub const PROTECTED: u8 = 1;
    /// Ends with the target.
    pub const UNTIL_POWER_CYCLE: u8 = 2;
}

/// What a command does to a namespace, as far as reservations and write protection care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing that is ever refused.
    Free,
    /// Reads.
    Read,
    /// Changes nothing, but belongs to those who write (Flush).
    Flush,
    /// Changes.
    Write,
}

/// What a host may do, and since when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rights {
    pub epoch: u64,
    pub read: bool,
    pub write: bool,
}

/// A decoded Reservation Register, Acquire or Release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Register { action: RegisterAction, ignore_key: bool, keys: (u64, u64), persist: Option<bool> },
    Acquire { key: u64, kind: ReservationType },
    Preempt { key: u64, victim: u64, kind: ReservationType, abort: bool },
    Release { key: u64, kind: u8 },
    Clear { key: u64 },
}

/// Bytes of data of a reservation command; for the report those that the host asks for.
pub(crate) fn data_bytes(sqe: &Sqe, opcode: Io) -> u64 {
    match opcode {
        Io::ReservationReport => (u64::from(sqe.cdw10.get()) + 1) * 4,
        Io::ReservationRelease => size_of::<ReleaseData>() as u64,
        _ => size_of::<RegisterData>() as u64,
    }
}

impl Request {
    /// Decodes a command with its data.
    ///
    /// # Errors
    /// The status to complete it with.
    pub fn parse(sqe: &Sqe, data: &[u8]) -> Result<Request, Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let short = Status::DATA_SGL_LENGTH_INVALID.with_dnr();
        let d10 = sqe.cdw10.get();
        let kind = |rtype: u32| ReservationType::from_u8(rtype as u8).ok_or(invalid);
        match Io::from_u8(sqe.opcode) {
            Some(Io::ReservationRegister) => {
                let (d10, data) =
                    (RegisterCdw10(d10), RegisterData::ref_from_prefix(data).map_err(|_| short)?.0);
                let action = RegisterAction::from_u8(d10.rrega() as u8).ok_or(invalid)?;
                let persist = match d10.cptpl() {
                    0 => None,
                    2 => Some(false),
                    3 => Some(true),
                    _ => return Err(invalid),
                };
                let keys = (data.crkey.get(), data.nrkey.get());
                Ok(Request::Register { action, ignore_key: d10.iekey() == 1, keys, persist })
            }
            Some(Io::ReservationAcquire) => {
                let (d10, data) =
                    (AcquireCdw10(d10), AcquireData::ref_from_prefix(data).map_err(|_| short)?.0);
                let (key, victim, kind) = (data.crkey.get(), data.prkey.get(), kind(d10.rtype())?);
                match AcquireAction::from_u8(d10.racqa() as u8).filter(|_| d10.iekey() == 0).ok_or(invalid)? {
                    AcquireAction::Acquire => Ok(Request::Acquire { key, kind }),
                    AcquireAction::Preempt => Ok(Request::Preempt { key, victim, kind, abort: false }),
                    AcquireAction::PreemptAndAbort => Ok(Request::Preempt { key, victim, kind, abort: true }),
                }
            }
            Some(Io::ReservationRelease) => {
                let (d10, data) =
                    (ReleaseCdw10(d10), ReleaseData::ref_from_prefix(data).map_err(|_| short)?.0);
                let key = data.crkey.get();
                match ReleaseAction::from_u8(d10.rrela() as u8).filter(|_| d10.iekey() == 0).ok_or(invalid)? {
                    ReleaseAction::Release => Ok(Request::Release { key, kind: d10.rtype() as u8 }),
                    ReleaseAction::Clear => Ok(Request::Clear { key }),
                }
            }
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        }
    }
}

/// What changes.
#[derive(Default)]
pub(crate) struct Core {
    /// 0 while there is no reservation.
    epoch: AtomicU64,
    protection: AtomicU8,
    state: Mutex<State>,
    /// Changes that the file does not have yet; grows under the lock on the state.
    unwritten: AtomicU32,
}

impl Core {
    /// Whether the file does not have everything yet.
    fn has_unwritten(&self) -> bool {
        self.unwritten.load(Ordering::Relaxed) > 0
    }

    fn move_epoch(&self, s: &State) {
        let epoch = if s.held.is_some() { unique() } else { 0 };
        self.epoch.store(epoch, Ordering::Release);
    }
}

/// The way back from a change that can not be written.
pub(crate) struct Undo {
    core: Arc<Core>,
    state: State,
    protection: u8,
}

impl Undo {
    /// So many changes have been written.
    pub fn written(&self, changes: usize) {
        self.core.unwritten.fetch_sub(changes as u32, Ordering::Relaxed);
    }

    /// Takes this change and all after it back. `rest` fetches those that wait to be written: with the lock on the state, so there are no
    /// others.
    pub fn take_back(self, rest: impl FnOnce()) {
        let mut s = locked(&self.core.state);
        rest();
        *s = self.state;
        self.core.protection.store(self.protection, Ordering::Relaxed);
        self.core.unwritten.store(0, Ordering::Relaxed);
        self.core.move_epoch(&s);
    }
}

/// See the module's head.
pub(crate) struct Reservations {
    core: Arc<Core>,
    file: Option<StateFile>,
}

impl Reservations {
    /// Nobody is registered, or who `file` names.
    pub fn new(file: Option<(StateFile, Kept)>) -> Reservations {
        let (file, kept) = file.map_or((None, Kept::default()), |(f, k)| (Some(f), k));
        let protection = if kept.write_protected { protection::PROTECTED } else { protection::NONE };
        let core = Core::default();
        core.protection.store(protection, Ordering::Relaxed);
        core.move_epoch(&kept.state);
        *locked(&core.state) = kept.state;
        Reservations { core: Arc::new(core), file }
    }

    /// The file, if there is one.
    pub fn file(&self) -> Option<&StateFile> {
        self.file.as_ref()
    }

    /// RESCAP.
    pub fn capabilities(&self) -> u8 {
        CAPABILITIES | u8::from(self.file.is_some())
    }

    /// Whether a command of `host` may execute now. `known`: what the caller remembers of that host here.
    #[inline]
    pub fn check(&self, host: &HostId, access: Access, known: &mut Rights) -> Result<(), Status> {
        if access == Access::Write && self.is_protected() {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.with_dnr());
        }
        let epoch = self.core.epoch.load(Ordering::Acquire);
        if epoch == 0 || access == Access::Free {
            return Ok(());
        }
        if known.epoch != epoch {
            let s = locked(&self.core.state);
            // Under the lock the epoch is that of the state.
            let epoch = self.core.epoch.load(Ordering::Acquire);
            *known = Rights { epoch, read: s.permits(host, false), write: s.permits(host, true) };
        }
        let may = if access == Access::Read { known.read } else { known.write };
        if may { Ok(()) } else { Err(Status::RESERVATION_CONFLICT) }
    }

    /// Executes a command. `later` is made if the change has to become durable first.
    ///
    /// # Errors
    /// The status to complete it with.
    pub fn execute(
        &self,
        host: HostId,
        request: Request,
        later: impl FnOnce() -> Arc<Later>,
    ) -> Result<(Outcome, Option<Arc<Later>>), Status> {
        let mut s = locked(&self.core.state);
        let before = self.undo(&s);
        let was_persistent = s.persistent;
        let outcome = match request {
            Request::Register { persist: Some(true), .. } if self.file.is_none() => {
                return Err(Status::INVALID_FIELD.with_dnr());
            }
            Request::Register { action, ignore_key, keys, persist } => {
                s.register(host, action, ignore_key, keys, persist)?
            }
            Request::Acquire { key, kind } => s.acquire(host, key, kind)?,
            Request::Preempt { key, victim, kind, .. } => s.preempt(host, key, victim, kind)?,
            Request::Release { key, kind } => s.release(host, key, kind)?,
            Request::Clear { key } => s.clear(host, key)?,
        };
        self.core.move_epoch(&s);
        // Who builds on what is not written yet, or is told that it is so, shares its fate.
        let shares = self.core.has_unwritten();
        let durable = shares || outcome.changed && (was_persistent || s.persistent);
        let later = durable.then(|| self.save(&s, before, later)).flatten();
        Ok((outcome, later))
    }

    /// The way back to what is now; needed only where something may have to be written.
    fn undo(&self, s: &State) -> Option<Undo> {
        self.file.as_ref().map(|_| Undo {
            core: self.core.clone(),
            state: s.clone(),
            protection: self.protection(),
        })
    }

    /// Called with the lock on the state, so that saves happen in the order of the changes.
    fn save(
        &self,
        s: &State,
        before: Option<Undo>,
        later: impl FnOnce() -> Arc<Later>,
    ) -> Option<Arc<Later>> {
        let file = self.file.as_ref()?;
        let later = later();
        let write_protected = self.protection() == protection::PROTECTED;
        self.core.unwritten.fetch_add(1, Ordering::Relaxed);
        file.save(&Kept { state: s.clone(), write_protected }, before, Some(later.clone()));
        Some(later)
    }

    /// Whether reservations persist through power loss.
    pub fn persistent(&self) -> bool {
        locked(&self.core.state).persistent
    }

    /// Makes them persist, or not.
    ///
    /// # Errors
    /// There is no file for them.
    pub fn set_persistent(
        &self,
        on: bool,
        later: impl FnOnce() -> Arc<Later>,
    ) -> Result<Option<Arc<Later>>, Status> {
        if on && self.file.is_none() {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let mut s = locked(&self.core.state);
        let before = self.undo(&s);
        let changed = std::mem::replace(&mut s.persistent, on) != on;
        Ok((changed || self.core.has_unwritten()).then(|| self.save(&s, before, later)).flatten())
    }

    /// Whether writes are refused.
    #[inline]
    pub fn is_protected(&self) -> bool {
        self.protection() != protection::NONE
    }

    /// The state of write protection.
    #[inline]
    pub fn protection(&self) -> u8 {
        self.core.protection.load(Ordering::Relaxed)
    }

    /// Sets it.
    ///
    /// # Errors
    /// Not offered, or not changeable now.
    pub fn protect(
        &self,
        wanted: u8,
        later: impl FnOnce() -> Arc<Later>,
    ) -> Result<Option<Arc<Later>>, Status> {
        let s = locked(&self.core.state);
        let before = self.undo(&s);
        let now = self.protection();
        if wanted == now && !self.core.has_unwritten() {
            return Ok(None);
        }
        match wanted {
            protection::NONE | protection::PROTECTED if now == protection::UNTIL_POWER_CYCLE => {
                return Err(Status::FEATURE_NOT_CHANGEABLE.with_dnr());
            }
            // It has to survive, and could not.
            protection::PROTECTED if self.file.is_none() => {
                return Err(Status::FEATURE_NOT_CHANGEABLE.with_dnr());
            }
            protection::NONE | protection::PROTECTED | protection::UNTIL_POWER_CYCLE => {}
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        }
        self.core.protection.store(wanted, Ordering::Relaxed);
        Ok(self.save(&s, before, later))
    }

    /// The data of Reservation Report. `controllers`: those of the subsystem, with their hosts.
    ///
    /// # Errors
    /// The status to complete it with.
    pub fn report(&self, sqe: &Sqe, controllers: &[(Cntlid, HostId)]) -> Result<Vec<u8>, Status> {
        // Hosts on fabrics have 128-bit identifiers, and the short format has no room for them.
        if ReportCdw11(sqe.cdw11.get()).eds() == 0 {
            return Err(Status::HOST_ID_INCONSISTENT_FORMAT.with_dnr());
        }
        let s = locked(&self.core.state);
        let mut entries = Vec::new();
        for (host, key) in &s.registrants {
            let entry = |cntlid: u16| {
                let mut entry = RegisteredControllerExt::default();
                entry.cntlid = U16::new(cntlid);
                entry.rcsts = s.is_holder(host).into();
                entry.rkey = U64::new(*key);
                entry.hostid = *host;
                entry
            };
            let before = entries.len();
            entries.extend(controllers.iter().filter(|c| c.1 == *host).map(|c| entry(c.0.0)));
            if entries.len() == before {
                entries.push(entry(0xffff));
            }
        }
        // Controllers have 16-bit identifiers; hosts without any are limited well below.
        let mut head = ReservationStatusExt::default();
        head.status.generation = U32::new(s.generation);
        head.status.rtype = s.held.map_or(0, |h| h.kind as u8);
        head.status.regctl = U16::new(u16::try_from(entries.len()).unwrap_or(u16::MAX));
        head.status.ptpls = s.persistent.into();
        Ok([head.as_bytes(), entries.as_bytes()].concat())
    }
}
