//! What a controller tells about itself: asynchronous events and log pages (NVMe Base 2.0 sections 5.2 and 5.16).

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cryptfold_nvmf_spec::features::AsyncEvent;
use cryptfold_nvmf_spec::log::{ChangedNamespaces, ErrorEntry, FirmwareSlots, GetLogPage, Health, Lid};
use cryptfold_nvmf_spec::{Cid, Nsid, Status};
use serde_json::{Value, json};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::admin::AdminError;
use crate::controller::{Controller, NvmeError};
use crate::home::Home;
use crate::identity::text;

/// Entries of the error log that are read, at most (a page of memory).
const ERRORS: u8 = 64;

impl Home {
    async fn log(&self, what: &'static str, lid: Lid, len_bytes: usize) -> Result<Vec<u8>, AdminError> {
        let Some(request) = GetLogPage::new(lid, 0, len_bytes as u64) else {
            return Err(AdminError::Gone { what });
        };
        let sqe = request.to_sqe(Cid(0), Nsid::ALL);
        let limit = Some(self.controller.options.admin_timeout);
        let data = self.admin.buffer(len_bytes)?;
        let (_, data) = self.admin.run(what, sqe, Some(data), limit).await?;
        Ok(data.map(|d| d.to_vec(len_bytes)).unwrap_or_default())
    }

    async fn page<T: FromBytes + FromZeros + IntoBytes>(
        &self,
        what: &'static str,
        lid: Lid,
    ) -> Result<Box<T>, AdminError> {
        let bytes = self.log(what, lid, size_of::<T>()).await?;
        T::read_from_bytes(&bytes).map(Box::new).map_err(|_| AdminError::Gone { what })
    }

    /// Takes an event in: reading its log page clears it, so that the next of its kind is reported.
    pub async fn event(self: &Rc<Self>, dw0: u32) {
        self.controller.counters.events.fetch_add(1, Ordering::Relaxed);
        let event = AsyncEvent(dw0);
        let found = match Lid::from_u8(event.lid() as u8) {
            Some(Lid::Error) => self.errors(1).await.map(|e| format!("error event: {}", e.join("; "))),
            Some(Lid::Health) => self.page::<Health>("SMART log", Lid::Health).await.map(|h| {
                format!("SMART event {:#x}: critical warning {:#04x}", event.info(), h.critical_warning)
            }),
            Some(Lid::FirmwareSlots) => self
                .page::<FirmwareSlots>("firmware log", Lid::FirmwareSlots)
                .await
                .map(|_| "firmware event".into()),
            Some(Lid::ChangedNamespaces) => {
                let page = self.page::<ChangedNamespaces>("changed namespaces", Lid::ChangedNamespaces).await;
                match page {
                    Ok(_) => {
                        self.controller.note("namespaces have changed".into());
                        if let Err(e) = self.scan().await {
                            self.controller.note(format!("namespaces can not be listed: {e}"));
                        }
                        return;
                    }
                    Err(e) => Err(e),
                }
            }
            _ => Ok(format!(
                "event type {} info {:#x} log page {:#x}",
                event.kind(),
                event.info(),
                event.lid()
            )),
        };
        match found {
            Ok(text) => self.controller.note(text),
            Err(e) => self.controller.note(format!("event {dw0:#010x}, whose log page can not be read: {e}")),
        }
    }

    /// The latest errors, newest first, in words.
    async fn errors(&self, count: u8) -> Result<Vec<String>, AdminError> {
        let count = count.min(self.controller.identity().elpe.saturating_add(1));
        let bytes = self.log("error log", Lid::Error, usize::from(count) * size_of::<ErrorEntry>()).await?;
        let Ok(entries) = <[ErrorEntry]>::ref_from_bytes(&bytes) else { return Ok(Vec::new()) };
        let real = entries.iter().filter(|e| e.error_count.get() != 0);
        Ok(real
            .map(|e| {
                format!(
                    "error {} of queue {} command {:#06x} namespace {} block {}: {}",
                    e.error_count,
                    e.sqid,
                    e.cid,
                    e.nsid,
                    e.lba,
                    Status::from_wire(e.status.get())
                )
            })
            .collect())
    }
}

impl Controller {
    /// `bdev_nvme_get_controller_health_info`: SMART, firmware slots and the latest errors. From any reactor.
    ///
    /// # Errors
    /// The controller does not answer, or is gone.
    pub async fn health(self: &Arc<Self>) -> Result<Value, NvmeError> {
        let this = self.clone();
        self.home
            .call(move || async move {
                let home = this.here().ok_or(NvmeError::State(this.state().name()))?;
                let health = home.page::<Health>("SMART log", Lid::Health).await?;
                let firmware = home.page::<FirmwareSlots>("firmware log", Lid::FirmwareSlots).await?;
                let errors = home.errors(ERRORS).await?;
                Ok(describe(&this, &health, &firmware, &errors))
            })
            .await?
    }
}

fn describe(c: &Controller, h: &Health, firmware: &FirmwareSlots, errors: &[String]) -> Value {
    let id = c.identity();
    // Kelvin to degrees Celsius; JSON numbers hold 64 bits.
    let celsius = i32::from(h.temperature_k.get()) - 273;
    let n = |v: u128| u64::try_from(v).unwrap_or(u64::MAX);
    let mut all = json!({
        "model_number": text(&id.mn),
        "serial_number": text(&id.sn),
        "firmware_revision": text(&id.fr),
        "traddr": c.address().traddr,
        "critical_warning": h.critical_warning,
        "temperature_celsius": celsius,
        "available_spare_percentage": h.available_spare_pct,
        "available_spare_threshold_percentage": h.spare_threshold_pct,
        "percentage_used": h.used_pct,
        "data_units_read": n(h.data_units_read.get()),
        "data_units_written": n(h.data_units_written.get()),
        "host_read_commands": n(h.host_reads.get()),
        "host_write_commands": n(h.host_writes.get()),
        "controller_busy_time": n(h.busy_min.get()),
        "power_cycles": n(h.power_cycles.get()),
        "power_on_hours": n(h.power_on_h.get()),
        "unsafe_shutdowns": n(h.unsafe_shutdowns.get()),
        "media_errors": n(h.media_errors.get()),
        "num_err_log_entries": n(h.error_log_entries.get()),
        "warning_temperature_time_minutes": h.warning_temperature_min.get(),
        "critical_composite_temperature_time_minutes": h.critical_temperature_min.get(),
    });
    all["active_firmware_slot"] = (firmware.afi & 7).into();
    all["firmware_slots"] =
        firmware.frs.iter().filter(|f| **f != [0; 8]).map(|f| text(f)).collect::<Vec<_>>().into();
    all["error_log"] = errors.into();
    all
}
