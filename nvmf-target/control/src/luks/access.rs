//! Who gets at a volume on which a host's key is used, or would be: the hosts that its subsystem's list lets in, and those that are
//! connected now.
//!
//! One lock, the door, is held by who gives a volume the host's layer while it looks who is there, and by whoever brings somebody
//! in: a queue that has connected and may be used next, a subsystem that gets the volume, a host that gets to see it. So either the
//! binding sees the host, or the host finds the volume shut. Nobody waits for a reactor with it. While a subsystem gets a restricted volume
//! with a file for its reservations, that file is opened with it held: hosts of such volumes that connect just then wait for that.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use cryptfold_bdev::Status;
use cryptfold_bdev_crypto::luks::{Layer, Shut};
use cryptfold_nvmf_target::{Arrival, CLAIM, NsInfo, SubsystemInfo};
use serde_json::json;

use super::{Options, Volume, Volumes};
use crate::control::{Control, lock};

/// Why no host's key may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The configuration lets somebody in who may not be: until it is changed.
    Configured(String),
    /// Somebody is connected who may not be, and who may go, or be about to authenticate.
    Connected(String),
}

/// What is wrong with a host.
#[derive(Clone, Copy)]
enum Wrong {
    Unproven,
    Unlisted,
}

impl Options {
    /// Whether it matters who gets at the volume.
    fn is_restricted(&self) -> bool {
        !self.allow_unauthenticated || !self.allowed_hosts.is_empty()
    }

    fn wrong(&self, host: &str, proven: bool) -> Option<Wrong> {
        if !proven && !self.allow_unauthenticated {
            return Some(Wrong::Unproven);
        }
        let listed = self.allowed_hosts.is_empty() || self.allowed_hosts.iter().any(|h| h == host);
        (!listed).then_some(Wrong::Unlisted)
    }

    /// Why a subsystem that has the volume as this namespace lets somebody in who may not be.
    fn lets_in(&self, s: &SubsystemInfo, ns: &NsInfo) -> Option<String> {
        let nqn = &s.options.nqn;
        let listed = s.hosts.iter().map(|h| (&h.nqn, h.dhchap_key.is_some() || h.psk.is_some()));
        let named = listed.filter(|(host, _)| sees(ns, host));
        // Where any host may connect, those that the namespace is shown to may, whether they are on the list or not.
        let shown = ns.visible_to.iter().flatten().filter(|_| s.options.allow_any_host);
        let shown = shown.filter(|host| s.hosts.iter().all(|h| h.nqn != **host)).map(|host| (host, false));
        for (host, keyed) in named.chain(shown) {
            match self.wrong(host, keyed) {
                Some(Wrong::Unproven) => {
                    return Some(format!("host {host} of subsystem {nqn} does not have to authenticate"));
                }
                Some(Wrong::Unlisted) => {
                    return Some(format!("host {host} of subsystem {nqn} is not in allowed_hosts"));
                }
                None => {}
            }
        }
        let anybody = s.options.allow_any_host && ns.visible_to.is_none();
        anybody.then(|| match self.allow_unauthenticated {
            false => format!("subsystem {nqn} lets any host in, and none has to authenticate"),
            true => format!("subsystem {nqn} lets any host in, not those in allowed_hosts alone"),
        })
    }
}

fn sees(ns: &NsInfo, host: &str) -> bool {
    ns.visible_to.as_ref().is_none_or(|hosts| hosts.iter().any(|h| h == host))
}

fn connected(host: &str, peer: &str, wrong: Wrong) -> Refusal {
    let why = match wrong {
        Wrong::Unproven => "has not authenticated",
        Wrong::Unlisted => "is not in allowed_hosts",
    };
    Refusal::Connected(format!("host {host} at {peer} is connected and {why}"))
}

impl Volumes {
    /// A queue of a host is about to be used. On its reactor.
    pub fn arrives(&self, arrival: &Arrival) {
        let all = lock(&self.all).clone();
        let mut seen = all.iter().filter(|v| arrival.bdevs.contains(&v.options.name)).peekable();
        if seen.peek().is_none() {
            return;
        }
        let _door = lock(&self.door);
        for v in seen {
            match v.options.wrong(&arrival.host, arrival.proven) {
                Some(wrong) => v.shut_now(connected(&arrival.host, &arrival.peer, wrong)),
                // It may be the one for which the volume waits.
                None if v.strangers.load(Ordering::SeqCst) => v.switch.ask(),
                None => {}
            }
        }
    }

    /// Somebody is about to get at the device of this name. If it matters who does: as long as the lock is held the device does not
    /// get a host's layer, and if it had one it is looked at again.
    pub fn hosts_change(&self, bdev: &str) -> Option<MutexGuard<'_, ()>> {
        let all = lock(&self.all).clone();
        let restricted = all.iter().find(|v| v.options.name == bdev && v.options.is_restricted())?;
        let door = lock(&self.door);
        restricted.shut_now(Refusal::Connected("who gets at it is changing".into()));
        Some(door)
    }

    /// Subsystems, hosts or what lies on a device may have changed: volumes for which that matters are looked at.
    pub fn recheck(&self, c: &Control) {
        for v in lock(&self.all).clone() {
            let now = v.open_to(c);
            if *lock(&v.open_to) != now {
                let _door = lock(&self.door);
                if let Some(why) = now {
                    v.shut_now(Refusal::Configured(why));
                }
                v.switch.ask();
            }
        }
    }
}

impl Volume {
    /// Why no host's key may be used now.
    pub(super) fn refusal(&self, c: &Control) -> Option<Refusal> {
        let configured = self.open_to(c).map(Refusal::Configured);
        configured.or_else(|| self.stranger(c))
    }

    /// Who the configuration lets at the volume, if it should not.
    pub(super) fn open_to(&self, c: &Control) -> Option<String> {
        if !self.options.is_restricted() {
            return None;
        }
        let claim = c.registry.get(&self.options.name).ok().and_then(|b| b.claimed_by());
        if let Some(by) = claim.filter(|by| by != CLAIM) {
            return Some(format!("it is claimed (by {by}): a device on it, whose hosts are not known"));
        }
        self.exported_by(c).iter().find_map(|(s, ns)| self.options.lets_in(s, ns))
    }

    /// A host that is connected and may not be: what the configuration asks of hosts, it asks of those that come.
    fn stranger(&self, c: &Control) -> Option<Refusal> {
        let target = c.target().ok().filter(|_| self.options.is_restricted())?;
        for (s, ns) in self.exported_by(c) {
            for q in target.qpairs(&s.options.nqn).unwrap_or_default() {
                let wrong = self.options.wrong(&q.hostnqn, q.auth.is_some() || q.tls.is_some());
                if let Some(wrong) = wrong.filter(|_| sees(&ns, &q.hostnqn)) {
                    return Some(connected(&q.hostnqn, &q.peer_address, wrong));
                }
            }
        }
        None
    }

    /// Whether it is not known yet which hosts get at it: nothing is bound for the first time then.
    pub(super) fn unexported(&self, c: &Control) -> Option<String> {
        let unknown = self.options.is_restricted() && self.exported_by(c).is_empty();
        unknown.then(|| "no subsystem has it as a namespace yet".into())
    }

    fn exported_by(&self, c: &Control) -> Vec<(SubsystemInfo, NsInfo)> {
        let all = c.target().map(|t| t.subsystems()).unwrap_or_default().into_iter();
        let is_it = |n: &&NsInfo| n.bdev_name == self.options.name;
        all.filter_map(|s| s.namespaces.iter().find(is_it).cloned().map(|ns| (s, ns))).collect()
    }

    /// Takes the host's layer away at once, if there is one; a look follows. With the door held.
    fn shut_now(&self, refusal: Refusal) {
        let Layer::Bound(bound) = self.switch.layer() else { return };
        let (status, state, reason) = match refusal {
            Refusal::Configured(why) => (Status::ACCESS_DENIED.do_not_retry(), "fenced", why),
            Refusal::Connected(why) => (Status::NAMESPACE_NOT_READY, "waiting", why),
        };
        let from_bytes = bound.shape.payload_offset_bytes;
        self.switch.set(Layer::Shut(Shut { from_bytes, status, discards: false }));
        let mut said = self.switch.status();
        (said["state"], said["reason"]) = (json!(state), json!(reason));
        self.tell(said);
        self.switch.ask();
    }
}
