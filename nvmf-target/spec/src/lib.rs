//! NVMe and NVMe over Fabrics structures and codecs, without I/O and (but for messages of `auth`) without allocation.
//!
//! Used by the target, the initiator and the PCIe driver. Everything here follows the wire: fixed-width
//! little-endian fields, offsets and sizes asserted at compile time, reserved bytes zero by default. What
//! comes from a peer is parsed once into typed values; what is wrong with it is a value, never a panic.
//!
//! Sources, as cited in the comments: NVM Express Base Specification 2.0 ("NVMe Base 2.0"), NVM Command Set
//! Specification 1.0 ("NVM 1.0"), NVMe over TCP Transport Specification 1.0 ("NVMe/TCP 1.0").
//!
//! Units: bytes unless a name ends in another one; logical blocks are "blocks"; "0's based" means that the
//! stored value is one less than the count.

mod wire;

pub mod auth;
pub mod copy;
pub mod cqe;
pub mod dsm;
pub mod enable;
pub mod fabrics;
pub mod features;
pub mod identify;
pub mod ids;
pub mod log;
pub mod nqn;
pub mod opcode;
pub mod pdu;
pub mod property;
pub mod reservation;
pub mod sgl;
pub mod sqe;
pub mod status;

pub use cqe::Cqe;
pub use ids::{Cid, Cntlid, Nsid, Qid, Ttag};
pub use nqn::Nqn;
pub use sgl::Sgl;
pub use sqe::Sqe;
pub use status::Status;
