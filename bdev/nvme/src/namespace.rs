//! Namespaces as block devices: which there are, what they can do, their queues.

use std::rc::Rc;
use std::sync::{Arc, Weak};

use cryptfold_bdev::{Bdev, BdevError, Device, DeviceInfo, Io, Queue, Removal, Status};
use cryptfold_nvmf_spec::Nsid;
use cryptfold_nvmf_spec::Sqe;
use cryptfold_nvmf_spec::features::{Fid, VolatileWriteCache};
use cryptfold_nvmf_spec::identify::{
    Cns, DescriptorList, NamespaceIdentify, NamespaceList, NvmController, oncs,
};
use cryptfold_nvmf_spec::opcode::{Admin, Io as Opcode};
use cryptfold_nvmf_spec::property::Vs;
use cryptfold_nvmf_spec::sqe::RwControl;
use cryptfold_reactor as reactor;
use reactor::SgList;
use reactor::sync::oneshot;
use serde_json::{Value, json};
use zerocopy::little_endian::U32;

use crate::controller::{Controller, NvmeError, lock};
use crate::home::Home;
use crate::identity::{Common, Target, text};
use crate::pair::Pair;
use crate::remote;
use crate::request::{MAX_TRANSFER_BYTES, Owner, Request};

/// Namespaces of one controller that become devices, at most.
const MAX_NAMESPACES: usize = 1024;

/// A namespace's device.
struct Namespace {
    info: DeviceInfo,
    target: Target,
    controller: Weak<Controller>,
    identify: Box<NamespaceIdentify>,
}

impl Home {
    async fn common(&self) -> Result<Common, NvmeError> {
        let limit = self.controller.options.admin_timeout;
        let id = self.controller.identity();
        let mut write_cache = id.vwc & 1 != 0;
        if write_cache {
            let mut sqe = Sqe::new(Admin::GetFeatures as u8);
            sqe.cdw10 = U32::new(Fid::VolatileWriteCache as u32);
            // Who does not answer has it on, as far as we know.
            if let Ok((cqe, _)) = self.admin.run("Get Features (write cache)", sqe, None, Some(limit)).await {
                write_cache = VolatileWriteCache(cqe.dw0.get()).0 & 1 != 0;
            }
        }
        let mut nvm: Option<Box<NvmController>> = None;
        if id.ver.get() >= Vs::V1_4.0 {
            // Not everybody of that version has it.
            nvm = self.admin.identify("Identify NVM Controller", Cns::CsController, 0, limit).await.ok();
        }
        Ok(Common::new(id, write_cache, nvm.as_deref()))
    }

    /// Compares the active namespaces with the devices that there are: makes, resizes and removes devices.
    ///
    /// # Errors
    /// The controller does not tell its namespaces. One that can not be used is left out, with a warning.
    pub async fn scan(self: &Rc<Self>) -> Result<(), NvmeError> {
        let limit = self.controller.options.admin_timeout;
        let common = self.common().await?;
        let mut active = Vec::new();
        loop {
            let after = active.last().map_or(0, |n: &Nsid| n.0);
            let list: Box<NamespaceList> = self
                .admin
                .identify("Identify (active namespaces)", Cns::ActiveNamespaces, after, limit)
                .await?;
            let before = active.len();
            active.extend(list.iter().filter(|n| n.0 > after));
            if active.len() - before < 1024 || active.len() >= MAX_NAMESPACES {
                break;
            }
        }
        active.truncate(MAX_NAMESPACES);
        for nsid in &active {
            if let Err(e) = self.look_at_namespace(&common, *nsid).await {
                self.controller.note(format!("namespace {nsid} is left out: {e}"));
            }
        }
        let gone: Vec<(u32, String)> = {
            let known = lock(&self.controller.namespaces);
            known.iter().filter(|(n, _)| !active.contains(&Nsid(**n))).map(|(n, s)| (*n, s.clone())).collect()
        };
        for (nsid, name) in gone {
            self.controller.note(format!("namespace {nsid} is gone"));
            lock(&self.controller.namespaces).remove(&nsid);
            // One that is being removed already needs nothing.
            drop(self.controller.registry.unregister(&name));
        }
        Ok(())
    }

    async fn look_at_namespace(&self, common: &Common, nsid: Nsid) -> Result<(), NvmeError> {
        let limit = self.controller.options.admin_timeout;
        let id: Box<NamespaceIdentify> =
            self.admin.identify("Identify Namespace", Cns::Namespace, nsid.0, limit).await?;
        let known = lock(&self.controller.namespaces).get(&nsid.0).cloned();
        if let Some(name) = known {
            if let Ok(bdev) = self.controller.registry.get(&name) {
                if id.block_bytes() == Some(bdev.block_size_bytes()) {
                    bdev.set_blocks(id.nsze.get());
                    return Ok(());
                }
                self.controller.note(format!("namespace {nsid} has another format now"));
                drop(self.controller.registry.unregister(&name));
            }
            lock(&self.controller.namespaces).remove(&nsid.0);
            return Ok(());
        }
        // Descriptors came with version 1.3; without, the namespace's own fields name it.
        let ids: Option<Box<DescriptorList>> = match common.id.ver.get() >= Vs::V1_3.0 {
            true => self
                .admin
                .identify("Identify (namespace descriptors)", Cns::NamespaceDescriptors, nsid.0, limit)
                .await
                .ok(),
            false => None,
        };
        let device = Namespace::new(&self.controller, common, nsid, id, ids.as_deref())?;
        let name = device.info.name.clone();
        self.controller.registry.register(Arc::new(device))?;
        lock(&self.controller.namespaces).insert(nsid.0, name);
        Ok(())
    }
}

impl Controller {
    /// Asks for the removal of all devices.
    pub(crate) fn remove_devices(&self) -> Vec<Removal> {
        let names = std::mem::take(&mut *lock(&self.namespaces));
        let removal = |name: &String| match self.registry.unregister(name) {
            Ok(removal) => Some(removal),
            // Somebody else has asked for it.
            Err(_) => self.registry.get(name).ok().and_then(|bdev| bdev.removal()),
        };
        names.values().filter_map(removal).collect()
    }
}

impl Namespace {
    fn new(
        controller: &Arc<Controller>,
        common: &Common,
        nsid: Nsid,
        id: Box<NamespaceIdentify>,
        ids: Option<&DescriptorList>,
    ) -> Result<Namespace, NvmeError> {
        let name = format!("{}n{}", controller.name, nsid);
        let (info, target) = common
            .device((name, "NVMe disk"), nsid, &id, ids, MAX_TRANSFER_BYTES)
            .map_err(NvmeError::Unsupported)?;
        Ok(Namespace { info, target, controller: Arc::downgrade(controller), identify: id })
    }
}

impl Device for Namespace {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Rc<dyn Queue>, BdevError> {
        let gone = || BdevError::Removing(self.info.name.clone());
        let controller = self.controller.upgrade().ok_or_else(gone)?;
        let (index, owner) = controller.pair_for(&reactor::current()).ok_or_else(gone)?;
        if owner.is_current() {
            let pair = controller.pair(index).ok_or_else(gone)?;
            return Ok(Rc::new(LocalQueue { pair, target: self.target }));
        }
        Ok(remote::open(&controller, index, owner, self.target))
    }

    fn driver_specific(&self) -> Value {
        let Some(c) = self.controller.upgrade() else { return json!({}) };
        let (id, address) = (c.identity(), c.address());
        let vs = Vs(id.ver.get());
        json!({"nvme": [{
            "pci_address": address.traddr,
            "trid": {"trtype": "PCIe", "traddr": address.traddr},
            "ctrlr_data": {
                "cntlid": id.cntlid.get(),
                "vendor_id": format!("{:#06x}", id.vid.get()),
                "model_number": text(&id.mn),
                "serial_number": text(&id.sn),
                "firmware_revision": text(&id.fr),
                "subnqn": text(&id.subnqn),
                "oacs": {
                    "security": u8::from(id.oacs.get() & 1 != 0),
                    "format": u8::from(id.oacs.get() & 2 != 0),
                    "firmware": u8::from(id.oacs.get() & 4 != 0),
                    "ns_manage": u8::from(id.oacs.get() & 8 != 0),
                },
                "multi_ctrlr": id.cmic & 2 != 0,
                "ana_reporting": id.cmic & 8 != 0,
            },
            "vs": {"nvme_version": format!("{}.{}", vs.mjr(), vs.mnr())},
            "ns_data": {
                "id": self.target.nsid.0,
                "can_share": self.identify.nmic & 1 != 0,
            },
        }]})
    }
}

/// Has the drive check that it can read a range, without moving data (Verify, NVM 1.0 section 3.2.8). From any reactor.
///
/// # Errors
/// The drive's status; `INVALID_OPCODE` when `bdev` is no namespace of this driver or its drive can not.
pub async fn verify(bdev: &Bdev, lba: u64, blocks: u64) -> Result<(), Status> {
    let unsupported = Status::INVALID_OPCODE.do_not_retry();
    let namespace = bdev.device().as_ref().as_any().downcast_ref::<Namespace>().ok_or(unsupported)?;
    let (target, controller) = (namespace.target, namespace.controller.upgrade().ok_or(unsupported)?);
    if controller.identity().oncs.get() & oncs::VERIFY == 0 {
        return Err(unsupported);
    }
    if lba.checked_add(blocks).is_none_or(|end| end > bdev.blocks()) {
        return Err(Status::LBA_OUT_OF_RANGE);
    }
    let (index, owner) = controller.pair_for(&reactor::current()).ok_or(Status::INVALID_NAMESPACE)?;
    let done = owner.call(move || async move {
        let pair = controller.pair(index).ok_or(Status::INVALID_NAMESPACE)?;
        let mut at = lba;
        while at < lba + blocks {
            let n = u64::from(target.max_blocks).min(lba + blocks - at);
            let mut sqe = Sqe::new(Opcode::Verify as u8);
            sqe.nsid = U32::new(target.nsid.0);
            sqe.set_rw(at, n as u32, RwControl::default());
            let (sender, receiver) = oneshot::channel();
            pair.submit(Request::new(sqe, SgList::new(), Owner::Task(sender)));
            receiver.await.map_err(|_| Status::INVALID_NAMESPACE)?.ok()?;
            at += n;
        }
        Ok(())
    });
    done.await.unwrap_or(Err(Status::INVALID_NAMESPACE))
}

/// A namespace's queue on a reactor that has a queue pair.
struct LocalQueue {
    pair: Rc<Pair>,
    target: Target,
}

impl Queue for LocalQueue {
    #[inline]
    fn submit(self: Rc<Self>, io: Box<Io>) {
        self.pair.submit_io(&self.target, io);
    }

    fn abort(&self, tag: u64) -> bool {
        self.pair.abort(tag)
    }
}
