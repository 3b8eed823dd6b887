//! Keys for TLS that DH-HMAC-CHAP has generated (secure channel concatenation, TP 8018). They live here and nowhere else.
//!
//! ```text
//!   unused --(Connect of an Admin Queue over TLS with it)--> in use by that controller --> wiped
//!      |                                                       its host has another one, or it ends
//!      +--(no Connect in time, the host is taken off the list, it authenticates once more)--> wiped
//! ```
//!
//! Invariants: a key opens the association of one controller and its I/O queues; a connection has made one unused key at most.

use std::sync::{Arc, Mutex, Weak};

use cryptfold_nvmf_auth::{Identity, TlsPsk};

use crate::controller::Controller;
use crate::subsystem::locked;

/// Unused keys of one host and subsystem at most: beyond it the oldest goes.
const UNUSED_MAX: usize = 64;

struct Key {
    key: TlsPsk,
    /// The connection that made it.
    maker: u64,
    user: Option<Weak<Controller>>,
}

impl Key {
    fn names(&self) -> Option<(&str, &str)> {
        Identity::parse(&self.key.identity).map(|i| (i.host, i.subsystem))
    }

    fn is_used_by(&self, controller: &Controller) -> bool {
        self.user.as_ref().is_some_and(|u| std::ptr::eq(u.as_ptr(), controller))
    }
}

/// The generated keys of all hosts, oldest first.
#[derive(Default)]
pub(crate) struct GeneratedKeys(Mutex<Vec<Key>>);

impl GeneratedKeys {
    /// A connection without TLS has made a key. It takes the place of the one that the connection has made before.
    pub fn add(&self, key: TlsPsk, maker: u64) {
        let key = Key { key, maker, user: None };
        let mut keys = locked(&self.0);
        keys.retain(|k| k.maker != maker || k.user.is_some());
        let of_host = |k: &Key| k.user.is_none() && k.names() == key.names();
        if keys.iter().filter(|k| of_host(k)).count() >= UNUSED_MAX
            && let Some(oldest) = keys.iter().position(of_host)
        {
            keys.remove(oldest);
        }
        keys.push(key);
    }

    /// A controller's host has made a key over TLS: it takes the place of the one in use. `false`: there is none.
    pub fn replace(&self, key: TlsPsk, controller: &Controller) -> bool {
        let mut keys = locked(&self.0);
        let old = keys.iter_mut().find(|k| k.is_used_by(controller));
        old.map(|old| old.key = key).is_some()
    }

    /// The key of an identity.
    pub fn find(&self, identity: &str) -> Option<TlsPsk> {
        locked(&self.0).iter().find(|k| k.key.identity == identity).map(|k| k.key.clone())
    }

    /// An Admin Queue with this identity has made a controller; `false` if the key is another's, or gone.
    pub fn claim(&self, identity: &str, controller: &Arc<Controller>) -> bool {
        let mut keys = locked(&self.0);
        let key = keys.iter_mut().find(|k| k.key.identity == identity && k.user.is_none());
        key.map(|key| key.user = Some(Arc::downgrade(controller))).is_some()
    }

    /// Whether the key of this identity is in use by this controller.
    pub fn is_used(&self, identity: &str, controller: &Controller) -> bool {
        locked(&self.0).iter().any(|k| k.key.identity == identity && k.is_used_by(controller))
    }

    /// The time of a key to be used is over.
    pub fn expire(&self, identity: &str) {
        locked(&self.0).retain(|k| k.key.identity != identity || k.user.is_some());
    }

    /// A controller has ended.
    pub fn ended(&self, controller: &Controller) {
        locked(&self.0).retain(|k| !k.is_used_by(controller));
    }

    /// A host may not use a subsystem any more; `None`: no host may.
    pub fn wipe(&self, subsystem: &str, host: Option<&str>) {
        let gone =
            |k: &Key| k.names().is_some_and(|(h, s)| s == subsystem && host.is_none_or(|host| host == h));
        locked(&self.0).retain(|k| !gone(k));
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        locked(&self.0).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cryptfold_nvmf_auth::HashId;
    use cryptfold_reactor::SecretBytes;

    #[test]
    fn unused_keys_have_a_limit() {
        let keys = GeneratedKeys::default();
        let key = |host: &str, n: u64| TlsPsk {
            identity: format!("NVMe1G01 {host} nqn.s {n}"),
            key: Arc::new(SecretBytes::from_slice(&[n as u8; 32])),
            hash: HashId::Sha256,
        };
        keys.add(key("nqn.other", 0), 1000);
        for n in 0..=UNUSED_MAX as u64 {
            keys.add(key("nqn.h", n), n);
        }
        assert_eq!(keys.count(), UNUSED_MAX + 1);
        assert_eq!(keys.find(&key("nqn.h", 0).identity), None, "the oldest of the host");
        assert_eq!(keys.find(&key("nqn.h", 1).identity), Some(key("nqn.h", 1)));
        assert!(keys.find(&key("nqn.other", 0).identity).is_some(), "another host's stays");
        keys.add(key("nqn.h", 7000), 5);
        assert_eq!(keys.find(&key("nqn.h", 5).identity), None, "the same connection's");
        keys.wipe("nqn.s", Some("nqn.h"));
        assert_eq!(keys.count(), 1);
        keys.expire(&key("nqn.other", 0).identity);
        assert_eq!(keys.count(), 0);
    }
}
