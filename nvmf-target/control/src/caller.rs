//! On whose behalf a thread makes a call: whoever called the method that it is made within, or the program itself.
//!
//! A method that makes other calls (`load_config`, what waited for a pool that is unlocked) makes them on the thread of whoever called
//! it, so one variable of the thread knows; and no method can forget to hand it on.

use std::cell::RefCell;

/// Calls within calls, at most: a configuration may load another one, and not itself for ever.
pub const MAX_DEPTH: usize = 8;

/// Who makes a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User, group and process; or the program.
    pub by: String,
    /// The roles that it has; the program has none.
    pub roles: Option<String>,
    /// The methods within which the call is made, the outermost first.
    pub within: Vec<String>,
}

impl Caller {
    /// Somebody at the other end of a socket.
    pub fn peer(by: String, roles: String) -> Caller {
        Caller { by, roles: Some(roles), within: Vec::new() }
    }

    /// Of a call that is made on this thread now and that does not come from a socket.
    pub fn current() -> Caller {
        let outer = CURRENT.with_borrow(Clone::clone);
        outer.unwrap_or_else(|| Caller { by: "the target".into(), roles: None, within: Vec::new() })
    }

    /// Whether the call that is under way on this thread is one of a configuration, or of the program: nobody has made this very
    /// call.
    pub fn is_configuration(&self) -> bool {
        self.roles.is_none() || self.within.len() > 1
    }

    /// For the audit log: nothing if the call is made within no other.
    pub fn within(&self) -> Option<String> {
        (!self.within.is_empty()).then(|| self.within.join(" > "))
    }

    /// Until the guard goes, calls on this thread are made within this one.
    pub fn enter(&self, method: &str) -> Entered {
        let mut inner = self.clone();
        // What others sent has an end.
        inner.within.push(method.chars().take(64).collect());
        Entered(CURRENT.replace(Some(inner)))
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Caller>> = const { RefCell::new(None) };
}

/// See [`Caller::enter`].
pub struct Entered(Option<Caller>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_within_calls_are_their_callers_and_nobodys_afterwards() {
        let peer = Caller::peer("uid 7".into(), "security".into());
        assert_eq!((peer.within(), Caller::current().by), (None, "the target".into()));
        {
            let _outer = peer.enter("load_config");
            assert_eq!(Caller::current().within().as_deref(), Some("load_config"));
            assert!(!Caller::current().is_configuration(), "the peer's own call");
            {
                let _inner = Caller::current().enter("load_config");
                let now = Caller::current();
                assert_eq!((now.by.as_str(), now.within.len(), now.is_configuration()), ("uid 7", 2, true));
                assert_eq!(now.within().as_deref(), Some("load_config > load_config"));
            }
            assert_eq!(Caller::current().within.len(), 1);
            let elsewhere = std::thread::spawn(Caller::current).join().unwrap();
            assert_eq!((elsewhere.by.as_str(), elsewhere.roles), ("the target", None));
        }
        assert_eq!(Caller::current().roles, None);
    }
}
