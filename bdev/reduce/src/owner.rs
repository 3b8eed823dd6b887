//! Ownership: one process has a pool open.
//!
//! The owner block in the anchors carries the owner's id and a heartbeat. Who wants to open a pool that is marked open
//! watches it for more than two intervals: a heartbeat that advances means "open elsewhere", one that stands still means
//! that its owner died. An owner that finds another one's block stops at once: it has been taken over.

use std::rc::Rc;
use std::time::Duration;

use cryptfold_bdev::Status;
use cryptfold_reactor as reactor;
use cryptfold_reduce_format::keys::PoolKeys;
use cryptfold_reduce_format::owner::{OwnerBlock, OwnerState, Ownership};
use cryptfold_reduce_format::superblock::ANCHORS;

use crate::anchors::{self, Anchors, io_error, read_owner};
use crate::base::Base;
use crate::error::PoolError;
use crate::pool::{Life, Pool};

/// Longest time between two heartbeats.
pub(crate) const INTERVAL: Duration = Duration::from_millis(1000);
/// Heartbeats are written this often, so that a late one is still in time.
const BEAT: Duration = Duration::from_millis(500);

/// The host's name, for people.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(48).collect();
    format!("{name} pid {}", std::process::id())
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |t| t.as_millis() as u64)
}

/// Waits until it is certain that nobody else has the pool open.
pub(crate) async fn wait_for_ownership(
    base: &Base,
    device: &str,
    found: &Anchors,
    me: &[u8; 16],
) -> Result<(), PoolError> {
    if wait(base, device, &found.at, &found.keys, found.owner.as_ref(), me).await? {
        tracing::info!(device, "the pool's last owner died; taking it over");
    }
    Ok(())
}

/// As [`wait_for_ownership`], for whoever only writes anchors.
pub(crate) async fn wait_until_free(
    base: &Base,
    device: &str,
    at: &[u64; ANCHORS],
    keys: &PoolKeys,
    owner: Option<OwnerBlock>,
) -> Result<(), PoolError> {
    wait(base, device, at, keys, owner.as_ref(), &[0; 16]).await.map(drop)
}

/// Whether the last owner has died without giving the pool up.
async fn wait(
    base: &Base,
    device: &str,
    at: &[u64; ANCHORS],
    keys: &PoolKeys,
    first: Option<&OwnerBlock>,
    me: &[u8; 16],
) -> Result<bool, PoolError> {
    let Some(first) = first else { return Ok(false) };
    if first.state == OwnerState::Closed {
        return Ok(false);
    }
    let interval = Duration::from_millis(first.interval_ms.clamp(100, 60_000).into());
    // Three looks: an owner that beats late shows up in the second or third.
    for _ in 0..3 {
        reactor::sleep(interval * 7 / 10 + Duration::from_millis(50)).await;
        let Some(second) = read_owner(base, device, at, keys).await? else { return Ok(false) };
        match OwnerBlock::judge(me, first, &second) {
            Ownership::Free | Ownership::Mine => return Ok(false),
            Ownership::Alive(owner) => {
                let id: String = owner.owner.iter().take(4).map(|b| format!("{b:02x}")).collect();
                return Err(PoolError::OpenElsewhere {
                    device: device.to_owned(),
                    host: owner.host,
                    owner: id,
                });
            }
            Ownership::Dead(_) => {}
        }
    }
    Ok(true)
}

impl Pool {
    fn owner_block(&self, beat: u64, state: OwnerState) -> OwnerBlock {
        OwnerBlock {
            pool: self.uuid,
            epoch: self.epoch.get().owner_epoch,
            owner: self.owner,
            state,
            beat,
            beat_ms: now_ms(),
            interval_ms: INTERVAL.as_millis() as u32,
            host: host(),
        }
    }

    /// Declares the pool open by this process. Fails if somebody else did at the same time.
    pub(crate) async fn take_ownership(&self) -> Result<(), PoolError> {
        let device = self.descriptor.bdev().name().to_owned();
        let block = self.owner_block(1, OwnerState::Open);
        for copy in 0..ANCHORS {
            anchors::write_owner(&self.base, &self.keys, &self.anchors, copy, &block)
                .await
                .map_err(io_error(&device, "write of the owner block"))?;
        }
        self.base.flush().await.map_err(io_error(&device, "flush"))?;
        match read_owner(&self.base, &device, &self.anchors, &self.keys).await? {
            Some(owner) if owner.owner != self.owner => {
                Err(PoolError::OpenElsewhere { device, host: owner.host, owner: String::from("just now") })
            }
            _ => Ok(()),
        }
    }

    /// Declares the pool closed.
    pub(crate) async fn give_up_ownership(&self) -> Result<(), Status> {
        let block = self.owner_block(u64::MAX >> 1, OwnerState::Closed);
        for copy in 0..ANCHORS {
            anchors::write_owner(&self.base, &self.keys, &self.anchors, copy, &block).await?;
        }
        self.base.flush().await
    }

    /// The heartbeat task.
    pub(crate) async fn run_heartbeat(self: Rc<Self>) {
        let mut beat = 1;
        while matches!(self.life.get(), Life::Open | Life::Closing) {
            self.publish_space();
            reactor::sleep(BEAT).await;
            if !matches!(self.life.get(), Life::Open) {
                break;
            }
            beat += 1;
            let device = self.descriptor.bdev().name().to_owned();
            if let Ok(Some(owner)) = read_owner(&self.base, &device, &self.anchors, &self.keys).await
                && owner.owner != self.owner
                && owner.epoch >= self.epoch.get().owner_epoch
            {
                tracing::error!(pool = %self.name(), host = %owner.host, "another owner has taken the pool over");
                self.fail(Status::INVALID_NAMESPACE);
                break;
            }
            if !matches!(self.life.get(), Life::Open) {
                break;
            }
            let copy = (beat as usize) % ANCHORS;
            let block = self.owner_block(beat, OwnerState::Open);
            if let Err(status) =
                anchors::write_owner(&self.base, &self.keys, &self.anchors, copy, &block).await
            {
                tracing::warn!(pool = %self.name(), %status, "a heartbeat could not be written");
            }
        }
        self.heart_stopped.set(true);
        self.wake_waiters();
    }
}
