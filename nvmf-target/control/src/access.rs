//! Who is at the other end of the control socket, and what that user may do there.
//!
//! The kernel says who connected (SO_PEERCRED: user and primary group at the time of the connect). Root and the target's own
//! user may do everything: they can read its keys and memory anyway. Others may do what roles they were granted say.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::Value;

use crate::caller::Caller;
use crate::control::Control;
use crate::jsonrpc::{Handler, RpcError, RpcResult};
use crate::table::Role;

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
}

impl Peer {
    /// Root and the target's own user.
    pub fn may_everything(&self, own_uid: u32) -> bool {
        self.uid == 0 || self.uid == own_uid
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {} gid {} pid {}", self.uid, self.gid, self.pid)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Uid(u32),
    Gid(u32),
}

/// A role for a user or a group: "viewer=uid:1000", "operator=gid:33".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    role: Role,
    who: Who,
}

impl FromStr for Grant {
    type Err = String;
    fn from_str(s: &str) -> Result<Grant, String> {
        let bad = || {
            format!(
                "\"{s}\" grants no role; ROLE=uid:NUMBER or ROLE=gid:NUMBER does, ROLE: viewer, operator or security"
            )
        };
        let (role, who) = s.split_once('=').ok_or_else(bad)?;
        let role = match role {
            "viewer" => Role::Viewer,
            "operator" => Role::Operator,
            "security" => Role::Security,
            _ => return Err(bad()),
        };
        let (kind, number) = who.split_once(':').ok_or_else(bad)?;
        let number = number.parse().map_err(|_| bad())?;
        match kind {
            "uid" => Ok(Grant { role, who: Who::Uid(number) }),
            "gid" => Ok(Grant { role, who: Who::Gid(number) }),
            _ => Err(bad()),
        }
    }
}

/// The roles of one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Roles {
    viewer: bool,
    operator: bool,
    security: bool,
}

impl Roles {
    const ALL: Roles = Roles { viewer: true, operator: true, security: true };

    fn of(peer: Peer, own_uid: u32, grants: &[Grant]) -> Roles {
        if peer.may_everything(own_uid) {
            return Roles::ALL;
        }
        let mut roles = Roles::default();
        for grant in grants {
            if grant.who == Who::Uid(peer.uid) || grant.who == Who::Gid(peer.gid) {
                match grant.role {
                    Role::Viewer => roles.viewer = true,
                    Role::Operator => roles.operator = true,
                    Role::Security => roles.security = true,
                    Role::Both => roles = Roles::ALL,
                }
            }
        }
        roles
    }

    fn allow(self, role: Role) -> bool {
        match role {
            Role::Viewer => self != Roles::default(),
            Role::Operator => self.operator,
            Role::Security => self.security,
            Role::Both => self.operator && self.security,
        }
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [(self.viewer, "viewer"), (self.operator, "operator"), (self.security, "security")];
        let held: Vec<&str> = names.iter().filter_map(|(held, name)| held.then_some(*name)).collect();
        f.write_str(if held.is_empty() { "no role" } else { "" })?;
        f.write_str(&held.join(", "))
    }
}

/// -1, as the operating system says it.
fn denied(control: &Control, peer: Peer, what: &'static str, why: &str) -> RpcError {
    control.refusals.add(peer, what, why);
    RpcError::new(RpcError::EPERM, format!("{what}: {why}: Operation not permitted"))
}

/// One connection to the control socket.
struct Session {
    control: Arc<Control>,
    peer: Peer,
    roles: Roles,
}

impl Handler for Session {
    fn call(&self, method: &str, params: Option<&Value>) -> RpcResult {
        if let Some(m) = self.control.table().get(method)
            && !self.roles.allow(m.role_of(params))
        {
            let role = m.role_of(params);
            let why = format!("the role {role} is needed, uid {} has {}", self.peer.uid, self.roles);
            return Err(denied(&self.control, self.peer, m.name, &why));
        }
        self.control.call_by(&Caller::peer(self.peer.to_string(), self.roles.to_string()), method, params)
    }
}

/// The handler for a peer.
///
/// # Errors
/// It has no role at all.
pub(crate) fn session(control: &Arc<Control>, peer: Peer) -> Result<Arc<dyn Handler>, RpcError> {
    let roles = Roles::of(peer, crate::peer::own_uid(), &control.config.grants);
    if roles == Roles::default() {
        let why = format!(
            "uid {} and gid {} have no role on this socket (cryptfold target --role)",
            peer.uid, peer.gid
        );
        return Err(denied(control, peer, "connect", &why));
    }
    Ok(Arc::new(Session { control: control.clone(), peer, roles }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, gid: u32) -> Peer {
        Peer { pid: 1, uid, gid }
    }

    #[test]
    fn grants_are_read_or_refused_with_what_would_be_right() {
        assert_eq!("viewer=uid:1000".parse(), Ok(Grant { role: Role::Viewer, who: Who::Uid(1000) }));
        assert_eq!("security=gid:0".parse(), Ok(Grant { role: Role::Security, who: Who::Gid(0) }));
        for bad in [
            "",
            "viewer",
            "viewer=1000",
            "root=uid:1",
            "viewer=uid:-1",
            "viewer=uid:",
            "viewer=user:1",
            "both=uid:1",
        ] {
            let e = bad.parse::<Grant>().unwrap_err();
            assert!(e.contains("ROLE=uid:NUMBER"), "{e}");
        }
    }

    /// Every combination of roles against every role that a method can have.
    #[test]
    fn what_roles_allow() {
        for bits in 0..8u8 {
            let roles = Roles { viewer: bits & 1 != 0, operator: bits & 2 != 0, security: bits & 4 != 0 };
            assert_eq!(roles.allow(Role::Viewer), bits != 0);
            assert_eq!(roles.allow(Role::Operator), bits & 2 != 0);
            assert_eq!(roles.allow(Role::Security), bits & 4 != 0);
            assert_eq!(roles.allow(Role::Both), bits & 6 == 6);
        }
    }

    #[test]
    fn root_and_the_targets_own_user_have_all_and_others_what_was_granted() {
        let grants: Vec<Grant> =
            ["viewer=uid:7", "operator=gid:8", "security=uid:7"].map(|g| g.parse().unwrap()).into();
        let of = |p| Roles::of(p, 5, &grants);
        assert_eq!((of(peer(0, 9)), of(peer(5, 9))), (Roles::ALL, Roles::ALL));
        assert_eq!(of(peer(7, 9)), Roles { viewer: true, operator: false, security: true });
        assert_eq!(of(peer(7, 8)), Roles::ALL);
        assert_eq!(of(peer(9, 8)), Roles { operator: true, ..Roles::default() });
        assert_eq!(of(peer(8, 7)), Roles::default(), "a user's number is no group's");
        assert_eq!(Roles::of(peer(1, 0), 5, &[]), Roles::default(), "root's group is not root");
    }
}
