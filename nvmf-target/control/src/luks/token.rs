//! Which objects of the key server are a volume's key, headers that name other ones than before, and keys of volumes that are in use
//! without one.
//!
//! Invariants:
//! - A server that does not answer, and a proof that takes long, hold back no host of a volume that has data: such a key is had on a
//!   thread of its own, one at a time. The volume's thread stays free to see the next header.
//! - A header that names other objects changes nothing until these are proven to be the same key; the key that is in use is
//!   watched until then.
//! - While the objects before are in a state that fences, others do not take their place: who may write a header could undo what the
//!   key server wants.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cryptfold_bdev_crypto::gate::{Access, KeyGate};
use cryptfold_bdev_crypto::luks::Switch;
use uuid::Uuid;

use super::record::Stored;
use super::{Found, Verdict, Volume};
use crate::control::{Control, lock};
use crate::kms::{KeyOptions, OnEnd, Policy, Proven, Unproven};

/// A proven key, and the objects that it is.
type Had = (Proven, Vec<String>);

/// An attempt to have a key, on a thread of its own.
pub(super) struct Trial {
    of: Subject,
    /// It is of no use any more, as there is another header.
    superseded: AtomicBool,
    state: Mutex<TrialState>,
}

/// What is tried: another header is another attempt.
#[derive(PartialEq, Eq)]
struct Subject {
    uuid: Uuid,
    identity: [u8; 32],
    objects: Option<Vec<String>>,
    /// Those of the record.
    before: Option<Vec<String>>,
}

#[derive(Default)]
struct TrialState {
    /// Its thread has ended.
    over: bool,
    result: Option<Result<Had, Unproven>>,
    /// Why it came to nothing, when that was told.
    failed: Option<String>,
    /// A look has asked for it since the last one ended.
    wanted: bool,
}

/// Another look follows. With why the attempt before came to nothing.
pub(super) struct UnderWay(pub Option<String>);

impl Trial {
    /// Whether it is with a record in the pool.
    #[cfg(test)]
    pub(super) fn has_record(&self) -> bool {
        self.of.before.is_some()
    }

    fn ends(&self, result: Result<Had, Unproven>) {
        let mut state = lock(&self.state);
        if !std::mem::replace(&mut state.over, true) {
            state.result = Some(result);
        }
    }
}

/// Ends an attempt, also in a panic, and asks for a look.
struct Ends<'a>(&'a Trial, &'a Switch);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.ends(Err(Unproven::NotYet("the thread that fetched the key has ended".into())));
        self.1.ask();
    }
}

impl Volume {
    /// The volume's key, proven, watched from now on; with the objects that it is.
    pub(super) fn key(
        &self,
        c: &Control,
        found: &Found,
        stored: Option<&Stored>,
    ) -> Result<(Arc<KeyGate>, Vec<String>), Unproven> {
        let (proven, objects) = self.fetch(c, found, stored)?;
        if let Some(stored) = stored {
            self.note(c, stored, &objects)?;
        }
        Ok((self.take(c, proven)?, objects))
    }

    fn fetch(&self, c: &Control, found: &Found, stored: Option<&Stored>) -> Result<Had, Unproven> {
        let objects = self.objects(c, found, stored)?;
        Ok((self.prove(c, found, &objects, stored)?, objects))
    }

    pub(super) fn take(&self, c: &Control, proven: Proven) -> Result<Arc<KeyGate>, Unproven> {
        let gate = c.kms.watch_proven(proven)?;
        *lock(&self.gate) = Some(gate.clone());
        Ok(gate)
    }

    /// As the header says; else as it was; else the key has the header's UUID for its name.
    fn objects(&self, c: &Control, found: &Found, stored: Option<&Stored>) -> Result<Vec<String>, Unproven> {
        let known = found.objects.as_ref().or(stored.map(|s| &s.objects).filter(|o| !o.is_empty()));
        if let Some(objects) = known {
            return Ok(objects.clone());
        }
        let uuid = found.header.uuid.to_string();
        let named = c.kms.named(&self.options.kms_server, &uuid).map_err(Unproven::NotYet)?;
        let n = named.len();
        if n == 1 {
            return Ok(named);
        }
        let why = format!(
            "the header has no token of type \"cryptfold-kmip\", and {n} keys at the server are named {uuid}"
        );
        // The UUID is known when the header is written: its key comes after it.
        Err(if n == 0 { Unproven::NotYet(why) } else { Unproven::Refused(why) })
    }

    fn key_options(&self, objects: &[String]) -> KeyOptions {
        let fence = OnEnd::Fence;
        let policy = Policy { deactivated: fence, compromised: fence, destroyed: fence, not_found: fence };
        KeyOptions {
            name: self.key_name(),
            server: self.options.kms_server.clone(),
            objects: objects.to_vec(),
            policy,
            device: Some(self.options.name.clone()),
        }
    }

    fn prove(
        &self,
        c: &Control,
        found: &Found,
        objects: &[String],
        stored: Option<&Stored>,
    ) -> Result<Proven, Unproven> {
        let before = stored.filter(|s| !s.objects.is_empty() && s.objects != objects);
        let usable_before = || {
            let Some(before) = before else { return Ok(()) };
            let of_before = |why| {
                let before = before.objects.join(", ");
                format!("the header names another key object; of the one before ({before}) {why}")
            };
            c.kms.usable(&self.key_options(&before.objects)).map_err(|e| match e {
                Unproven::NotYet(why) => Unproven::NotYet(of_before(why)),
                Unproven::Ended(why) => Unproven::Ended(of_before(why)),
                Unproven::Refused(why) => Unproven::Refused(of_before(why)),
            })
        };
        usable_before()?;
        let digest = &found.payload.digest;
        let proven = c.kms.prove(self.key_options(objects), |key| {
            if found.payload.key_bytes.is_some_and(|n| n as usize != key.len()) {
                return Err(format!("the key has {} bytes, not as many as the header's", key.len()));
            }
            digest.prove(key, self.options.max_iterations).map_err(|e| e.to_string())
        })?;
        // The proof takes as long as the header wants.
        usable_before()?;
        Ok(proven)
    }

    /// Records the objects, durably.
    fn note(&self, c: &Control, stored: &Stored, objects: &[String]) -> Result<(), Unproven> {
        if stored.objects == objects {
            return Ok(());
        }
        self.store(c, &Stored { objects: objects.to_vec(), ..stored.clone() }).map_err(Unproven::NotYet)
    }

    pub(super) fn note_and_take(
        &self,
        c: &Control,
        stored: &Stored,
        (proven, objects): Had,
    ) -> Result<Arc<KeyGate>, Unproven> {
        self.note(c, stored, &objects)?;
        self.take(c, proven)
    }

    /// Bound, and the header names other objects than those that are watched.
    pub(super) fn renamed(self: &Arc<Self>, c: &Control, found: &Found, stored: &Stored) -> Verdict {
        // What was wrong is said until it is known to be otherwise.
        let reason = self.switch.status()["reason"].as_str().map(str::to_owned);
        let Ok(result) = self.tried(c, found, Some(stored)) else {
            return Verdict { reason, ..self.still_bound(stored) };
        };
        // The key was fenced while the other objects were proven: they do not take its place.
        if lock(&self.gate).as_ref().is_some_and(|gate| matches!(gate.access(), Access::Fenced)) {
            return Verdict { reason, again: true, ..self.still_bound(stored) };
        }
        match result.and_then(|had| self.note_and_take(c, stored, had)) {
            Ok(gate) => self.now_bound(found, gate, stored),
            // It may get better: tried again when it is looked at again.
            Err(Unproven::NotYet(why) | Unproven::Ended(why)) => {
                Verdict { reason: Some(why), again: true, ..self.still_bound(stored) }
            }
            Err(refused @ Unproven::Refused(_)) => {
                let reason = Some(format!("the header names another key object: {refused}"));
                if let Some(trial) = lock(&self.trial).as_ref() {
                    lock(&trial.state).result = Some(Err(refused));
                }
                Verdict { reason, ..self.still_bound(stored) }
            }
        }
    }

    /// What became of the attempt to have the key that a header asks for; begins one if there is none.
    pub(super) fn tried(
        self: &Arc<Self>,
        c: &Control,
        found: &Found,
        stored: Option<&Stored>,
    ) -> Result<Result<Had, Unproven>, UnderWay> {
        let of = Subject {
            uuid: found.header.uuid,
            identity: found.payload.identity(),
            objects: found.objects.clone(),
            before: stored.map(|s| s.objects.clone()),
        };
        let mut current = lock(&self.trial);
        let mut failed = None;
        if let Some(trial) = current.as_ref() {
            let mut state = lock(&trial.state);
            trial.superseded.store(trial.of != of, Ordering::Relaxed);
            if trial.of == of {
                state.wanted = true;
                if let Some(result) = state.result.take() {
                    state.failed = result.as_ref().err().map(ToString::to_string);
                    return Ok(result);
                }
                failed.clone_from(&state.failed);
            }
            // Another one's end asks for a look as well: hosts get no more than one thread.
            if !state.over {
                return Err(UnderWay(failed));
            }
        }
        let state = TrialState { failed: failed.clone(), wanted: true, ..TrialState::default() };
        let trial = Arc::new(Trial { of, superseded: AtomicBool::new(false), state: Mutex::new(state) });
        let (me, control, mine) = (self.clone(), c.weak(), trial.clone());
        let (found, stored) = (found.clone(), stored.cloned());
        let spawned = std::thread::Builder::new().name("luks key".into()).spawn(move || {
            let _ends = Ends(&mine, &me.switch);
            let Some(c) = control.upgrade() else { return };
            mine.ends(me.attempt(&c, &found, stored.as_ref(), &mine));
        });
        if let Err(error) = spawned {
            *current = None;
            return Ok(Err(Unproven::NotYet(format!("no thread to fetch the key: {error}"))));
        }
        *current = Some(trial);
        Err(UnderWay(failed))
    }

    /// On the attempt's own thread.
    fn attempt(
        &self,
        c: &Control,
        found: &Found,
        stored: Option<&Stored>,
        trial: &Trial,
    ) -> Result<Had, Unproven> {
        let had = self.fetch(c, found, stored)?;
        if stored.is_none() {
            // The way through a large map is for a key that is there.
            self.check_unkeyed(c, found, || !trial.superseded.load(Ordering::Relaxed))?;
        }
        // It took its time: a key that ended meanwhile would be taken only to fence.
        c.kms.usable(&self.key_options(&had.1))?;
        Ok(had)
    }

    /// After a look: an attempt that it did not ask for is none of the header that is there.
    pub(super) fn end_trial(&self) {
        let mut current = lock(&self.trial);
        let goes_on = |trial: &Arc<Trial>| {
            let mut state = lock(&trial.state);
            let wanted = std::mem::take(&mut state.wanted);
            trial.superseded.store(!wanted, Ordering::Relaxed);
            wanted || !state.over
        };
        *current = current.take().filter(goes_on);
    }
}
