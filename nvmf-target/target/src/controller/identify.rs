//! Identify: the truth about this controller and its namespaces.

use cryptfold_nvmf_spec::identify::{
    Cns, CommandSetCombinations, ControllerList, ControllerType, Csi, DescriptorList, IdentifyController,
    IndependentNamespace, NamespaceId, NamespaceIdentify, NamespaceList, NvmController, NvmNamespace, anacap,
    cmic, ctratt, nsfeat, oaes, oncs, set_text,
};
use cryptfold_nvmf_spec::sqe::{IdentifyCdw10, IdentifyCdw11};
use cryptfold_nvmf_spec::{Cntlid, Nqn, Nsid, Sqe, Status};
use cryptfold_reactor::memory::Buf;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::records::ERRORS;
use super::{ACL, Answer, Controller, VERSION, events};
use crate::io;
use crate::subsystem::Namespace;

/// Seconds that an ANA change may take (ANATT).
const ANA_TRANSITION_S: u8 = 10;

impl Controller {
    pub(super) fn identify(&self, sqe: &Sqe, room: u32) -> Result<Answer, Status> {
        let (d10, d11) = (IdentifyCdw10(sqe.cdw10.get()), IdentifyCdw11(sqe.cdw11.get()));
        let cns = Cns::from_u8(d10.cns() as u8).ok_or(Status::INVALID_FIELD.with_dnr())?;
        if self.is_discovery() && cns != Cns::Controller {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let by_command_set = matches!(cns, Cns::CsNamespace | Cns::CsController | Cns::CsActiveNamespaces);
        if by_command_set && d11.csi() != Csi::Nvm as u32 {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        let nsid = sqe.nsid();
        let from = Cntlid(d10.cntid() as u16);
        let controllers = || self.subsystem.controllers().into_iter().map(|c| c.cntlid);
        let bytes = match cns {
            Cns::Controller => self.identify_controller().as_bytes().to_vec(),
            Cns::Namespace => match self.known(nsid)? {
                Some(ns) => identify_namespace(&ns).as_bytes().to_vec(),
                None => NamespaceIdentify::default().as_bytes().to_vec(),
            },
            Cns::ActiveNamespaces | Cns::CsActiveNamespaces => {
                if nsid.0 >= 0xffff_fffe {
                    return Err(Status::INVALID_NAMESPACE.with_dnr());
                }
                let all = self.subsystem.namespaces(&self.host.nqn).into_iter().map(|n| n.nsid);
                NamespaceList::after(nsid, all).as_bytes().to_vec()
            }
            Cns::NamespaceDescriptors => descriptors(self.active(nsid)?.as_ref()).as_bytes().to_vec(),
            Cns::CsNamespace => {
                self.known(nsid)?;
                NvmNamespace::default().as_bytes().to_vec()
            }
            // No limits beyond MDTS; deallocation takes any range.
            Cns::CsController => NvmController::default().as_bytes().to_vec(),
            Cns::IndependentNamespace => match self.known(nsid)? {
                Some(ns) => independent(&ns).as_bytes().to_vec(),
                None => IndependentNamespace::default().as_bytes().to_vec(),
            },
            Cns::AttachedControllers => {
                self.active(nsid)?;
                ControllerList::from(from, controllers()).as_bytes().to_vec()
            }
            Cns::SubsystemControllers => ControllerList::from(from, controllers()).as_bytes().to_vec(),
            Cns::CommandSets => CommandSetCombinations::nvm().as_bytes().to_vec(),
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        };
        let len = bytes.len().min(room as usize);
        Ok(Answer::Data(Buf::from_slice(&bytes[..len])))
    }

    /// `None`: a legal identifier without a namespace.
    fn known(&self, nsid: Nsid) -> Result<Option<std::sync::Arc<Namespace>>, Status> {
        if nsid.0 == 0 || nsid.0 > self.subsystem.max_namespaces() {
            return Err(Status::INVALID_NAMESPACE.with_dnr());
        }
        Ok(self.subsystem.namespace(nsid, &self.host.nqn))
    }

    /// Whether a namespace of this host knows Write Uncorrectable; others refuse the opcode.
    pub(super) fn knows_uncorrectable(&self) -> bool {
        self.subsystem.namespaces(&self.host.nqn).iter().any(|n| n.geometry().can_uncorrectable)
    }

    fn active(&self, nsid: Nsid) -> Result<std::sync::Arc<Namespace>, Status> {
        self.known(nsid)?.ok_or(Status::INVALID_NAMESPACE.with_dnr())
    }

    fn identify_controller(&self) -> IdentifyController {
        let (o, s) = (&self.options, &self.subsystem.options);
        let kind = if self.is_discovery() { ControllerType::Discovery } else { ControllerType::Io };
        // The name was checked when the subsystem was created.
        let nqn = Nqn::parse(&s.nqn).unwrap_or_else(|_| unreachable!("a subsystem's name is an NQN"));
        let mut id = IdentifyController::fabrics(kind, self.cntlid, nqn, VERSION);
        set_text(&mut id.fr, env!("CARGO_PKG_VERSION"));
        id.mdts = (o.max_io_size / 4096).ilog2() as u8;
        id.ctratt = U32::new(ctratt::HOSTID_128);
        id.aerl = events::SLOTS as u8 - 1;
        id.kas = U16::new(o.kas);
        // Extended data: offsets in Get Log Page.
        id.lpa = 1 << 2;
        id.msdbd = 1;
        id.maxcmd = U16::new(o.max_queue_depth);
        if self.is_discovery() {
            id.oaes = U32::new(oaes::DISCOVERY_CHANGE);
            id.maxcmd = U16::new(o.max_aq_depth);
            return id;
        }
        set_text(&mut id.sn, &s.serial_number);
        set_text(&mut id.mn, &s.model_number);
        let crdt = self.target.upgrade().map(|t| t.crdt()).unwrap_or_default();
        [id.crdt1, id.crdt2, id.crdt3] = crdt.map(U16::new);
        id.cmic = cmic::MULTI_PORT | cmic::MULTI_CONTROLLER;
        let mut oaes = oaes::NAMESPACE_ATTRIBUTES;
        id.acl = ACL;
        // One firmware slot, read only.
        id.frmw = 1 << 1 | 1;
        id.lpa |= 1 << 1;
        id.nn = U32::new(self.subsystem.max_namespaces());
        id.mnan = id.nn;
        id.oncs = U16::new(
            oncs::COMPARE
                | oncs::DSM
                | oncs::WRITE_ZEROES
                | oncs::SAVE
                | oncs::RESERVATIONS
                | oncs::VERIFY
                | oncs::COPY
                | if self.knows_uncorrectable() { oncs::WRITE_UNCORRECTABLE } else { 0 },
        );
        id.cdfs = U16::new(1);
        id.elpe = ERRORS as u8 - 1;
        // Write protection for good (of namespaces with a state file), and until the target is restarted.
        id.nwpc = 1 << 0 | 1 << 1;
        id.fuses = U16::new(1);
        // Present in any case: a namespace with a cache may be added later, and a host that has once read "no cache" would
        // never flush it. Flush needs a namespace (10b).
        id.vwc = 1 | 0b10 << 1;
        id.ofcs = U16::new(1);
        id.set_capsule_data(o.in_capsule_data_size);
        if s.ana_reporting {
            id.cmic |= cmic::ANA;
            oaes |= oaes::ANA_CHANGE;
            id.anatt_s = ANA_TRANSITION_S;
            id.anacap = anacap::OPTIMIZED
                | anacap::NON_OPTIMIZED
                | anacap::INACCESSIBLE
                | anacap::PERSISTENT_LOSS
                | anacap::CHANGE;
            id.anagrpmax = id.nn;
            id.nanagrpid = id.nn;
        }
        id.oaes = U32::new(oaes);
        id
    }
}

/// 0's based, saturating.
fn less_one(n: u32) -> U16 {
    U16::new(u16::try_from(n.saturating_sub(1)).unwrap_or(u16::MAX))
}

fn identify_namespace(ns: &Namespace) -> NamespaceIdentify {
    let (geometry, info) = (ns.geometry(), ns.bdev().info());
    let mut id = NamespaceIdentify::new(geometry.blocks, geometry.block_bytes.ilog2() as u8);
    id.nvmcap = (u128::from(geometry.blocks) * u128::from(geometry.block_bytes)).into();
    id.nsfeat = nsfeat::ATOMICS;
    if info.thin {
        id.nsfeat |= nsfeat::THIN;
        if let Some(allocated) = ns.bdev().device().allocated_bytes() {
            let blocks = allocated.div_ceil(u64::from(geometry.block_bytes));
            id.nuse = blocks.min(geometry.blocks).into();
        }
    }
    id.nmic = 1;
    if geometry.deallocate_zeroes {
        // Deallocated blocks read as zeros, and Write Zeroes deallocates when asked to.
        id.dlfeat = 1 | 1 << 3;
    }
    let atomic = less_one(info.atomic_blocks);
    (id.nawun, id.nawupf, id.nacwu) = (atomic, atomic, atomic);
    // What crosses the edge of such a unit may be torn there.
    (id.nabsn, id.nabspf) = (atomic, atomic);
    if info.optimal_io_blocks > 0 {
        // Not NOIOB: that is a boundary at which hosts cut every request, reads too.
        id.nsfeat |= nsfeat::OPTIMAL_IO;
        let unit = less_one(info.optimal_io_blocks);
        (id.npwg, id.npwa, id.npdg, id.npda, id.nows) = (unit, unit, unit, unit, unit);
    }
    let most = io::copy_max_blocks(geometry.block_bytes);
    id.mssrl = U16::new(most as u16);
    id.mcl = U32::new(most);
    id.msrc = (io::COPY_MAX_RANGES - 1) as u8;
    id.rescap = ns.reservations.capabilities();
    id.nsattr = ns.is_protected().into();
    id.anagrpid = U32::new(ns.anagrpid());
    id.nguid = ns.nguid;
    id.eui64 = ns.eui64;
    id
}

fn independent(ns: &Namespace) -> IndependentNamespace {
    let mut id = IndependentNamespace::default();
    id.nmic = 1;
    id.rescap = ns.reservations.capabilities();
    id.anagrpid = U32::new(ns.anagrpid());
    id.nsattr = ns.is_protected().into();
    id.nstat = 1;
    id
}

fn descriptors(ns: &Namespace) -> DescriptorList {
    let mut ids = Vec::new();
    if ns.eui64 != [0; 8] {
        ids.push(NamespaceId::Eui64(ns.eui64));
    }
    if ns.nguid != [0; 16] {
        ids.push(NamespaceId::Nguid(ns.nguid));
    }
    if !ns.uuid.is_nil() {
        ids.push(NamespaceId::Uuid(*ns.uuid.as_bytes()));
    }
    ids.push(NamespaceId::Csi(Csi::Nvm as u8));
    DescriptorList::new(&ids)
}
