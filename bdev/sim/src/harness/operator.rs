//! What an operator does to the stack's volumes while workers use them: snapshots, clones, deletions, resizing.
//!
//! Owns the table of volumes. One that is being made or deleted when the power fails may be there afterwards or not; when it
//! is, it has what it has to have.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use cryptfold_reactor as reactor;

use super::{LocalFuture, Machine, Stack};
use crate::{History, Rng, SimDisk, VolumeId};

/// Volumes that the operator makes, at most at a time.
const MOST: usize = 7;

/// A change of the stack's volumes.
#[derive(Clone, Debug)]
pub enum Deed {
    /// A read-only volume with what `of` has.
    Snapshot {
        /// Volume.
        of: String,
        /// Name of the snapshot (the last part of the device's).
        name: String,
    },
    /// A volume that begins with what the snapshot `of` has.
    Clone {
        /// Snapshot.
        of: String,
        /// Name of the clone (the last part of the device's).
        name: String,
    },
    /// The end of a volume, which nobody has open.
    Delete {
        /// Device.
        name: String,
    },
    /// Another size.
    Resize {
        /// Device.
        name: String,
        /// New size.
        bytes: u64,
    },
    /// Something that takes long and changes nothing that can be read.
    Maintain {
        /// Device.
        name: String,
        /// What exactly, drawn.
        how: u64,
    },
}

/// Whether it was done; `Ok(false)`: refused in order, nothing has changed.
pub type Manage = LocalFuture<Result<bool, String>>;

/// When something began and ended, in the history's time.
type Span = (u64, Option<u64>);

/// A volume of the run.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    pub id: VolumeId,
    pub writable: bool,
    /// Made by the operator.
    pub extra: bool,
    /// Full size; 0 = not known yet.
    bytes: u64,
    created: Span,
    deleted: Option<Span>,
    /// Workers that are at it.
    users: u32,
}

/// Whether a volume is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Existence {
    Sure,
    Maybe,
    Gone,
}

impl Entry {
    /// A volume that the stack has from the beginning.
    pub fn first(name: &str, id: VolumeId) -> Entry {
        let created = (0, Some(0));
        Entry {
            name: name.into(),
            id,
            writable: true,
            extra: false,
            bytes: 0,
            created,
            deleted: None,
            users: 0,
        }
    }

    /// Whether it is there at a moment of the history.
    pub fn existence(&self, now: u64) -> Existence {
        let over = |end: Option<u64>| end.is_some_and(|end| end <= now);
        match self.deleted {
            _ if self.created.0 > now => Existence::Gone,
            Some((_, end)) if over(end) => Existence::Gone,
            Some((start, _)) if start <= now => Existence::Maybe,
            _ if over(self.created.1) => Existence::Sure,
            _ => Existence::Maybe,
        }
    }

    /// After a power cut it was found, at `now`.
    pub fn found(&mut self, now: u64) {
        self.created.1 = self.created.1.or(Some(now));
        self.deleted = None;
    }
}

/// The volumes of a run.
#[derive(Clone, Default)]
pub(super) struct Table(Rc<RefCell<Vec<Entry>>>);

/// A worker's hold on a volume.
pub(super) struct Hold {
    table: Table,
    pub entry: Entry,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(entry) = self.table.0.borrow_mut().iter_mut().find(|e| e.id == self.entry.id) {
            entry.users = entry.users.saturating_sub(1);
        }
    }
}

impl Table {
    pub fn new(entries: Vec<Entry>) -> Table {
        Table(Rc::new(RefCell::new(entries)))
    }

    /// What is left when the power is off: nobody is at anything.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = self.0.borrow().clone();
        entries.iter_mut().for_each(|entry| entry.users = 0);
        entries
    }

    /// A volume that is there and stays until the hold is dropped.
    pub fn hold(&self, rng: &mut Rng, now: u64) -> Hold {
        let mut entries = self.0.borrow_mut();
        let sure: Vec<usize> =
            (0..entries.len()).filter(|at| entries[*at].existence(now) == Existence::Sure).collect();
        let at = sure[rng.below(sure.len() as u64) as usize];
        entries[at].users += 1;
        Hold { table: self.clone(), entry: entries[at].clone() }
    }

    fn change(&self, id: VolumeId, f: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.0.borrow_mut().iter_mut().find(|entry| entry.id == id) {
            f(entry);
        }
    }
}

pub(super) struct Operator {
    pub stack: Rc<dyn Stack>,
    pub machine: Machine,
    pub disk: std::sync::Arc<SimDisk>,
    pub table: Table,
    pub history: Rc<RefCell<History>>,
    pub rng: Rng,
    pub deeds: u64,
    pub made: Rc<RefCell<u64>>,
    pub done: Rc<Cell<u64>>,
    pub resize: bool,
}

pub(super) async fn run(mut operator: Operator) -> Result<(), String> {
    for _ in 0..operator.deeds {
        reactor::sleep(Duration::from_micros(operator.rng.magnitude(30_000))).await;
        operator.one().await?;
    }
    Ok(())
}

impl Operator {
    fn history(&self) -> std::cell::RefMut<'_, History> {
        let mut history = self.history.borrow_mut();
        history.stamp(self.disk.events());
        history
    }

    fn pick(&mut self, wanted: impl Fn(&Entry) -> bool) -> Option<Entry> {
        let now = self.history().now();
        let all = self.table.0.borrow().clone();
        let sure = |e: &&Entry| e.existence(now) == Existence::Sure && wanted(e);
        let all: Vec<&Entry> = all.iter().filter(sure).collect();
        (!all.is_empty()).then(|| all[self.rng.below(all.len() as u64) as usize].clone())
    }

    fn extras(&self) -> usize {
        self.table.0.borrow().iter().filter(|e| e.extra).count()
    }

    async fn one(&mut self) -> Result<(), String> {
        let room = self.extras() < MOST;
        match self.rng.below(12) {
            0..=3 if room => match self.pick(|e| e.writable) {
                Some(of) => self.make(of, false).await,
                None => Ok(()),
            },
            4..=5 if room => match self.pick(|e| !e.writable) {
                Some(of) => self.make(of, true).await,
                None => Ok(()),
            },
            0..=8 => match self.pick(|e| e.extra) {
                Some(entry) => self.delete(entry).await,
                None => Ok(()),
            },
            9 if self.resize => match self.pick(|e| e.writable) {
                Some(entry) => self.resize(entry).await,
                None => Ok(()),
            },
            _ => match self.pick(|e| e.writable) {
                Some(entry) => {
                    let how = self.rng.next();
                    self.manage(Deed::Maintain { name: entry.name, how }).await.map(drop)
                }
                None => Ok(()),
            },
        }
    }

    async fn manage(&self, deed: Deed) -> Result<bool, String> {
        let what = format!("{deed:?}");
        self.done.set(self.done.get() + 1);
        self.stack.manage(self.machine.clone(), deed).await.map_err(|e| format!("{what}: {e}"))
    }

    async fn make(&mut self, of: Entry, writable: bool) -> Result<(), String> {
        let name = {
            let mut made = self.made.borrow_mut();
            *made += 1;
            format!("{}{}", if writable { "clone" } else { "snap" }, made)
        };
        // It is in the table before it is made: the power may fail at any moment.
        let device = self.stack.device(&of.name, &name);
        let (id, start) = self.history().copy_started(of.id, &device, writable);
        self.table.0.borrow_mut().push(Entry {
            name: device,
            id,
            writable,
            extra: true,
            bytes: 0,
            created: (start, None),
            deleted: None,
            users: 0,
        });
        let of = of.name;
        let deed = if writable { Deed::Clone { of, name } } else { Deed::Snapshot { of, name } };
        let done = self.manage(deed).await?;
        let end = self.history().copy_ended(id);
        match done {
            true => self.table.change(id, |entry| entry.created.1 = Some(end)),
            false => self.table.change(id, |entry| entry.deleted = Some((start, Some(end)))),
        }
        Ok(())
    }

    async fn delete(&mut self, entry: Entry) -> Result<(), String> {
        let start = self.history().event();
        self.table.change(entry.id, |entry| entry.deleted = Some((start, None)));
        let users = || self.table.0.borrow().iter().find(|e| e.id == entry.id).map_or(0, |e| e.users);
        while users() > 0 {
            reactor::sleep(Duration::from_micros(50)).await;
        }
        let done = self.manage(Deed::Delete { name: entry.name }).await?;
        let end = self.history().event();
        match done {
            true => self.table.change(entry.id, |entry| entry.deleted = Some((start, Some(end)))),
            false => self.table.change(entry.id, |entry| entry.deleted = None),
        }
        Ok(())
    }

    async fn resize(&mut self, entry: Entry) -> Result<(), String> {
        let bdev = self.machine.registry.get(&entry.name).map_err(|e| e.to_string())?;
        let block = u64::from(bdev.block_size_bytes());
        let now = bdev.size_bytes();
        let full = entry.bytes.max(now);
        self.table.change(entry.id, |entry| entry.bytes = full);
        let bytes = (full / 2 + self.rng.below(full / 2 + 1)).next_multiple_of(4096).min(full);
        // What lies beyond is given up: it may come back as zeros only.
        let gone = (bytes < now)
            .then(|| self.history().zeroes_started(entry.id, bytes / block, (now - bytes) / block, true));
        let done = self.manage(Deed::Resize { name: entry.name, bytes }).await?;
        if let Some(gone) = gone {
            self.history().write_ended(gone, done);
        }
        Ok(())
    }
}
