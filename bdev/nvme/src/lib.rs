//! The userspace NVMe driver: PCIe drives as block devices, polled, without the kernel's block layer.
//!
//! ```text
//!   bdev/core channel -> queue of a namespace -> pair (one per reactor) --- doorbell, DMA ---> controller
//!                                                  ^ messages                                     ^
//!                        control calls -> home (admin queue, life cycle, events) ----- registers--+
//! ```
//!
//! A [`Controller`] has a home reactor, which alone changes its state, and a queue pair on each of its reactors, as many as the
//! drive has; the other reactors send their I/O to one of those by message. The hardware is behind [`bus::Bus`]: [`vfio`] for
//! drives, [`sim`] for a simulated controller that can be told to fail in every way that the life cycle knows.
//!
//! The life cycle ([`State::on`] is the table; `docs/nvme.md` says what each step does):
//!
//! ```text
//!   Attaching --up--> Ready <--up-- Resetting --failed--> Failed
//!       |              |  \--reset needed--^ ^--reset asked for--/
//!    failed         detach|vanished (from Ready, Resetting, Failed)
//!       v              v  v
//!   Detaching <--detach-- Removed          Detaching --released--> Gone
//! ```
//!
//! Time-outs: a command older than `io_timeout` is aborted and, when the controller did that, sent again; one that is twice as
//! old has the controller reset. A reset sends what was outstanding again, each command `retries` times at most. A reset that
//! fails ends all I/O with an error. A drive that is gone (all registers read as ones, or the system asks for it) ends all I/O and
//! its devices, and is not touched again.
//!
//! Units: bytes unless a name ends in another one; blocks are the namespace's. Unsafe code is in `dma`, `wake` and `vfio`.

mod admin;
pub mod bus;
mod controller;
mod dma;
mod drives;
mod elsewhere;
mod health;
mod home;
pub mod identity;
mod lifecycle;
mod namespace;
mod pair;
pub mod pci;
mod remote;
mod request;
mod ring;
pub mod sim;
pub mod vfio;
mod wake;

use std::sync::Arc;
use std::time::Duration;

use cryptfold_bdev::Registry;
use cryptfold_reactor::{Handle, ReactorGone};

pub use admin::AdminError;
pub use controller::{Controller, Counters, NvmeError, Options};
pub use drives::{DriveError, Drives, Hotplug};
pub use elsewhere::Waiting;
pub use lifecycle::{Event, State};
pub use namespace::verify;

use bus::Bus;
use home::Home;

/// Brings a controller up and registers its namespaces as `NAMEn1`, .... Must run on the reactor that becomes its home; `cores`
/// are those that will use it, in the order in which they get queue pairs.
///
/// # Errors
/// It does not come up, or a device can not be registered. The bus is released then.
pub async fn attach(
    bus: Arc<dyn Bus>,
    name: String,
    registry: Arc<Registry>,
    cores: Vec<Handle>,
    options: Options,
) -> Result<Arc<Controller>, NvmeError> {
    let controller = Arc::new(Controller::new(name, bus, cores, registry, options));
    let home = Home::start(controller.clone());
    let up = async {
        home.bring_up().await?;
        home.scan().await
    };
    match up.await {
        Ok(()) => {
            controller.on(Event::Up);
            home.attend();
            Ok(controller)
        }
        Err(e) => {
            home.remove_devices();
            controller.on(if matches!(e, NvmeError::Vanished) {
                Event::Vanished
            } else {
                Event::BringUpFailed
            });
            home.put_away().await;
            Err(e)
        }
    }
}

/// Removes a controller's devices, waits up to `limit` for whoever has them open, and shuts it down. From any reactor.
///
/// # Errors
/// Devices stay open (they are gone for new openers all the same), or it is not in a state for this.
pub async fn detach(controller: &Arc<Controller>, limit: Duration) -> Result<(), NvmeError> {
    let this = controller.clone();
    controller
        .home
        .call(move || async move {
            let home = this.here().ok_or(NvmeError::Reactor(ReactorGone::Stopped))?;
            home.detach(limit).await
        })
        .await?
}
