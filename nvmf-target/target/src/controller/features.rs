//! Get and Set Features: what a host may know and change about its controller.

use cryptfold_nvmf_spec::features::{
    AsyncEventConfig, Capabilities, Fid, HostBehavior, HostIdentifier, NumberOfQueues, PowerManagement,
    Select, VolatileWriteCache,
};
use cryptfold_nvmf_spec::identify::oaes;
use cryptfold_nvmf_spec::opcode::Direction;
use cryptfold_nvmf_spec::sqe::{GetFeaturesCdw10, SetFeaturesCdw10};
use cryptfold_nvmf_spec::{Sqe, Status};
use cryptfold_reactor::memory::Buf;
use zerocopy::{FromBytes, IntoBytes};

use super::{Answer, Controller, State};
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
        }
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
            | Fid::HostIdentifier => !self.is_discovery(),
            _ => false,
        }
    }

    pub(super) fn get_features(&self, sqe: &Sqe, room: u32) -> Result<Answer, Status> {
        let d10 = GetFeaturesCdw10(sqe.cdw10.get());
        let fid =
            fid(d10.fid()).ok().filter(|f| self.has_feature(*f)).ok_or(Status::INVALID_FIELD.with_dnr())?;
        let defaults = Features::new(self.options.max_io_qpairs_per_ctrlr);
        let s = self.state();
        let (f, default) = match Select::from_u8(d10.sel() as u8) {
            Some(Select::Current) => (&s.features, false),
            // Nothing is saved: what comes after a reset is the default.
            Some(Select::Default | Select::Saved) => (&defaults, true),
            Some(Select::Supported) => {
                let changeable = !matches!(fid, Fid::HostIdentifier);
                return done(Capabilities::default().with_changeable(changeable.into()).0);
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
            _ => Err(Status::INVALID_FIELD.with_dnr()),
        }
    }

    pub(super) fn set_features(&self, sqe: &Sqe, data: &[u8]) -> Result<Answer, Status> {
        let d10 = SetFeaturesCdw10(sqe.cdw10.get());
        let fid =
            fid(d10.fid()).ok().filter(|f| self.has_feature(*f)).ok_or(Status::INVALID_FIELD.with_dnr())?;
        if d10.sv() == 1 {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
        }
        let value = sqe.cdw11.get();
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
        // Bits that are not offered stay 0: hosts set all they know.
        s.events.config = wanted.0 & offered;
        done(0)
    }
}
