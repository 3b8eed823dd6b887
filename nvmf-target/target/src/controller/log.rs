//! Get Log Page.

use cryptfold_bdev::LOW_PERCENT;
use cryptfold_nvmf_spec::identify::set_text;
use cryptfold_nvmf_spec::log::{
    ANA_RGO, AnaWriter, ChangedNamespaces, CommandEffects, FirmwareSlots, GetLogPage, Health, Lid,
    LidSupport, SupportedLogPages, effects, health_warning,
};
use cryptfold_nvmf_spec::opcode::{Admin, FABRICS, Io};
use cryptfold_nvmf_spec::{Nsid, Sqe, Status};
use cryptfold_reactor::memory::Buf;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U128};

use super::events::EventKind;
use super::{Answer, Controller};

/// What the temperature of something without a sensor is, kelvin: room temperature.
const TEMPERATURE_K: u16 = 296;

impl Controller {
    pub(super) fn get_log_page(&self, sqe: &Sqe, room: u32) -> Result<Answer, Status> {
        let request = GetLogPage::from_sqe(sqe);
        let lid = Lid::from_u8(request.lid).filter(|l| self.has_page(*l));
        let lid = lid.ok_or(Status::LOG_PAGE_INVALID.with_dnr())?;
        if request.len_bytes > u64::from(room) {
            return Err(Status::DATA_SGL_LENGTH_INVALID.with_dnr());
        }
        let page = match lid {
            Lid::SupportedLogPages => self.supported_pages().as_bytes().to_vec(),
            Lid::Error => self.state().errors.page(),
            Lid::Reservation => self.state().notices.page(request.rae).as_bytes().to_vec(),
            Lid::Health => self.health(sqe.nsid())?.as_bytes().to_vec(),
            Lid::FirmwareSlots => {
                let mut page = FirmwareSlots::default();
                page.afi = 1;
                set_text(&mut page.frs[0], env!("CARGO_PKG_VERSION"));
                page.as_bytes().to_vec()
            }
            Lid::ChangedNamespaces => self.changed_namespaces(request.rae).as_bytes().to_vec(),
            Lid::CommandEffects => command_effects(self.knows_uncorrectable()).as_bytes().to_vec(),
            Lid::Ana => self.ana_page(request.lsp & ANA_RGO != 0),
            Lid::Discovery => {
                let target = self.target.upgrade().ok_or(Status::INTERNAL_ERROR)?;
                target.discovery_page(&self.host.nqn, &self.port)
            }
            _ => return Err(Status::LOG_PAGE_INVALID.with_dnr()),
        };
        let mut out = Buf::alloc(request.len_bytes as usize);
        request.copy_window(&page, out.make_mut())?;
        if !request.rae {
            let mut s = self.state();
            s.events.log_read(lid);
            let more = lid == Lid::Reservation && !s.notices.is_empty();
            drop(s);
            if more {
                self.raise(EventKind::Reservation);
            }
        }
        Ok(Answer::Data(out))
    }

    fn has_page(&self, lid: Lid) -> bool {
        match lid {
            Lid::Discovery => self.is_discovery(),
            Lid::SupportedLogPages => true,
            Lid::Ana => self.subsystem.options.ana_reporting,
            Lid::Error
            | Lid::Health
            | Lid::FirmwareSlots
            | Lid::ChangedNamespaces
            | Lid::CommandEffects
            | Lid::Reservation => !self.is_discovery(),
            _ => false,
        }
    }

    fn supported_pages(&self) -> SupportedLogPages {
        let mut page = SupportedLogPages::default();
        for lid in Lid::ALL.iter().filter(|l| self.has_page(**l)) {
            page.lid[usize::from(*lid as u8)] = U32::new(LidSupport::default().with_lsupp(1).0);
        }
        page
    }

    /// Of the controller: pages per namespace are not offered (LPA bit 0).
    fn health(&self, nsid: Nsid) -> Result<Health, Status> {
        if nsid != Nsid::NONE && nsid != Nsid::ALL {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let t = self.totals();
        let age = cryptfold_reactor::now().since(self.born);
        let spare = self.subsystem.free_percent(&self.host.nqn);
        let namespaces = self.subsystem.namespaces(&self.host.nqn);
        let mut page = Health::default();
        page.temperature_k = TEMPERATURE_K.into();
        page.available_spare_pct = spare;
        page.spare_threshold_pct = LOW_PERCENT;
        if spare < LOW_PERCENT {
            page.critical_warning |= health_warning::SPARE;
        }
        if !namespaces.is_empty() && namespaces.iter().all(|n| n.bdev().is_read_only()) {
            page.critical_warning |= health_warning::READ_ONLY;
        }
        let s = self.state();
        page.busy_min = U128::new(u128::from(s.busy.as_secs() / 60));
        page.media_errors = U128::new(s.errors.media.into());
        page.error_log_entries = U128::new(s.errors.count.into());
        drop(s);
        page.data_units_read = Health::data_units(t.read_bytes.into());
        page.data_units_written = Health::data_units(t.write_bytes.into());
        page.host_reads = U128::new(t.reads.into());
        page.host_writes = U128::new(t.writes.into());
        page.power_on_h = U128::new(u128::from(age.as_secs() / 3600));
        Ok(page)
    }

    fn changed_namespaces(&self, retain: bool) -> ChangedNamespaces {
        let mut s = self.state();
        let page = if s.changed_overflow {
            ChangedNamespaces::new((1..=1025).map(Nsid))
        } else {
            ChangedNamespaces::new(s.changed.iter().map(|n| Nsid(*n)))
        };
        if !retain {
            s.changed.clear();
            s.changed_overflow = false;
        }
        page
    }

    fn ana_page(&self, groups_only: bool) -> Vec<u8> {
        let namespaces = self.subsystem.namespaces(&self.host.nqn);
        let changes = self.subsystem.tables().ana_changes;
        let mut groups: Vec<u32> = namespaces.iter().map(|n| n.anagrpid()).collect();
        groups.sort_unstable();
        groups.dedup();
        let mut page = vec![0; 16 + 32 * groups.len() + 4 * namespaces.len()];
        let Ok(mut writer) = AnaWriter::new(&mut page, changes) else { return page };
        for group in groups {
            let members = namespaces.iter().filter(|n| n.anagrpid() == group && !groups_only).map(|n| n.nsid);
            // The buffer has room for all of them.
            if writer.group(group, changes, self.subsystem.ana_state(&self.port, group), members).is_err() {
                break;
            }
        }
        let len = writer.finish();
        page.truncate(len);
        page
    }
}

/// `uncorrectable`: a namespace knows Write Uncorrectable.
fn command_effects(uncorrectable: bool) -> CommandEffects {
    let mut page = CommandEffects::default();
    let admin = [
        Admin::GetLogPage,
        Admin::Identify,
        Admin::Abort,
        Admin::SetFeatures,
        Admin::GetFeatures,
        Admin::AsyncEventRequest,
        Admin::KeepAlive,
    ];
    for code in admin.iter().map(|a| *a as u8).chain([FABRICS]) {
        page.admin[usize::from(code)] = U32::new(effects::SUPPORTED);
    }
    for opcode in Io::ALL {
        let changes = match opcode {
            Io::Write | Io::WriteZeroes | Io::WriteUncorrectable | Io::DatasetManagement | Io::Copy => {
                effects::DATA_CHANGE
            }
            _ => 0,
        };
        page.io[usize::from(*opcode as u8)] = U32::new(effects::SUPPORTED | changes);
    }
    if !uncorrectable {
        page.io[usize::from(Io::WriteUncorrectable as u8)] = U32::new(0);
    }
    page
}
