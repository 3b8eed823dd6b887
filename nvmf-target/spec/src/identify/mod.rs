//! Identify data structures (NVMe Base 2.0 section 5.17, NVM 1.0 section 4.1.5). All are 4,096 bytes.

mod controller;
mod list;
mod namespace;

pub use controller::{
    ControllerType, IdentifyController, NvmController, PowerState, Text, anacap, cmic, ctratt, oacs, oaes,
    oncs, set_text, sgls,
};
pub use list::{
    CommandSetCombinations, ControllerList, DescriptorList, MAX_CONTROLLERS, MAX_NAMESPACES, NamespaceId,
    NamespaceList,
};
pub use namespace::{IndependentNamespace, LbaFormat, NamespaceIdentify, NvmNamespace, nsfeat};

use crate::opcode::opcodes;

/// Bytes of every Identify data structure.
pub const BYTES: usize = 4096;

opcodes! {
    /// CNS: which structure Identify returns (NVMe Base 2.0 section 5.17.1).
    Cns {
        /// Identify Namespace, of the NVM command set.
        Namespace = 0x00,
        /// Identify Controller.
        Controller = 0x01,
        /// Active namespace list: NSIDs above the command's.
        ActiveNamespaces = 0x02,
        /// Namespace identification descriptors.
        NamespaceDescriptors = 0x03,
        /// NVM set list.
        NvmSets = 0x04,
        /// Command set specific Identify Namespace.
        CsNamespace = 0x05,
        /// Command set specific Identify Controller.
        CsController = 0x06,
        /// Active namespace list of a command set.
        CsActiveNamespaces = 0x07,
        /// Command set independent Identify Namespace.
        IndependentNamespace = 0x08,
        /// Allocated namespace list.
        AllocatedNamespaces = 0x10,
        /// Identify Namespace of an allocated namespace.
        AllocatedNamespace = 0x11,
        /// Controllers attached to the namespace, from CNTID on.
        AttachedControllers = 0x12,
        /// Controllers in the subsystem, from CNTID on.
        SubsystemControllers = 0x13,
        /// Primary controller capabilities.
        PrimaryCapabilities = 0x14,
        /// Secondary controller list.
        SecondaryControllers = 0x15,
        /// Namespace granularity list.
        NamespaceGranularity = 0x16,
        /// UUID list.
        UuidList = 0x17,
        /// Domain list.
        Domains = 0x18,
        /// Endurance group list.
        EnduranceGroups = 0x19,
        /// I/O command set combinations.
        CommandSets = 0x1c,
    }
}

opcodes! {
    /// CSI: command set identifier (NVMe Base 2.0 section 5.17.1).
    Csi {
        /// NVM.
        Nvm = 0x00,
        /// Key value.
        KeyValue = 0x01,
        /// Zoned namespace.
        Zoned = 0x02,
    }
}
