//! Asynchronous events of one controller: which Asynchronous Event Requests wait, which events are pending, which are
//! masked until their log page is read (NVMe Base 2.0 section 5.2). No I/O.
//!
//! Invariants: at most [`SLOTS`] requests wait; an event is reported at most once until its log page is read with
//! Retain Asynchronous Event clear; an event that the host has not enabled is dropped.

use cryptfold_nvmf_spec::Cid;
use cryptfold_nvmf_spec::features::AsyncEvent;
use cryptfold_nvmf_spec::identify::oaes;
use cryptfold_nvmf_spec::log::{Lid, health_warning};

/// Requests that may wait at once; AERL is one less.
pub const SLOTS: usize = 4;

/// The events that this target reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum EventKind {
    /// Attached Namespace Attribute Changed: a namespace came, went or changed its size.
    NamespaceChanged = 0,
    /// Asymmetric Namespace Access Change.
    AnaChange = 1,
    /// Discovery Log Page Change.
    DiscoveryChange = 2,
    /// Reservation Log Page Available.
    Reservation = 3,
    /// SMART / Health: spare below its threshold: a pool runs out of space.
    SpareBelow = 4,
}

impl EventKind {
    /// All kinds.
    pub const ALL: [EventKind; 5] = [
        EventKind::NamespaceChanged,
        EventKind::AnaChange,
        EventKind::DiscoveryChange,
        EventKind::Reservation,
        EventKind::SpareBelow,
    ];

    /// Bit in Asynchronous Event Configuration and, except that of SMART, in OAES (NVMe Base 2.0 Figures 275, 326); 0: cannot
    /// be switched off.
    pub const fn config_bit(self) -> u32 {
        match self {
            EventKind::NamespaceChanged => oaes::NAMESPACE_ATTRIBUTES,
            EventKind::AnaChange => oaes::ANA_CHANGE,
            EventKind::DiscoveryChange => oaes::DISCOVERY_CHANGE,
            EventKind::Reservation => 0,
            EventKind::SpareBelow => health_warning::SPARE as u32,
        }
    }

    /// The log page that tells more, and whose reading re-enables the event.
    pub const fn log_page(self) -> Lid {
        match self {
            EventKind::NamespaceChanged => Lid::ChangedNamespaces,
            EventKind::AnaChange => Lid::Ana,
            EventKind::DiscoveryChange => Lid::Discovery,
            EventKind::Reservation => Lid::Reservation,
            EventKind::SpareBelow => Lid::Health,
        }
    }

    /// Dword 0 of the completion.
    pub const fn dw0(self) -> u32 {
        match self {
            EventKind::NamespaceChanged => AsyncEvent::NAMESPACE_CHANGED.0,
            EventKind::AnaChange => AsyncEvent::ANA_CHANGE.0,
            EventKind::DiscoveryChange => AsyncEvent::DISCOVERY_CHANGE.0,
            EventKind::Reservation => AsyncEvent::RESERVATION.0,
            EventKind::SpareBelow => AsyncEvent::SPARE_BELOW.0,
        }
    }
}

#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Pending {
    waiting: bool,
    masked: bool,
}

/// The state of one controller's events. `config` is the feature Asynchronous Event Configuration.
#[derive(Default, Debug)]
pub struct Events {
    /// Feature 0Bh as set by the host.
    pub config: u32,
    /// Waiting requests, oldest first: command identifier and the queue's slot.
    requests: Vec<(Cid, u16)>,
    pending: [Pending; EventKind::ALL.len()],
}

/// A request to be completed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// The slot of the request.
    pub slot: u16,
    /// Dword 0 of its completion.
    pub dw0: u32,
}

impl Events {
    /// A new request. `Ok(None)`: it waits.
    ///
    /// # Errors
    /// Too many wait already.
    pub fn request(&mut self, cid: Cid, slot: u16) -> Result<Option<Report>, TooMany> {
        if self.requests.len() >= SLOTS {
            return Err(TooMany);
        }
        self.requests.push((cid, slot));
        Ok(self.take_report())
    }

    /// Something happened. Returns the request that reports it, if one waits and the host wants to know.
    pub fn raise(&mut self, kind: EventKind) -> Option<Report> {
        let p = &mut self.pending[kind as usize];
        let enabled = kind.config_bit() == 0 || self.config & kind.config_bit() != 0;
        if !enabled || p.masked {
            return None;
        }
        p.waiting = true;
        self.take_report()
    }

    /// A log page was read with RAE clear: its event may be reported again.
    pub fn log_read(&mut self, log_page: Lid) {
        for kind in EventKind::ALL.into_iter().filter(|k| k.log_page() == log_page) {
            self.pending[kind as usize] = Pending::default();
        }
    }

    /// Takes the waiting request with this identifier, to be aborted.
    pub fn abort(&mut self, cid: Cid) -> Option<u16> {
        let at = self.requests.iter().position(|r| r.0 == cid)?;
        Some(self.requests.remove(at).1)
    }

    /// Controller reset: waiting requests are forgotten (returned, to be freed), so is what is pending.
    pub fn reset(&mut self) -> Vec<u16> {
        self.config = 0;
        self.pending = Default::default();
        self.requests.drain(..).map(|r| r.1).collect()
    }

    fn take_report(&mut self) -> Option<Report> {
        let kind = EventKind::ALL.into_iter().find(|k| self.pending[*k as usize].waiting)?;
        if self.requests.is_empty() {
            return None;
        }
        self.pending[kind as usize] = Pending { waiting: false, masked: true };
        Some(Report { slot: self.requests.remove(0).1, dw0: kind.dw0() })
    }
}

/// Asynchronous Event Request Limit Exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

#[cfg(test)]
mod tests {
    use super::*;
    use EventKind::*;

    fn enabled() -> Events {
        Events { config: NamespaceChanged.config_bit() | AnaChange.config_bit(), ..Default::default() }
    }

    #[test]
    fn an_event_is_reported_once_until_its_log_is_read() {
        let mut e = enabled();
        assert_eq!(e.request(Cid(1), 7), Ok(None));
        assert_eq!(e.request(Cid(2), 8), Ok(None));
        assert_eq!(e.raise(NamespaceChanged), Some(Report { slot: 7, dw0: NamespaceChanged.dw0() }));
        assert_eq!(e.raise(NamespaceChanged), None, "masked");
        assert_eq!(e.raise(AnaChange).map(|r| r.slot), Some(8), "another event is not masked by the first");
        e.log_read(Lid::ChangedNamespaces);
        assert_eq!(e.raise(NamespaceChanged), None, "no request waits");
        assert_eq!(e.request(Cid(3), 9).ok().flatten().map(|r| r.slot), Some(9), "reported when one comes");
    }

    #[test]
    fn limits_abort_and_disabled_events() {
        let mut e = enabled();
        for i in 0..SLOTS as u16 {
            assert_eq!(e.request(Cid(i), i), Ok(None));
        }
        assert_eq!(e.request(Cid(9), 9), Err(TooMany));
        assert_eq!(e.abort(Cid(2)), Some(2));
        assert_eq!(e.abort(Cid(2)), None);
        assert_eq!(e.raise(DiscoveryChange), None, "not enabled");
        assert_eq!(e.reset(), vec![0, 1, 3]);
        assert_eq!(e.raise(NamespaceChanged), None, "reset disables everything");
    }
}
