//! In-band authentication of a queue's host: DH-HMAC-CHAP messages to and from the machine of `nvmf-auth`.
//!
//! A transaction starts with Negotiate, with the keys as they are then. It may be the first one (the queue does nothing
//! else before) or a later one (the host proves again who it is while commands flow). Whatever fails ends the
//! connection, after the failure message has been sent, and is written to the audit log.

use std::sync::Arc;
use std::time::Duration;

use cryptfold_nvmf_auth::{
    Concat, Controller as Machine, DhGroup, Entropy, Failure, HashId, Names, Progress, TlsPsk,
};
use cryptfold_nvmf_spec::fabrics::Authentication;
use cryptfold_nvmf_spec::pdu::ADMIN_CAPSULE_DATA_BYTES;
use cryptfold_nvmf_spec::{Sqe, Status};
use cryptfold_reactor as reactor;
use cryptfold_reactor::memory::{Buf, SgList};

use super::slot::Phase;
use super::state::{Event, State};
use super::{Conn, Inner};
use crate::access::off_reactor;
use crate::audit;
use crate::group::Group;
use crate::port::PortSecurity;

/// Longest message that is taken or asked for, bytes; the Linux host asks for as much.
pub(super) const MAX_MESSAGE_BYTES: u32 = 4096;
const _: () = assert!(MAX_MESSAGE_BYTES <= ADMIN_CAPSULE_DATA_BYTES);

/// Where the queue's authentication is.
#[derive(Default)]
pub(super) enum Auth {
    /// None is under way.
    #[default]
    Idle,
    /// One is.
    Running(Box<Machine>),
    /// The thread for slow work has it.
    Away,
}

impl Auth {
    /// Whether none is under way.
    pub fn is_idle(&self) -> bool {
        matches!(self, Auth::Idle)
    }
}

/// Checks the fields and that the length is the SGL's.
fn check(sqe: &Sqe, command: &Authentication) -> Result<(), Status> {
    command.check()?;
    let len = command.len.get();
    if len == 0 || len > MAX_MESSAGE_BYTES || len != sqe.sgl.length.get() {
        return Err(Status::INVALID_FIELD.with_dnr());
    }
    Ok(())
}

impl Conn {
    /// Checks an Authentication Send or Receive before its data is taken.
    pub(super) fn admit_auth(
        &self,
        inner: &Inner,
        sqe: &Sqe,
        command: &Authentication,
    ) -> Result<(), Status> {
        let queue = inner.queue.as_ref().ok_or(Status::COMMAND_SEQUENCE_ERROR)?;
        let controller = &queue.controller;
        let known = controller.subsystem.access(&controller.host.nqn).dhchap.is_some();
        // Where nothing has to be proven, there is nothing to prove it with.
        if !known && self.state.get() != State::Authenticating && inner.auth.is_idle() {
            return Err(Status::INVALID_OPCODE.with_dnr());
        }
        check(sqe, command)
    }

    /// Authentication Send: a message from the host.
    pub(super) fn auth_send(&self, inner: &mut Inner, index: u16) {
        let message = std::mem::take(&mut inner.slots[index].data);
        let mut machine = match std::mem::take(&mut inner.auth) {
            Auth::Running(machine) => machine,
            Auth::Idle => match self.auth_machine(inner) {
                Some(machine) => {
                    inner.auth_since = reactor::now();
                    machine
                }
                None => return self.auth_failed(inner, index, Status::ACCESS_DENIED, Failure::Failed),
            },
            Auth::Away => {
                // Messages follow each other; the one that is being worked on ends the transaction.
                inner.auth = Auth::Away;
                return self.complete(inner, index, Status::COMMAND_SEQUENCE_ERROR.with_dnr(), 0);
            }
        };
        let entropy = Entropy::draw(reactor::fill_random);
        let threads = inner.wire.as_ref().is_some_and(|w| w.descriptor().is_some());
        let Some(me) = self.reference().filter(|_| threads) else {
            machine.receive(&message, &entropy);
            return self.auth_received(inner, index, machine);
        };
        inner.auth = Auth::Away;
        inner.slots[index].phase = Phase::Executing;
        inner.executing += 1;
        let message = message.to_vec();
        let job = move || {
            machine.receive(&message, &entropy);
            me.send(move |conn| {
                conn.finished(index, |conn, inner| conn.auth_received(inner, index, machine));
            });
        };
        if let Err(job) = off_reactor(Box::new(job)) {
            job();
        }
    }

    /// A machine with the keys as they are now.
    fn auth_machine(&self, inner: &Inner) -> Option<Box<Machine>> {
        let controller = &inner.queue.as_ref()?.controller;
        let subsystem = &controller.subsystem;
        let access = subsystem.access(&controller.host.nqn);
        let names = Names { host: controller.host.nqn.clone(), subsystem: subsystem.nqn().into() };
        let offer = self.group.upgrade()?.target.offer();
        let (host, own) = (access.dhchap?.key, access.dhchap_ctrlr.map(|k| k.key));
        Some(Box::new(Machine::new(names, host, own, offer, self.concatenation(inner))))
    }

    /// What the host may want of secure channel concatenation on this queue.
    fn concatenation(&self, inner: &Inner) -> &'static [Concat] {
        let admin = inner.queue.as_ref().is_some_and(|q| q.qid.is_admin());
        let tls = inner.wire.as_ref().and_then(|w| w.tls());
        match (self.port.security, tls) {
            (PortSecurity::Concatenation, None) if admin => &[Concat::New],
            (PortSecurity::Concatenation, Some(t)) if admin && t.generated.is_some() => {
                &[Concat::None, Concat::Replace]
            }
            _ => &[Concat::None],
        }
    }

    /// Whether the host has to come back with TLS, and may do no more here than the preparations that hosts make on an Admin Queue.
    pub(super) fn is_provisional(&self, inner: &Inner) -> bool {
        self.port.security == PortSecurity::Concatenation
            && inner.wire.as_ref().is_some_and(|w| w.tls().is_none())
            && inner.queue.as_ref().is_some_and(|q| !q.controller.is_discovery())
    }

    fn auth_received(&self, inner: &mut Inner, index: u16, mut machine: Box<Machine>) {
        inner.auth = Auth::Idle;
        match machine.progress() {
            Progress::Failed(why @ Failure::Failed) => {
                // Failure2: the host has said that it does not trust us.
                self.auth_failed(inner, index, Status::SUCCESS, why);
            }
            Progress::Failed(why) => self.auth_failed(inner, index, Status::COMMAND_SEQUENCE_ERROR, why),
            Progress::Done(hash, group) => {
                self.authenticated(inner, hash, group, machine.take_key());
                self.complete(inner, index, Status::SUCCESS, 0);
            }
            Progress::Receive | Progress::Send => {
                inner.auth = Auth::Running(machine);
                self.complete(inner, index, Status::SUCCESS, 0);
            }
        }
    }

    /// Authentication Receive: the host fetches a message.
    pub(super) fn auth_receive(&self, inner: &mut Inner, index: u16) {
        let room = inner.slots[index].sqe.sgl.length.get() as usize;
        let mut machine = match std::mem::take(&mut inner.auth) {
            Auth::Running(machine) => machine,
            other => {
                inner.auth = other;
                return self.complete(inner, index, Status::COMMAND_SEQUENCE_ERROR.with_dnr(), 0);
            }
        };
        let message = match machine.send() {
            Some(m) if m.len() <= room => m,
            Some(_) => return self.auth_failed(inner, index, Status::INVALID_FIELD, Failure::Payload),
            None => {
                return self.auth_failed(inner, index, Status::COMMAND_SEQUENCE_ERROR, Failure::Message);
            }
        };
        // The host gets as many bytes as it asked for.
        let mut data = Buf::alloc(room);
        let target = data.make_mut();
        target[..message.len()].copy_from_slice(&message);
        target[message.len()..].fill(0);
        self.complete_read(inner, index, SgList::from(data));
        match machine.progress() {
            Progress::Done(hash, group) => self.authenticated(inner, hash, group, machine.take_key()),
            Progress::Failed(why) => self.auth_over(inner, why),
            Progress::Receive | Progress::Send => inner.auth = Auth::Running(machine),
        }
    }

    /// `key` was generated for TLS. What tells the host of it is sent after this.
    fn authenticated(&self, inner: &mut Inner, hash: HashId, group: DhGroup, key: Option<TlsPsk>) {
        let (Some(queue), Some(group_here)) = (&inner.queue, self.group.upgrade()) else { return };
        if let Some(key) = key {
            let target = &group_here.target;
            if self.is_provisional(inner) {
                self.expire_later(key.identity.clone(), &group_here);
                target.generated.add(key, self.id);
            } else {
                // It ends with the controller, which this queue keeps: it is there.
                target.generated.replace(key, &queue.controller);
            }
        }
        queue.stats.authenticated(hash, group);
        tracing::debug!("{}: {} authenticated", self.peer, queue.controller.host.nqn);
        if self.state.get() == State::Authenticating {
            self.advance(inner, Event::Authenticated);
            self.ready_queue(inner);
        }
    }

    /// A key that no controller uses in the time that an authentication may take is wiped.
    fn expire_later(&self, identity: String, group: &Group) {
        let target = Arc::downgrade(&group.target);
        let limit = Duration::from_millis(self.options.auth_timeout_ms.into());
        reactor::spawn_local(async move {
            reactor::sleep(limit).await;
            if let Some(target) = target.upgrade() {
                target.generated.expire(&identity);
            }
        })
        .detach();
    }

    fn auth_failed(&self, inner: &mut Inner, index: u16, status: Status, why: Failure) {
        let status = if status.is_success() { status } else { status.with_dnr() };
        self.complete(inner, index, status, 0);
        self.auth_over(inner, why);
    }

    /// One failure is the end, once what is queued has been sent.
    fn auth_over(&self, inner: &mut Inner, why: Failure) {
        if let Some(queue) = &inner.queue {
            let c = &queue.controller;
            audit::refused(&self.peer, &c.host.nqn, c.subsystem.nqn(), "dh-hmac-chap", why.name());
        }
        inner.closing = true;
    }
}
