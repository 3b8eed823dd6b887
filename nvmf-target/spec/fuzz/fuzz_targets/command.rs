//! Any submission queue entry with any data: every view, decoder and list reader.
#![no_main]

use cryptfold_nvmf_spec::fabrics::{Command, ConnectData};
use cryptfold_nvmf_spec::features::NumberOfQueues;
use cryptfold_nvmf_spec::identify::{ControllerList, DescriptorList, IdentifyController, NamespaceIdentify};
use cryptfold_nvmf_spec::log::{DiscoveryEntry, GetLogPage};
use cryptfold_nvmf_spec::{Nqn, Sqe, copy, dsm};
use libfuzzer_sys::fuzz_target;
use zerocopy::FromBytes;

fn commands(sqe: &Sqe, data: &[u8]) {
    match sqe.fabrics() {
        Ok(Command::Connect(c)) => {
            let _ = c.check(127);
            if let Ok((data, _)) = ConnectData::ref_from_prefix(data)
                && let Ok(names) = data.names()
            {
                assert!((1..=223).contains(&names.subnqn.len()));
                let _ = (Nqn::parse(names.subnqn), Nqn::parse(names.hostnqn));
            }
        }
        Ok(Command::PropertyGet(p) | Command::PropertySet(p)) => drop(p.property()),
        Ok(Command::AuthenticationSend(a) | Command::AuthenticationReceive(a)) => drop(a.check()),
        Ok(Command::Disconnect(_)) | Err(_) => {}
    }
    let _ = sqe.sgl.kind();
    let blocks = sqe.slba();
    for range in dsm::ranges(sqe, data).unwrap_or_default() {
        if let Ok((slba, n)) = range.within(blocks) {
            assert!(slba + u64::from(n) <= blocks);
        }
    }
    for range in copy::ranges(sqe, data).unwrap_or_default() {
        if let Ok((slba, n)) = range.within(blocks) {
            assert!(slba + u64::from(n) <= blocks);
        }
    }
    let request = GetLogPage::from_sqe(sqe);
    let mut out = [0xa5; 64];
    if request.copy_window(data, &mut out).is_ok() {
        assert!(request.offset <= data.len() as u64);
    }
    let _ = NumberOfQueues(sqe.cdw11.get()).grant(64);
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok((sqe, data)) = Sqe::ref_from_prefix(bytes) {
        commands(sqe, data);
    }
    if let Ok((list, _)) = DescriptorList::ref_from_prefix(bytes) {
        assert!(list.iter().count() <= 1024);
    }
    if let Ok((list, _)) = ControllerList::ref_from_prefix(bytes) {
        assert!(list.iter().count() <= 2047);
    }
    if let Ok((id, _)) = NamespaceIdentify::ref_from_prefix(bytes) {
        let _ = id.block_bytes();
    }
    if let Ok((id, _)) = IdentifyController::ref_from_prefix(bytes) {
        let _ = (id.max_transfer_bytes(15), id.capsule_data_bytes());
    }
    if let Ok((entry, _)) = DiscoveryEntry::ref_from_prefix(bytes) {
        let _ = (entry.traddr(), entry.trsvcid());
    }
});
