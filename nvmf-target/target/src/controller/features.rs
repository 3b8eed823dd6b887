//! Get and Set Features: what a host may know and change about its controller.

use cryptfold_bdev::Room;
use cryptfold_nvmf_spec::features::{
    AsyncEventConfig, Capabilities, Fid, HostBehavior, HostIdentifier, NumberOfQueues, PowerManagement,
    ReservationMask, Select, VolatileWriteCache, WriteProtection,
};
use cryptfold_nvmf_spec::identify::oaes;
use cryptfold_nvmf_spec::log::health_warning;
use cryptfold_nvmf_spec::opcode::Direction;
use cryptfold_nvmf_spec::sqe::{GetFeaturesCdw10, SetFeaturesCdw10};
use cryptfold_nvmf_spec::{Nsid, Sqe, Status};
use cryptfold_reactor::memory::Buf;
use zerocopy::{FromBytes, IntoBytes};

use super::{Answer, Controller, MakeLater, State};
use crate::group::Group;
use crate::later::Later;
use crate::reservation::Notice;
use crate::subsystem::Namespace;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the host has set.
pub(super) struct Features {
    /// I/O queues that may be connected: identifiers 1 to this.
    pub io_queues: u16,
    /// I/O queues have been connected: the number is fixed until the next reset.
    pub io_queues_used: bool,
    arbitration: u32,
    power: u32,
    temperature: [u32; 2],
    error_recovery: u32,
    write_atomicity: u32,
    host_behavior: HostBehavior,
    /// Reservation Notification Mask by namespace; those that are not here have `mask_of_all`.
    masks: BTreeMap<u32, ReservationMask>,
    mask_of_all: ReservationMask,
}

/// Composite temperature threshold after a reset, kelvin: no limit.
const NO_OVER_TEMPERATURE: u32 = 0xffff;

impl Features {
    pub fn new(io_queues: u16) -> Features {
        Features {
            io_queues,
            io_queues_used: false,
            arbitration: 0,
            power: 0,
            temperature: [NO_OVER_TEMPERATURE, 0],
            error_recovery: 0,
            write_atomicity: 0,
            host_behavior: HostBehavior::default(),
            masks: BTreeMap::new(),
            mask_of_all: ReservationMask::default(),
        }
    }

    fn mask(&self, nsid: Nsid) -> ReservationMask {
        self.masks.get(&nsid.0).copied().unwrap_or(self.mask_of_all)
    }

    /// Whether the host does not want to hear of this.
    pub fn is_masked(&self, nsid: Nsid, notice: Notice) -> bool {
        // Bits are numbered as the notices are.
        self.mask(nsid).0 & 1 << notice as u32 != 0
    }
}

fn fid(value: u32) -> Result<Fid, Status> {
    Fid::from_u8(value as u8).ok_or(Status::INVALID_FIELD.with_dnr())
}

/// Which way Get Features moves data.
pub(super) fn get_direction(sqe: &Sqe) -> Direction {
    let d10 = GetFeaturesCdw10(sqe.cdw10.get());
    let data = matches!(fid(d10.fid()), Ok(Fid::HostBehavior | Fid::HostIdentifier));
    if data && d10.sel() != Select::Supported as u32 { Direction::ControllerToHost } else { Direction::None }
}

/// Which way Set Features moves data.
pub(super) fn set_direction(sqe: &Sqe) -> Direction {
    match fid(SetFeaturesCdw10(sqe.cdw10.get()).fid()) {
        Ok(Fid::HostBehavior | Fid::HostIdentifier) => Direction::HostToController,
        _ => Direction::None,
    }
}

fn is_namespace_specific(fid: Fid) -> bool {
    matches!(fid, Fid::ReservationMask | Fid::ReservationPersistence | Fid::WriteProtection)
}

fn done(dw0: u32) -> Result<Answer, Status> {
    Ok(Answer::Done(Status::SUCCESS, dw0.into()))
}

fn queues(n: u16) -> u32 {
    let n = u32::from(n) - 1;
    NumberOfQueues::default().with_nsq(n).with_ncq(n).0
}

/// Index of a temperature threshold: over or under, of the composite temperature; others do not exist.
fn threshold(dw11: u32) -> Result<usize, Status> {
    match (dw11 >> 16 & 15, dw11 >> 20 & 3) {
        (0 | 15, n @ (0 | 1)) => Ok(n as usize),
        _ => Err(Status::INVALID_FIELD.with_dnr()),
    }
}

impl Controller {
    /// Features of discovery controllers (NVMe Base 2.0 section 3.1.2.3.5).
    fn has_feature(&self, fid: Fid) -> bool {
        match fid {
            Fid::AsyncEventConfig | Fid::KeepAliveTimer => true,
            Fid::Arbitration
            | Fid::PowerManagement
            | Fid::TemperatureThreshold
            | Fid::ErrorRecovery
            | Fid::VolatileWriteCache
            | Fid::NumberOfQueues
            | Fid::WriteAtomicity
            | Fid::HostBehavior
            | Fid::HostIdentifier
            | Fid::ReservationMask
            | Fid::ReservationPersistence
            | Fid::WriteProtection => !self.is_discovery(),
            _ => false,
        }
    }

    pub(super) fn get_features(&self, sqe: &Sqe, room: u32) -> Result<Answer, Status> {
        let d10 = GetFeaturesCdw10(sqe.cdw10.get());
        let fid =
            fid(d10.fid()).ok().filter(|f| self.has_feature(*f)).ok_or(Status::INVALID_FIELD.with_dnr())?;
        let defaults = Features::new(self.options.max_io_qpairs_per_ctrlr);
        // Before the lock is taken: namespaces are the subsystem's.
        let ns = if is_namespace_specific(fid) { Some(self.namespace_of(sqe)) } else { None };
        let s = self.state();
        let (f, default) = match Select::from_u8(d10.sel() as u8) {
            Some(Select::Current) => (&s.features, false),
            // Nothing is saved: what comes after a reset is the default.
            Some(Select::Default | Select::Saved) => (&defaults, true),
            Some(Select::Supported) => {
                let changeable = !matches!(fid, Fid::HostIdentifier);
                let specific = is_namespace_specific(fid);
                let capabilities = Capabilities::default().with_changeable(changeable.into());
                return done(capabilities.with_namespace_specific(specific.into()).0);
            }
            None => return Err(Status::INVALID_FIELD.with_dnr()),
        };
        let data = |bytes: &[u8]| {
            let len = bytes.len().min(room as usize);
            Ok(Answer::Data(Buf::from_slice(&bytes[..len])))
        };
        match fid {
            Fid::Arbitration => done(f.arbitration),
            Fid::PowerManagement => done(f.power),
            Fid::TemperatureThreshold => done(f.temperature[threshold(sqe.cdw11.get())?]),
            Fid::ErrorRecovery => done(f.error_recovery),
            Fid::VolatileWriteCache => {
                done(VolatileWriteCache(0).with_wce((default || !self.write_through()).into()).0)
            }
            Fid::NumberOfQueues => done(queues(f.io_queues)),
            Fid::WriteAtomicity => done(f.write_atomicity),
            Fid::AsyncEventConfig => done(if default { 0 } else { s.events.config }),
            Fid::KeepAliveTimer => done(if default { 0 } else { self.kato_ms() }),
            Fid::HostBehavior => data(f.host_behavior.as_bytes()),
            // On fabrics it is always 128 bits (NVMe Base 2.0 section 5.27.1.25).
            Fid::HostIdentifier if HostIdentifier(sqe.cdw11.get()).exhid() == 1 => data(&self.host.id),
            Fid::ReservationMask | Fid::ReservationPersistence | Fid::WriteProtection => {
                let ns =
                    ns.unwrap_or(Err(Status::INTERNAL_ERROR))?.ok_or(Status::INVALID_FIELD.with_dnr())?;
                done(match fid {
                    _ if default => 0,
                    Fid::ReservationMask => f.mask(ns.nsid).0,
                    Fid::WriteProtection => ns.reservations.protection().into(),
                    _ => ns.reservations.persistent().into(),
                })
            }
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    /// The namespace that a namespace specific feature is about; `None`: all of them.
    fn namespace_of(&self, sqe: &Sqe) -> Result<Option<Arc<Namespace>>, Status> {
        if sqe.nsid() == Nsid::ALL {
            return Ok(None);
        }
        self.subsystem
            .namespace(sqe.nsid(), &self.host.nqn)
            .map(Some)
            .ok_or(Status::INVALID_NAMESPACE.with_dnr())
    }

    pub(super) fn set_features(
        &self,
        sqe: &Sqe,
        data: &[u8],
        later: MakeLater<'_>,
    ) -> Result<Answer, Status> {
        let d10 = SetFeaturesCdw10(sqe.cdw10.get());
        let fid =
            fid(d10.fid()).ok().filter(|f| self.has_feature(*f)).ok_or(Status::INVALID_FIELD.with_dnr())?;
        if d10.sv() == 1 {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
        }
        let value = sqe.cdw11.get();
        if is_namespace_specific(fid) {
            return self.set_namespace_feature(fid, sqe, later);
        }
        let mut s = self.state();
        match fid {
            Fid::Arbitration => s.features.arbitration = value,
            Fid::PowerManagement if PowerManagement(value).ps() != 0 => {
                return Err(Status::INVALID_FIELD.with_dnr());
            }
            Fid::PowerManagement => s.features.power = value,
            Fid::TemperatureThreshold => s.features.temperature[threshold(value)?] = value & 0xffff,
            // DULBE needs devices that report deallocated blocks as errors; none does.
            Fid::ErrorRecovery if value & 1 << 16 != 0 => return Err(Status::INVALID_FIELD.with_dnr()),
            Fid::ErrorRecovery => s.features.error_recovery = value,
            Fid::VolatileWriteCache => {
                self.write_through.store(VolatileWriteCache(value).wce() == 0, Ordering::Relaxed);
            }
            Fid::NumberOfQueues => return self.set_queues(&mut s, NumberOfQueues(value)),
            Fid::WriteAtomicity => s.features.write_atomicity = value & 1,
            Fid::AsyncEventConfig => return self.set_events(&mut s, AsyncEventConfig(value)),
            Fid::KeepAliveTimer => {
                drop(s);
                self.set_kato(value);
            }
            Fid::HostBehavior => {
                let behavior = HostBehavior::read_from_bytes(data);
                s.features.host_behavior =
                    behavior.map_err(|_| Status::DATA_SGL_LENGTH_INVALID.with_dnr())?;
            }
            // Fixed by Connect.
            Fid::HostIdentifier => return Err(Status::COMMAND_SEQUENCE_ERROR.with_dnr()),
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        }
        done(0)
    }

    fn set_namespace_feature(&self, fid: Fid, sqe: &Sqe, later: MakeLater<'_>) -> Result<Answer, Status> {
        let (value, ns) = (sqe.cdw11.get(), self.namespace_of(sqe)?);
        if fid == Fid::ReservationMask {
            let features = &mut self.state().features;
            match ns {
                Some(ns) => drop(features.masks.insert(ns.nsid.0, ReservationMask(value))),
                None => {
                    features.masks.clear();
                    features.mask_of_all = ReservationMask(value);
                }
            }
            return done(0);
        }
        let gone = Status::ABORTED_SQ_DELETION;
        let all = match ns {
            Some(ns) => vec![ns],
            // Of all namespaces at once only persistence can be set (NVMe Base 2.0 sections 5.27.1.27, .29).
            None if fid == Fid::ReservationPersistence => self.subsystem.namespaces(&self.host.nqn),
            None => return Err(Status::INVALID_FIELD.with_dnr()),
        };
        // From here on it completes the command, now or later.
        let wait = later().ok_or(gone)?;
        for ns in all {
            let done = if fid == Fid::ReservationPersistence {
                ns.reservations.set_persistent(value & 1 == 1, || wait.clone()).map(drop)
            } else {
                self.protect(&ns, WriteProtection(value).state() as u8, &wait)
            };
            if let Err(status) = done {
                wait.set(status);
            }
        }
        Ok(Answer::Later(wait))
    }

    fn protect(&self, ns: &Arc<Namespace>, wanted: u8, wait: &Arc<Later>) -> Result<(), Status> {
        let before = ns.reservations.protection();
        ns.reservations.protect(wanted, || wait.clone())?;
        if ns.reservations.protection() != before {
            self.flush_protected(ns, wait);
            self.subsystem.namespace_changed(ns.nsid);
        }
        Ok(())
    }

    /// What was written before a namespace became protected is durable when the command completes.
    fn flush_protected(&self, ns: &Arc<Namespace>, wait: &Arc<Later>) {
        let group = self.target.upgrade().and_then(|t| Group::here(t.id));
        let Some(Ok(channel)) = group.map(|g| g.channel(ns)) else { return wait.set(Status::INTERNAL_ERROR) };
        let wait = wait.clone();
        cryptfold_reactor::spawn_local(async move {
            if let Err(status) = channel.channel.flush().await {
                wait.set(crate::io::status(status));
            }
        })
        .detach();
    }

    fn set_queues(&self, s: &mut State, asked: NumberOfQueues) -> Result<Answer, Status> {
        if s.features.io_queues_used {
            return Err(Status::COMMAND_SEQUENCE_ERROR.with_dnr());
        }
        let granted = asked.grant(self.options.max_io_qpairs_per_ctrlr)?;
        s.features.io_queues = granted.pairs() as u16;
        done(granted.0)
    }

    fn set_events(&self, s: &mut State, wanted: AsyncEventConfig) -> Result<Answer, Status> {
        let mut offered = 0xff;
        if self.is_discovery() {
            offered |= oaes::DISCOVERY_CHANGE;
        } else {
            offered |= oaes::NAMESPACE_ATTRIBUTES;
        }
        if self.subsystem.options.ana_reporting {
            offered |= oaes::ANA_CHANGE;
        }
        // What is so already is told to a host that asks only now.
        if wanted.0 & !s.events.config & u32::from(health_warning::SPARE) != 0 {
            s.room = Room::Enough;
        }
        // Bits that are not offered stay 0: hosts set all they know.
        s.events.config = wanted.0 & offered;
        done(0)
    }
}
