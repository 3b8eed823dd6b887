//! Who is registered with a namespace, who holds its reservation, and what each command does to that (NVMe Base 2.0
//! sections 7.2 to 7.5 and 8.19). No I/O.
//!
//! A registrant is a host, by its identifier: all its controllers share the registration. Invariants: a holder is
//! registered; there is a holder exactly when there is a reservation, except that of an "all registrants" type each
//! registrant is one; a key is not 0.

use std::collections::BTreeMap;

use cryptfold_nvmf_spec::Status;
use cryptfold_nvmf_spec::reservation::{RegisterAction, ReservationType, Standing};

/// HOSTID, 128 bits.
pub type HostId = [u8; 16];

/// Registrants of a namespace at most: what a hostile host can make us remember.
pub const MAX_REGISTRANTS: usize = 4096;

/// What other hosts are told; the values are those of the log page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Notice {
    /// The host's registration was preempted.
    RegistrationPreempted = 1,
    /// A reservation that registrants share was released.
    ReservationReleased = 2,
    /// The reservation was preempted.
    ReservationPreempted = 3,
}

/// What a command did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Whom to tell what.
    pub notices: Vec<(HostId, Notice)>,
    /// Hosts that lost their registration to a preemption.
    pub preempted: Vec<HostId>,
    /// Something that outlives a power loss has changed.
    pub changed: bool,
}

/// The reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its type.
    pub kind: ReservationType,
    /// Who acquired it. Of an "all registrants" type any registrant.
    pub by: HostId,
}

/// The state of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Persist through power loss.
    pub persistent: bool,
    /// GEN: changes of registrations.
    pub generation: u32,
    /// Keys by host.
    pub registrants: BTreeMap<HostId, u64>,
    /// The reservation, if there is one.
    pub held: Option<Held>,
}

const CONFLICT: Status = Status::RESERVATION_CONFLICT;
const INVALID: Status = Status::INVALID_FIELD.with_dnr();

impl State {
    /// Whether the host is registered.
    pub fn is_registered(&self, host: &HostId) -> bool {
        self.registrants.contains_key(host)
    }

    /// Whether the host holds the reservation.
    pub fn is_holder(&self, host: &HostId) -> bool {
        match self.held {
            Some(h) if h.kind.all_registrants_hold() => self.is_registered(host),
            Some(h) => h.by == *host,
            None => false,
        }
    }

    /// Whether the host may read (`write` = false) or change the namespace.
    pub fn permits(&self, host: &HostId, write: bool) -> bool {
        let Some(held) = self.held else { return true };
        let standing = if self.is_holder(host) {
            Standing::Holder
        } else if self.is_registered(host) {
            Standing::Registrant
        } else {
            Standing::Other
        };
        held.kind.permits(standing, write)
    }

    /// Reservation Register. `persist`: CPTPL, as a change of [`State::persistent`].
    ///
    /// # Errors
    /// The status to complete with; nothing has changed then.
    pub fn register(
        &mut self,
        host: HostId,
        action: RegisterAction,
        ignore_key: bool,
        (current, new): (u64, u64),
        persist: Option<bool>,
    ) -> Result<Outcome, Status> {
        let known = self.registrants.get(&host).copied();
        let key_fits = known.is_some_and(|k| ignore_key || k == current);
        let mut outcome = Outcome::default();
        match action {
            RegisterAction::Register | RegisterAction::Replace if new == 0 => return Err(INVALID),
            RegisterAction::Register if known.is_some_and(|k| k != new) => return Err(CONFLICT),
            // Replacing whatever key there is also makes a registration where there is none.
            RegisterAction::Replace if !(key_fits || ignore_key && known.is_none()) => return Err(CONFLICT),
            RegisterAction::Unregister if !key_fits => return Err(CONFLICT),
            RegisterAction::Unregister => self.unregister(&host, &mut outcome),
            RegisterAction::Register | RegisterAction::Replace => {
                if known.is_none() && self.registrants.len() >= MAX_REGISTRANTS {
                    return Err(Status::OPERATION_DENIED.with_dnr());
                }
                outcome.changed = known != Some(new);
                self.registrants.insert(host, new);
            }
        }
        if outcome.changed {
            self.generation = self.generation.wrapping_add(1);
        }
        if let Some(persist) = persist {
            outcome.changed |= self.persistent != persist;
            self.persistent = persist;
        }
        Ok(outcome)
    }

    /// A registrant goes of its own will; what it alone holds goes with it.
    fn unregister(&mut self, host: &HostId, outcome: &mut Outcome) {
        let held = self.held.filter(|_| self.is_holder(host));
        self.registrants.remove(host);
        outcome.changed = true;
        let Some(held) = held else { return };
        if held.kind.all_registrants_hold() {
            match self.registrants.keys().next() {
                Some(other) => self.held = Some(Held { by: *other, ..held }),
                None => self.held = None,
            }
        } else {
            self.held = None;
            self.tell_released(held.kind, host, outcome);
        }
    }

    /// Of the types that registrants share, they learn of the end (section 8.19.5).
    fn tell_released(&self, kind: ReservationType, by: &HostId, outcome: &mut Outcome) {
        if !matches!(kind, ReservationType::WriteExclusive | ReservationType::ExclusiveAccess) {
            self.tell(Notice::ReservationReleased, by, outcome);
        }
    }

    fn tell(&self, notice: Notice, except: &HostId, outcome: &mut Outcome) {
        let others = self.registrants.keys().filter(|h| *h != except);
        outcome.notices.extend(others.map(|h| (*h, notice)));
    }

    fn check_key(&self, host: &HostId, key: u64) -> Result<(), Status> {
        if self.registrants.get(host) == Some(&key) { Ok(()) } else { Err(CONFLICT) }
    }

    /// Reservation Acquire, action Acquire.
    ///
    /// # Errors
    /// As [`State::register`].
    pub fn acquire(&mut self, host: HostId, key: u64, kind: ReservationType) -> Result<Outcome, Status> {
        self.check_key(&host, key)?;
        match self.held {
            None => {
                self.held = Some(Held { kind, by: host });
                Ok(Outcome { changed: true, ..Default::default() })
            }
            // The holder may ask again for what it has.
            Some(held) if held.kind == kind && self.is_holder(&host) => Ok(Outcome::default()),
            Some(_) => Err(CONFLICT),
        }
    }

    /// Reservation Acquire, action Preempt (section 8.19.7). A host that preempts its own key keeps its registration.
    ///
    /// # Errors
    /// As [`State::register`].
    pub fn preempt(
        &mut self,
        host: HostId,
        key: u64,
        victim: u64,
        kind: ReservationType,
    ) -> Result<Outcome, Status> {
        self.check_key(&host, key)?;
        let all_hold = self.held.is_some_and(|h| h.kind.all_registrants_hold());
        if victim == 0 && !all_hold {
            return Err(INVALID);
        }
        let matches = |k: u64| victim == 0 || k == victim;
        if !self.registrants.values().any(|k| matches(*k)) {
            return Err(CONFLICT);
        }
        let takes_over = match self.held {
            Some(_) if all_hold => victim == 0,
            Some(h) => self.registrants.get(&h.by) == Some(&victim),
            None => false,
        };
        let mut outcome = Outcome { changed: true, ..Default::default() };
        let gone = self.registrants.iter().filter(|(h, k)| **h != host && matches(**k)).map(|(h, _)| *h);
        outcome.preempted = gone.collect();
        for h in &outcome.preempted {
            self.registrants.remove(h);
            outcome.notices.push((*h, Notice::RegistrationPreempted));
        }
        self.generation = self.generation.wrapping_add(1);
        if takes_over {
            let before = self.held.replace(Held { kind, by: host });
            if let Some(before) = before.filter(|b| b.kind != kind) {
                self.tell_released(before.kind, &host, &mut outcome);
            }
        } else if let Some(held) = self.held.filter(|h| all_hold && !self.is_registered(&h.by)) {
            self.held = Some(Held { by: host, ..held });
        }
        Ok(outcome)
    }

    /// Reservation Release, action Release. `kind`: RTYPE as sent.
    ///
    /// # Errors
    /// As [`State::register`].
    pub fn release(&mut self, host: HostId, key: u64, kind: u8) -> Result<Outcome, Status> {
        self.check_key(&host, key)?;
        let Some(held) = self.held else { return Ok(Outcome::default()) };
        if held.kind as u8 != kind {
            return Err(INVALID);
        }
        if !self.is_holder(&host) {
            return Ok(Outcome::default());
        }
        let mut outcome = Outcome { changed: true, ..Default::default() };
        self.held = None;
        self.tell_released(held.kind, &host, &mut outcome);
        Ok(outcome)
    }

    /// Reservation Release, action Clear.
    ///
    /// # Errors
    /// As [`State::register`].
    pub fn clear(&mut self, host: HostId, key: u64) -> Result<Outcome, Status> {
        self.check_key(&host, key)?;
        let mut outcome = Outcome { changed: true, ..Default::default() };
        self.tell(Notice::ReservationPreempted, &host, &mut outcome);
        self.registrants.clear();
        self.held = None;
        self.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: HostId = [1; 16];
    const B: HostId = [2; 16];
    const C: HostId = [3; 16];
    use ReservationType as T;

    fn add(s: &mut State, host: HostId, key: u64) {
        s.register(host, RegisterAction::Register, false, (0, key), None).expect("a new host");
    }

    #[test]
    fn keys_are_checked() {
        let mut s = State::default();
        add(&mut s, A, 10);
        assert_eq!(s.register(A, RegisterAction::Register, false, (0, 10), None), Ok(Outcome::default()));
        assert_eq!(s.register(A, RegisterAction::Register, true, (0, 11), None), Err(CONFLICT));
        assert_eq!(s.register(A, RegisterAction::Register, false, (0, 0), None), Err(INVALID));
        assert_eq!(s.register(A, RegisterAction::Replace, false, (9, 11), None), Err(CONFLICT));
        assert!(s.register(A, RegisterAction::Replace, false, (10, 11), None).is_ok());
        assert!(s.register(A, RegisterAction::Replace, true, (0, 12), None).is_ok());
        assert_eq!(s.register(B, RegisterAction::Replace, false, (0, 5), None), Err(CONFLICT));
        assert!(s.register(B, RegisterAction::Replace, true, (0, 5), None).is_ok());
        assert_eq!(s.register(C, RegisterAction::Unregister, true, (0, 0), None), Err(CONFLICT));
        assert_eq!(s.register(A, RegisterAction::Unregister, false, (11, 0), None), Err(CONFLICT));
        assert_eq!(s.generation, 4);
        assert_eq!(s.acquire(A, 11, T::WriteExclusive), Err(CONFLICT));
        assert_eq!(s.acquire(C, 0, T::WriteExclusive), Err(CONFLICT));
    }

    #[test]
    fn preempting_a_holder_takes_the_reservation() {
        let mut s = State::default();
        [(A, 1), (B, 2), (C, 3)].into_iter().for_each(|(host, key)| add(&mut s, host, key));
        assert!(s.acquire(A, 1, T::WriteExclusiveRegistrants).is_ok());
        assert_eq!(s.preempt(B, 2, 0, T::WriteExclusive), Err(INVALID));
        assert_eq!(s.preempt(B, 2, 77, T::WriteExclusive), Err(CONFLICT));
        let out = s.preempt(B, 2, 1, T::WriteExclusive).expect("A's key");
        assert_eq!(out.preempted, [A]);
        assert_eq!(
            out.notices,
            [(A, Notice::RegistrationPreempted), (C, Notice::ReservationReleased)],
            "the type has changed"
        );
        assert_eq!(s.held, Some(Held { kind: T::WriteExclusive, by: B }));
        // Of somebody who holds nothing: only the registration goes.
        let out = s.preempt(B, 2, 3, T::ExclusiveAccess).expect("C's key");
        assert_eq!((out.preempted, s.held.map(|h| h.kind)), (vec![C], Some(T::WriteExclusive)));
        // Its own: the type changes, the registration stays.
        let out = s.preempt(B, 2, 2, T::ExclusiveAccessAll).expect("its own key");
        assert!(out.preempted.is_empty() && s.is_holder(&B));
        add(&mut s, A, 1);
        assert!(s.is_holder(&A) && s.permits(&A, true) && !s.permits(&C, false));
        let out = s.preempt(A, 1, 0, T::WriteExclusive).expect("all registrants hold it");
        assert_eq!((out.preempted, s.is_holder(&A)), (vec![B], true));
    }

    #[test]
    fn release_and_clear() {
        let mut s = State::default();
        [(A, 1), (B, 2)].into_iter().for_each(|(host, key)| add(&mut s, host, key));
        assert_eq!(s.release(A, 1, 1), Ok(Outcome::default()), "nothing to release");
        assert!(s.acquire(A, 1, T::ExclusiveAccessRegistrants).is_ok());
        assert_eq!(s.release(A, 1, 1), Err(INVALID), "another type");
        assert_eq!(s.release(B, 2, 4), Ok(Outcome::default()), "not the holder");
        assert_eq!(s.release(B, 9, 4), Err(CONFLICT));
        assert_eq!(s.release(A, 1, 4).expect("the holder").notices, [(B, Notice::ReservationReleased)]);
        assert!(s.acquire(B, 2, T::WriteExclusive).is_ok());
        assert_eq!(s.clear(A, 1).expect("registered").notices, [(B, Notice::ReservationPreempted)]);
        assert_eq!((s.registrants.len(), s.held), (0, None));
    }

    /// The table once more, thought from the hosts' side: a list of (key, holds) per host and no shared holder field.
    #[derive(Default, Debug)]
    struct Model {
        hosts: [Option<u64>; 4],
        kind: Option<u8>,
        owner: Option<usize>,
    }

    impl Model {
        fn all(&self) -> bool {
            matches!(self.kind, Some(5 | 6))
        }
        fn holds(&self, h: usize) -> bool {
            if self.all() { self.hosts[h].is_some() } else { self.kind.is_some() && self.owner == Some(h) }
        }
        fn settle(&mut self) {
            let orphan = match self.owner {
                _ if self.all() => self.hosts.iter().all(Option::is_none),
                Some(o) => self.hosts[o].is_none(),
                None => true,
            };
            if orphan {
                (self.kind, self.owner) = (None, None);
            }
        }
        fn may(&self, h: usize, write: bool) -> bool {
            let registered = self.hosts[h].is_some();
            match self.kind {
                None => true,
                Some(1) => !write || self.holds(h),
                Some(2) => self.holds(h),
                Some(3 | 5) => !write || registered,
                _ => registered,
            }
        }
        /// True: the command succeeds.
        fn step(&mut self, step: Step) -> bool {
            let Step { h, what, a, b, kind, flag } = step;
            let mine = self.hosts[h];
            let ok = match what {
                0 => b != 0 && mine.is_none_or(|k| k == b),
                1 => mine.is_some_and(|k| flag || k == a),
                2 => b != 0 && (flag || mine == Some(a)),
                3 => mine == Some(a) && (self.kind.is_none() || self.kind == Some(kind) && self.holds(h)),
                4 => {
                    let hit = self.hosts.iter().flatten().any(|k| *k == b);
                    mine == Some(a) && (b == 0 && self.all() || b != 0 && hit)
                }
                5 => mine == Some(a) && self.kind.is_none_or(|k| k == kind),
                _ => mine == Some(a),
            };
            if !ok {
                return false;
            }
            match what {
                0 | 2 => self.hosts[h] = Some(b),
                1 => self.hosts[h] = None,
                3 => (self.kind, self.owner) = (Some(kind), Some(h)),
                4 => {
                    let holder_hit = self.kind.is_some()
                        && if self.all() {
                            b == 0
                        } else {
                            self.owner.and_then(|o| self.hosts[o]) == Some(b)
                        };
                    for (i, slot) in self.hosts.iter_mut().enumerate() {
                        if i != h && (b == 0 || *slot == Some(b)) {
                            *slot = None;
                        }
                    }
                    if holder_hit {
                        (self.kind, self.owner) = (Some(kind), Some(h));
                    }
                }
                5 if self.holds(h) => (self.kind, self.owner) = (None, None),
                5 => {}
                _ => *self = Model::default(),
            }
            self.settle();
            true
        }
    }

    #[derive(Clone, Copy, Debug)]
    struct Step {
        h: usize,
        what: u8,
        a: u64,
        b: u64,
        kind: u8,
        flag: bool,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let one = (0usize..4, 0u8..7, 0u64..4, 0u64..4, 1u8..7, any::<bool>())
            .prop_map(|(h, what, a, b, kind, flag)| Step { h, what, a, b, kind, flag });
        proptest::collection::vec(one, 1..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_history_agrees_with_the_model(steps in steps()) {
            let (mut s, mut m) = (State::default(), Model::default());
            let id = |h: usize| [h as u8 + 1; 16];
            for step in steps {
                let Step { h, what, a, b, kind, flag } = step;
                let rtype = ReservationType::from_u8(kind).expect("1 to 6");
                let before = s.clone();
                let result = match what {
                    0 => s.register(id(h), RegisterAction::Register, flag, (a, b), None),
                    1 => s.register(id(h), RegisterAction::Unregister, flag, (a, b), None),
                    2 => s.register(id(h), RegisterAction::Replace, flag, (a, b), None),
                    3 => s.acquire(id(h), a, rtype),
                    4 => s.preempt(id(h), a, b, rtype),
                    5 => s.release(id(h), a, kind),
                    _ => s.clear(id(h), a),
                };
                prop_assert_eq!(result.is_ok(), m.step(step), "{:?} on {:?}", step, before);
                match &result {
                    Err(_) => prop_assert_eq!(&s, &before),
                    Ok(o) => {
                        prop_assert!(o.notices.iter().all(|n| n.0 != id(h)), "nobody is told of its own deed");
                        let same = (&s.registrants, s.held, s.persistent) == (&before.registrants, before.held, before.persistent);
                        prop_assert!(o.changed || same, "a change that would not be saved");
                    }
                }
                for h in 0..4 {
                    prop_assert_eq!(s.registrants.get(&id(h)).copied(), m.hosts[h]);
                    prop_assert_eq!(s.is_holder(&id(h)), m.holds(h), "{:?}: {:?}", step, s);
                    for write in [false, true] {
                        prop_assert_eq!(s.permits(&id(h), write), m.may(h, write));
                    }
                }
                prop_assert!(s.held.is_none_or(|held| s.is_registered(&held.by)));
            }
        }
    }
}
