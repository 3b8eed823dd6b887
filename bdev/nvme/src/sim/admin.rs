//! Admin commands of the simulated controller (NVMe Base 2.0 section 5).

use std::collections::BTreeMap;
use std::sync::Arc;

use cryptfold_nvmf_spec::features::{AsyncEvent, Fid, NumberOfQueues};
use cryptfold_nvmf_spec::identify::{Cns, DescriptorList, NamespaceId, NamespaceList, NvmController};
use cryptfold_nvmf_spec::log::{ChangedNamespaces, ErrorEntry, FirmwareSlots, GetLogPage, Health, Lid};
use cryptfold_nvmf_spec::opcode::Admin as Opcode;
use cryptfold_nvmf_spec::{Cid, Cqe, Nsid, Qid, Sqe, Status};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::device::{Job, Open, SimController, State, bytes_of};
use super::queue::{CompletionQueue, SubmissionQueue};

type Answer = Result<(u32, Option<Vec<u8>>), Status>;

impl SimController {
    /// Executes an admin command and completes it, unless it stays (an event request).
    pub(super) fn admin(self: &Arc<Self>, job: &Job, open: &BTreeMap<u32, Open>) {
        let sqe = &job.sqe;
        if sqe.opcode == Opcode::AsyncEventRequest as u8 {
            let mut s = self.state();
            s.event_commands.push_back(sqe.cid().0);
            return s.wake();
        }
        let memory = self.memory();
        let answer = {
            let mut s = self.state();
            if sqe.opcode == Opcode::Abort as u8 {
                let (sqid, cid) = (sqe.cdw10.get() as u16, (sqe.cdw10.get() >> 16) as u16);
                Ok((s.abort(sqid, cid, job, &memory), None))
            } else {
                s.admin(sqe, open)
            }
        };
        let cqe = match answer {
            Ok((dw0, data)) => {
                let sent = data.is_none_or(|data| self.to_host(sqe, &data).is_ok());
                let status = if sent { Status::SUCCESS } else { Status::DATA_TRANSFER_ERROR };
                Cqe::new(sqe.cid(), 0, status).with_dw0(dw0)
            }
            Err(status) => Cqe::new(sqe.cid(), 0, status),
        };
        self.complete(job, cqe);
    }
}

impl State {
    /// 1: not aborted.
    fn abort(&mut self, sqid: u16, cid: u16, job: &Job, memory: &crate::dma::Seen) -> u32 {
        let Some(at) = self.abortable.iter().position(|k| *k == (sqid, cid)) else { return 1 };
        self.abortable.swap_remove(at);
        self.complete(sqid, job.epoch, Cqe::new(Cid(cid), 0, Status::ABORT_REQUESTED), memory);
        0
    }

    fn admin(&mut self, sqe: &Sqe, open: &BTreeMap<u32, Open>) -> Answer {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let d10 = sqe.cdw10.get();
        match Opcode::from_u8(sqe.opcode) {
            Some(Opcode::Identify) => self.identify(sqe, open).map(|page| (0, Some(page))),
            Some(Opcode::SetFeatures) => match Fid::from_u8(d10 as u8) {
                Some(Fid::NumberOfQueues) => {
                    let granted = NumberOfQueues(sqe.cdw11.get()).grant(self.options.pairs)?;
                    self.granted = granted.pairs() as u16;
                    Ok((granted.0, None))
                }
                Some(Fid::AsyncEventConfig) => {
                    self.events_wanted = sqe.cdw11.get();
                    Ok((0, None))
                }
                _ => Err(invalid),
            },
            Some(Opcode::GetFeatures) => match Fid::from_u8(d10 as u8) {
                Some(Fid::VolatileWriteCache) => {
                    let cached = open.values().any(|o| o.channel.bdev().info().write_cache);
                    Ok((cached.into(), None))
                }
                _ => Err(invalid),
            },
            Some(Opcode::CreateCq) => self.create_cq(sqe),
            Some(Opcode::CreateSq) => self.create_sq(sqe),
            Some(Opcode::DeleteSq) => match self.submission.remove(&(d10 as u16)) {
                Some(_) => Ok((0, None)),
                None => Err(Status::QUEUE_ID_INVALID),
            },
            Some(Opcode::DeleteCq) => match self.completion.remove(&(d10 as u16)) {
                Some(_) => Ok((0, None)),
                None => Err(Status::QUEUE_ID_INVALID),
            },
            Some(Opcode::GetLogPage) => self.log(&GetLogPage::from_sqe(sqe)).map(|page| (0, Some(page))),
            Some(Opcode::DoorbellBufferConfig) if self.options.shadow => {
                let pages = sqe.sgl.as_prps();
                if pages.iter().any(|p| p % 4096 != 0) {
                    return Err(invalid);
                }
                self.shadow = Some(pages);
                Ok((0, None))
            }
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        }
    }

    fn queue_of(&self, sqe: &Sqe, taken: bool) -> Result<(u16, u16, u64), Status> {
        let (qid, depth) = (sqe.cdw10.get() as u16, (sqe.cdw10.get() >> 16) as u16);
        let address = sqe.sgl.as_prps()[0];
        if qid == 0 || qid > self.granted || taken {
            return Err(Status::QUEUE_ID_INVALID.with_dnr());
        }
        if depth == 0 || depth >= self.options.queue_depth {
            return Err(Status::QUEUE_SIZE_INVALID.with_dnr());
        }
        // Physically contiguous (CAP.CQR), page aligned.
        if sqe.cdw11.get() & 1 == 0 || !address.is_multiple_of(4096) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        Ok((qid, depth + 1, address))
    }

    fn create_cq(&mut self, sqe: &Sqe) -> Answer {
        let taken = self.completion.contains_key(&(sqe.cdw10.get() as u16));
        let (qid, depth, address) = self.queue_of(sqe, taken)?;
        self.completion.insert(qid, CompletionQueue::new(address, depth));
        Ok((0, None))
    }

    fn create_sq(&mut self, sqe: &Sqe) -> Answer {
        let taken = self.submission.contains_key(&(sqe.cdw10.get() as u16));
        let (qid, depth, address) = self.queue_of(sqe, taken)?;
        let cqid = (sqe.cdw11.get() >> 16) as u16;
        if !self.completion.contains_key(&cqid) || cqid == Qid::ADMIN.0 {
            return Err(Status::CQ_INVALID.with_dnr());
        }
        self.submission.insert(qid, SubmissionQueue { address, depth, cqid, head: 0, tail: 0 });
        Ok((0, None))
    }

    fn identify(&mut self, sqe: &Sqe, open: &BTreeMap<u32, Open>) -> Result<Vec<u8>, Status> {
        let nsid = sqe.nsid();
        let namespace = || open.get(&nsid.0).ok_or(Status::INVALID_NAMESPACE.with_dnr());
        Ok(match Cns::from_u8(sqe.cdw10.get() as u8) {
            Some(Cns::Controller) => bytes_of(&self.identify_controller()),
            Some(Cns::ActiveNamespaces) => {
                let here = self.options.namespaces.iter().map(|n| Nsid(n.nsid));
                bytes_of(&NamespaceList::after(nsid, here))
            }
            Some(Cns::Namespace) => {
                let open = namespace()?;
                let mut id = open.identify;
                let blocks = U64::new(open.channel.bdev().blocks());
                (id.nsze, id.ncap, id.nuse) = (blocks, blocks, blocks);
                bytes_of(&id)
            }
            Some(Cns::NamespaceDescriptors) => {
                bytes_of(&DescriptorList::new(&[NamespaceId::Nguid(namespace()?.identify.nguid)]))
            }
            Some(Cns::CsController) => {
                let mut id = NvmController::default();
                id.wzsl = 4;
                bytes_of(&id)
            }
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        })
    }

    fn log(&mut self, request: &GetLogPage) -> Result<Vec<u8>, Status> {
        let page = match Lid::from_u8(request.lid) {
            Some(Lid::Health) => {
                let mut health = Health::default();
                health.critical_warning = self.smart_warning;
                health.temperature_k = U16::new(310);
                health.available_spare_pct = if self.smart_warning == 0 { 100 } else { 3 };
                health.spare_threshold_pct = 10;
                bytes_of(&health)
            }
            Some(Lid::FirmwareSlots) => {
                let mut slots = FirmwareSlots::default();
                slots.afi = 1;
                slots.frs[0] = *b"1       ";
                bytes_of(&slots)
            }
            Some(Lid::Error) => {
                let mut last = ErrorEntry::default();
                last.error_count = U64::new(self.errors);
                last.sqid = U16::new(1);
                last.status = U16::new(Status::INTERNAL_ERROR.to_wire());
                last.as_bytes().to_vec()
            }
            Some(Lid::ChangedNamespaces) => {
                bytes_of(&ChangedNamespaces::new(std::mem::take(&mut self.changed).into_iter().map(Nsid)))
            }
            _ => return Err(Status::LOG_PAGE_INVALID.with_dnr()),
        };
        let mut out = vec![0; request.len_bytes.min(1 << 20) as usize];
        request.copy_window(&page, &mut out)?;
        Ok(out)
    }
}

impl SimController {
    /// Takes a namespace away (its number is no longer active) and says so.
    pub fn remove_namespace(&self, nsid: u32) {
        let mut s = self.state();
        s.options.namespaces.retain(|n| n.nsid != nsid);
        s.changed.push(nsid);
        drop(s);
        self.report(AsyncEvent::NAMESPACE_CHANGED.0);
    }

    /// Says that namespaces have changed, as when the device behind one has a new size.
    pub fn changed(&self, nsid: u32) {
        self.state().changed.push(nsid);
        self.report(AsyncEvent::NAMESPACE_CHANGED.0);
    }

    /// What the host asked to be told (CDW11 of Asynchronous Event Configuration).
    pub fn events_wanted(&self) -> u32 {
        U32::new(self.state().events_wanted).get()
    }
}
