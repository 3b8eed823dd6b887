//! Which objects of the key server are a volume's key, and headers that name other ones than before.
//!
//! Invariants:
//! - A header that names other objects changes nothing until these are proven to be the same key; the key that is in use is
//!   watched until then. Meanwhile the volume's thread stays free to see the next header: a server that does not answer holds
//!   nothing up.
//! - While the objects before are in a state that fences, others do not take their place: who may write a header could undo what the
//!   key server wants.

use std::sync::{Arc, Mutex};

use cryptfold_bdev_crypto::gate::{Access, KeyGate};

use super::record::Stored;
use super::{Found, Verdict, Volume};
use crate::control::{Control, lock};
use crate::kms::{KeyOptions, OnEnd, Policy, Proven, Unproven};

/// An attempt to have a key by other objects, on a thread of its own.
pub(super) struct Trial {
    objects: Vec<String>,
    result: Mutex<Option<Result<Proven, Unproven>>>,
}

impl Volume {
    /// The volume's key, proven, watched from now on; with the objects that it is.
    pub(super) fn key(
        &self,
        c: &Control,
        found: &Found,
        stored: Option<&Stored>,
    ) -> Result<(Arc<KeyGate>, Vec<String>), Unproven> {
        let objects = self.objects(c, found, stored)?;
        let proven = self.prove(c, found, &objects, stored)?;
        if let Some(stored) = stored {
            self.note(c, stored, &objects)?;
        }
        Ok((self.take(c, proven)?, objects))
    }

    fn take(&self, c: &Control, proven: Proven) -> Result<Arc<KeyGate>, Unproven> {
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

    /// Bound, and the header names other objects than those that are watched.
    pub(super) fn renamed(
        self: &Arc<Self>,
        c: &Control,
        found: &Found,
        stored: &Stored,
        objects: &[String],
    ) -> Verdict {
        let mut trial = lock(&self.trial);
        // What was wrong is said until it is known to be otherwise.
        let reason = self.switch.status()["reason"].as_str().map(str::to_owned);
        let under_way = trial.as_ref().filter(|t| t.objects == objects).cloned();
        let Some(current) = under_way else {
            *trial = self.try_objects(c, found, stored, objects);
            return Verdict { reason, again: trial.is_none(), ..self.still_bound(stored) };
        };
        let Some(result) = lock(&current.result).take() else {
            return Verdict { reason, ..self.still_bound(stored) };
        };
        // The key was fenced while the other objects were proven: they do not take its place.
        if lock(&self.gate).as_ref().is_some_and(|gate| matches!(gate.access(), Access::Fenced)) {
            *trial = None;
            return Verdict { reason, again: true, ..self.still_bound(stored) };
        }
        let taken = result.and_then(|proven| {
            self.note(c, stored, objects)?;
            self.take(c, proven)
        });
        match taken {
            Ok(gate) => {
                *trial = None;
                self.now_bound(found, gate, stored)
            }
            // It may get better: tried again when it is looked at again.
            Err(Unproven::NotYet(why) | Unproven::Ended(why)) => {
                *trial = None;
                Verdict { reason: Some(why), again: true, ..self.still_bound(stored) }
            }
            Err(refused @ Unproven::Refused(_)) => {
                let reason = Some(format!("the header names another key object: {refused}"));
                *lock(&current.result) = Some(Err(refused));
                Verdict { reason, ..self.still_bound(stored) }
            }
        }
    }

    fn try_objects(
        self: &Arc<Self>,
        c: &Control,
        found: &Found,
        stored: &Stored,
        objects: &[String],
    ) -> Option<Arc<Trial>> {
        let trial = Arc::new(Trial { objects: objects.to_vec(), result: Mutex::default() });
        let (me, control, current) = (self.clone(), c.weak(), trial.clone());
        let (found, stored) = (found.clone(), stored.clone());
        let spawned = std::thread::Builder::new().name("luks key".into()).spawn(move || {
            let Some(c) = control.upgrade() else { return };
            let result = me.prove(&c, &found, &current.objects, Some(&stored));
            *lock(&current.result) = Some(result);
            me.switch.ask();
        });
        spawned.inspect_err(|error| tracing::error!(%error, "no thread to fetch a key")).ok().map(|_| trial)
    }
}
