//! Fabrics commands (NVMe Base 2.0 section 6). Each is a 64-byte view of an [`Sqe`]; `Sqe::view` and
//! `Sqe::from_view` convert.

use zerocopy::little_endian::{U16, U32, U64};

use crate::ids::{Cid, Cntlid, Qid};
use crate::nqn::{self, Nqn};
use crate::opcode::{FABRICS, Fabrics};
use crate::property::Property;
use crate::sgl::Sgl;
use crate::sqe::Sqe;
use crate::status::Status;
use crate::wire::{bits, wire};

/// RECFMT of Connect and Disconnect: 0.
pub const RECFMT: u16 = 0;
/// Smallest SQSIZE of a queue, 0's based (2 entries): NVMe Base 2.0 section 6.3.
pub const MIN_SQSIZE: u16 = 1;
/// PSDT = SGL in byte 1 (NVMe Base 2.0 section 6).
const PSDT_SGL: u8 = 0x40;

wire! {
    /// What all Fabrics commands share (NVMe Base 2.0 section 6).
    pub struct FabricsCommand: 64 {
        /// OPC, 7Fh.
        0 => pub opcode: u8,
        /// PSDT in bits 7:6: 01b.
        1 => pub flags: u8,
        /// CID.
        2 => pub cid: U16,
        /// FCTYPE, a [`Fabrics`] code.
        4 => pub fctype: u8,
        5 => _rsvd: [u8; 35],
        /// Command specific.
        40 => pub specific: [u8; 24],
    }
}

wire! {
    /// Connect (NVMe Base 2.0 section 6.3), with [`ConnectData`] as its data.
    pub struct Connect: 64 {
        /// OPC, 7Fh.
        0 => pub opcode: u8,
        /// PSDT in bits 7:6.
        1 => pub flags: u8,
        /// CID.
        2 => pub cid: U16,
        /// FCTYPE, 01h.
        4 => pub fctype: u8,
        5 => _rsvd5: [u8; 19],
        /// Where the 1,024 bytes of data are.
        24 => pub sgl: Sgl,
        /// RECFMT, 0.
        40 => pub recfmt: U16,
        /// QID: 0 Admin Queue, else an I/O queue.
        42 => pub qid: U16,
        /// SQSIZE: entries, 0's based; at least 1, admin at least 31, at most CAP.MQES for I/O.
        44 => pub sqsize: U16,
        /// CATTR, see [`Cattr`].
        46 => pub cattr: u8,
        47 => _rsvd47: u8,
        /// KATO, milliseconds, 0 = off; admin queue only.
        48 => pub kato_ms: U32,
        52 => _rsvd52: [u8; 12],
    }
}

bits! {
    /// CATTR of Connect (NVMe Base 2.0 section 6.3).
    pub struct Cattr(u8) {
        /// Priority class; weighted round robin only.
        priority, with_priority: 0, 2;
        /// The host wants no SQ flow control: SQHD is reserved in completions.
        no_sq_flow_control, with_no_sq_flow_control: 2, 1;
        /// Deletion of individual I/O queues (Disconnect) is supported by the host.
        individual_deletion, with_individual_deletion: 3, 1;
    }
}

wire! {
    /// Data of Connect (NVMe Base 2.0 section 6.3).
    pub struct ConnectData: 1024 {
        /// HOSTID, 128-bit host identifier.
        0 => pub hostid: [u8; 16],
        /// CNTLID: FFFFh dynamic, FFFEh any static, else the controller wanted.
        16 => pub cntlid: U16,
        18 => _rsvd18: [u8; 238],
        /// SUBNQN, NUL-terminated UTF-8.
        256 => pub subnqn: [u8; 256],
        /// HOSTNQN, NUL-terminated UTF-8.
        512 => pub hostnqn: [u8; 256],
        768 => _rsvd768: [u8; 256],
    }
}

/// Byte offsets that IPO reports for a bad Connect.
pub mod ipo {
    /// RECFMT, in the SQE.
    pub const RECFMT: u16 = 40;
    /// QID, in the SQE.
    pub const QID: u16 = 42;
    /// SQSIZE, in the SQE.
    pub const SQSIZE: u16 = 44;
    /// CATTR, in the SQE.
    pub const CATTR: u16 = 46;
    /// KATO, in the SQE.
    pub const KATO: u16 = 48;
    /// HOSTID, in the data.
    pub const HOSTID: u16 = 0;
    /// CNTLID, in the data.
    pub const CNTLID: u16 = 16;
    /// SUBNQN, in the data.
    pub const SUBNQN: u16 = 256;
    /// HOSTNQN, in the data.
    pub const HOSTNQN: u16 = 512;
}

/// Why Connect fails, with what DW0 of the completion says about it (NVMe Base 2.0 section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ConnectReject {
    /// RECFMT is not supported.
    #[error("Connect: incompatible format")]
    Format,
    /// The controller (static model) is taken, or no more can be had.
    #[error("Connect: controller busy")]
    Busy,
    /// A field of the submission queue entry is invalid; its byte offset, see [`ipo`].
    #[error("Connect: invalid parameter at byte {0} of the command")]
    Command(u16),
    /// A field of the data is invalid; its byte offset, see [`ipo`].
    #[error("Connect: invalid parameter at byte {0} of the data")]
    Data(u16),
    /// The host shall read the discovery log again.
    #[error("Connect: restart discovery")]
    RestartDiscovery,
    /// This host may not connect to this subsystem.
    #[error("Connect: host is not allowed")]
    Host,
}

impl ConnectReject {
    /// Status and DW0. DNR is set where trying again cannot help.
    pub const fn completion(&self) -> (Status, u32) {
        match *self {
            Self::Format => (Status::CONNECT_INCOMPATIBLE_FORMAT.with_dnr(), 0),
            Self::Busy => (Status::CONNECT_CONTROLLER_BUSY, 0),
            Self::Command(ipo) => (Status::CONNECT_INVALID_PARAMETERS.with_dnr(), ipo as u32),
            Self::Data(ipo) => (Status::CONNECT_INVALID_PARAMETERS.with_dnr(), 1 << 16 | ipo as u32),
            Self::RestartDiscovery => (Status::CONNECT_RESTART_DISCOVERY, 0),
            Self::Host => (Status::CONNECT_INVALID_HOST.with_dnr(), 0),
        }
    }
}

bits! {
    /// DW0 of a successful Connect (NVMe Base 2.0 section 6.3).
    pub struct ConnectResult(u32) {
        /// CNTLID: the controller allocated.
        cntlid, with_cntlid: 0, 16;
        /// AUTHREQ bit 1, ATR: authentication transaction required.
        atr, with_atr: 17, 1;
        /// AUTHREQ bit 2, ASCR: a secure channel and authentication are required.
        ascr, with_ascr: 18, 1;
    }
}

/// The names and numbers in the data of a Connect, checked for form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectNames<'a> {
    /// HOSTID, not 0.
    pub hostid: [u8; 16],
    /// CNTLID as wanted by the host.
    pub cntlid: Cntlid,
    /// SUBNQN, 1 to 223 bytes.
    pub subnqn: &'a str,
    /// HOSTNQN, 1 to 223 bytes.
    pub hostnqn: &'a str,
}

impl ConnectData {
    /// Data of a host that connects.
    pub fn new(hostid: [u8; 16], cntlid: Cntlid, subnqn: Nqn<'_>, hostnqn: Nqn<'_>) -> Self {
        Self {
            hostid,
            cntlid: U16::new(cntlid.0),
            subnqn: subnqn.to_field(),
            hostnqn: hostnqn.to_field(),
            ..Default::default()
        }
    }

    /// Checks termination, length and encoding of both names and that HOSTID is not 0.
    pub fn names(&self) -> Result<ConnectNames<'_>, ConnectReject> {
        if self.hostid == [0; 16] {
            return Err(ConnectReject::Data(ipo::HOSTID));
        }
        let subnqn = nqn::field_text(&self.subnqn).map_err(|_| ConnectReject::Data(ipo::SUBNQN))?;
        let hostnqn = nqn::field_text(&self.hostnqn).map_err(|_| ConnectReject::Data(ipo::HOSTNQN))?;
        Ok(ConnectNames { hostid: self.hostid, cntlid: Cntlid(self.cntlid.get()), subnqn, hostnqn })
    }
}

impl Connect {
    /// Connect with its data in the capsule. `sqsize` is 0's based.
    pub fn new(cid: Cid, qid: Qid, sqsize: u16, kato_ms: u32) -> Self {
        Self {
            opcode: FABRICS,
            flags: PSDT_SGL,
            cid: U16::new(cid.0),
            fctype: Fabrics::Connect as u8,
            sgl: Sgl::in_capsule(0, size_of::<ConnectData>() as u32),
            recfmt: U16::new(RECFMT),
            qid: U16::new(qid.0),
            sqsize: U16::new(sqsize),
            kato_ms: U32::new(kato_ms),
            ..Default::default()
        }
    }

    /// Checks RECFMT and SQSIZE. `max_sqsize` is 0's based: CAP.MQES for I/O queues.
    pub fn check(&self, max_sqsize: u16) -> Result<(), ConnectReject> {
        if self.recfmt.get() != RECFMT {
            return Err(ConnectReject::Format);
        }
        if !(MIN_SQSIZE..=max_sqsize).contains(&self.sqsize.get()) {
            return Err(ConnectReject::Command(ipo::SQSIZE));
        }
        Ok(())
    }

    /// QID.
    pub const fn qid(&self) -> Qid {
        Qid(self.qid.get())
    }

    /// CATTR.
    pub const fn cattr(&self) -> Cattr {
        Cattr(self.cattr)
    }
}

wire! {
    /// Property Get and Property Set (NVMe Base 2.0 sections 6.5 and 6.6).
    pub struct PropertyCommand: 64 {
        /// OPC, 7Fh.
        0 => pub opcode: u8,
        /// Reserved: no data.
        1 => pub flags: u8,
        /// CID.
        2 => pub cid: U16,
        /// FCTYPE, 00h (set) or 04h (get).
        4 => pub fctype: u8,
        5 => _rsvd5: [u8; 35],
        /// ATTRIB: bits 2:0 the size, 000b = 4 bytes, 001b = 8 bytes.
        40 => pub attrib: u8,
        41 => _rsvd41: [u8; 3],
        /// OFST, bytes.
        44 => pub offset: U32,
        /// VALUE, Property Set only; a 4-byte property uses the low half.
        48 => pub value: U64,
        56 => _rsvd56: [u8; 8],
    }
}

impl PropertyCommand {
    /// Property Get.
    pub fn get(cid: Cid, property: Property) -> Self {
        Self {
            opcode: FABRICS,
            flags: PSDT_SGL,
            cid: U16::new(cid.0),
            fctype: Fabrics::PropertyGet as u8,
            attrib: u8::from(property.size_bytes() == 8),
            offset: U32::new(property as u32),
            ..Default::default()
        }
    }

    /// Property Set.
    pub fn set(cid: Cid, property: Property, value: u64) -> Self {
        Self { fctype: Fabrics::PropertySet as u8, value: U64::new(value), ..Self::get(cid, property) }
    }

    /// The property named, if it exists on fabrics, has the size asked for and, for Property Set, can be
    /// written; otherwise the status to report.
    pub fn property(&self) -> Result<Property, Status> {
        let property = Property::from_offset(self.offset.get()).ok_or(Status::INVALID_FIELD.with_dnr())?;
        let wide = match self.attrib & 7 {
            0 => false,
            1 => true,
            _ => return Err(Status::INVALID_FIELD.with_dnr()),
        };
        let set = self.fctype == Fabrics::PropertySet as u8;
        if wide != (property.size_bytes() == 8) || (set && !property.is_writable()) {
            return Err(Status::INVALID_FIELD.with_dnr());
        }
        Ok(property)
    }
}

wire! {
    /// Disconnect (NVMe Base 2.0 section 6.4): deletes the I/O queue it is sent on.
    pub struct Disconnect: 64 {
        /// OPC, 7Fh.
        0 => pub opcode: u8,
        /// Reserved: no data.
        1 => pub flags: u8,
        /// CID.
        2 => pub cid: U16,
        /// FCTYPE, 08h.
        4 => pub fctype: u8,
        5 => _rsvd5: [u8; 35],
        /// RECFMT, 0.
        40 => pub recfmt: U16,
        42 => _rsvd42: [u8; 22],
    }
}

impl Disconnect {
    /// Disconnect.
    pub fn new(cid: Cid) -> Self {
        Self {
            opcode: FABRICS,
            flags: PSDT_SGL,
            cid: U16::new(cid.0),
            fctype: Fabrics::Disconnect as u8,
            ..Default::default()
        }
    }
}

wire! {
    /// Authentication Send and Receive (NVMe Base 2.0 sections 6.1, 6.2).
    pub struct Authentication: 64 {
        /// OPC, 7Fh.
        0 => pub opcode: u8,
        /// PSDT in bits 7:6.
        1 => pub flags: u8,
        /// CID.
        2 => pub cid: U16,
        /// FCTYPE, 05h (send) or 06h (receive).
        4 => pub fctype: u8,
        5 => _rsvd5: [u8; 19],
        /// Where the message is.
        24 => pub sgl: Sgl,
        40 => _rsvd40: u8,
        /// SPSP0, 01h.
        41 => pub spsp0: u8,
        /// SPSP1, 01h.
        42 => pub spsp1: u8,
        /// SECP, security protocol; E9h = NVMe in-band authentication.
        43 => pub secp: u8,
        /// TL (send), AL (receive): bytes.
        44 => pub len: U32,
        48 => _rsvd48: [u8; 16],
    }
}

/// SECP of NVMe in-band authentication (NVMe Base 2.0 section 8.13).
pub const SECP_NVME: u8 = 0xe9;

impl Authentication {
    /// Authentication Send of `len` bytes in the capsule.
    pub fn send(cid: Cid, len: u32) -> Self {
        Self::new(Fabrics::AuthenticationSend, cid, len, Sgl::in_capsule(0, len))
    }

    /// Authentication Receive of up to `len` bytes.
    pub fn receive(cid: Cid, len: u32) -> Self {
        Self::new(Fabrics::AuthenticationReceive, cid, len, Sgl::transport(len))
    }

    fn new(fctype: Fabrics, cid: Cid, len: u32, sgl: Sgl) -> Self {
        Self {
            opcode: FABRICS,
            flags: PSDT_SGL,
            cid: U16::new(cid.0),
            fctype: fctype as u8,
            sgl,
            spsp0: 1,
            spsp1: 1,
            secp: SECP_NVME,
            len: U32::new(len),
            ..Default::default()
        }
    }

    /// Checks the security protocol fields.
    pub fn check(&self) -> Result<(), Status> {
        if (self.secp, self.spsp0, self.spsp1) == (SECP_NVME, 1, 1) {
            Ok(())
        } else {
            Err(Status::INVALID_FIELD.with_dnr())
        }
    }
}

/// A Fabrics command, by FCTYPE.
#[derive(Clone, Copy, Debug)]
pub enum Command<'a> {
    /// Property Set.
    PropertySet(&'a PropertyCommand),
    /// Connect.
    Connect(&'a Connect),
    /// Property Get.
    PropertyGet(&'a PropertyCommand),
    /// Authentication Send.
    AuthenticationSend(&'a Authentication),
    /// Authentication Receive.
    AuthenticationReceive(&'a Authentication),
    /// Disconnect.
    Disconnect(&'a Disconnect),
}

impl Sqe {
    /// The entry as a Fabrics command; Invalid Command Opcode if its opcode is not 7Fh, Invalid Field if
    /// its FCTYPE is unknown.
    pub fn fabrics(&self) -> Result<Command<'_>, Status> {
        if self.opcode != FABRICS {
            return Err(Status::INVALID_OPCODE.with_dnr());
        }
        let fctype = self.view::<FabricsCommand>().fctype;
        Ok(match Fabrics::from_u8(fctype).ok_or(Status::INVALID_FIELD.with_dnr())? {
            Fabrics::PropertySet => Command::PropertySet(self.view()),
            Fabrics::Connect => Command::Connect(self.view()),
            Fabrics::PropertyGet => Command::PropertyGet(self.view()),
            Fabrics::AuthenticationSend => Command::AuthenticationSend(self.view()),
            Fabrics::AuthenticationReceive => Command::AuthenticationReceive(self.view()),
            Fabrics::Disconnect => Command::Disconnect(self.view()),
        })
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    #[rustfmt::skip]
    fn golden_connect() {
        let sqe = Sqe::from_view(&Connect::new(Cid(0x0102), Qid(3), 127, 0x0001_d4c0));
        let want = [
            0x7f, 0x40, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 1,
            /* RECFMT */ 0, 0, /* QID */ 3, 0, /* SQSIZE */ 127, 0, /* CATTR */ 0, 0, /* KATO */ 0xc0, 0xd4, 1, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(sqe.as_bytes(), want);
        let Ok(Command::Connect(c)) = sqe.fabrics() else { panic!("not Connect") };
        assert_eq!((c.qid(), c.check(127)), (Qid(3), Ok(())));
        assert_eq!(c.check(126), Err(ConnectReject::Command(44)));
        assert_eq!(Connect { sqsize: U16::new(0), ..*c }.check(127), Err(ConnectReject::Command(44)));
        assert_eq!(Connect { recfmt: U16::new(1), ..*c }.check(127), Err(ConnectReject::Format));
    }

    #[test]
    fn golden_property() {
        let sqe = Sqe::from_view(&PropertyCommand::set(Cid(9), Property::Cc, 0x0046_0001));
        let mut want = [0; 64];
        (want[0], want[1], want[2]) = (0x7f, 0x40, 9);
        (want[44], want[48], want[50]) = (0x14, 1, 0x46);
        assert_eq!(sqe.as_bytes(), want);
        let sqe = Sqe::from_view(&PropertyCommand::get(Cid(9), Property::Cap));
        assert_eq!((sqe.as_bytes()[4], sqe.as_bytes()[40], sqe.as_bytes()[44]), (4, 1, 0));
    }

    #[test]
    fn property_access_rules() {
        let get = |p| PropertyCommand::get(Cid(0), p);
        assert_eq!(get(Property::Cap).property(), Ok(Property::Cap));
        let refused = Err(Status::INVALID_FIELD.with_dnr());
        assert_eq!(PropertyCommand { attrib: 0, ..get(Property::Cap) }.property(), refused);
        assert_eq!(PropertyCommand { attrib: 1, ..get(Property::Cc) }.property(), refused);
        assert_eq!(PropertyCommand { attrib: 2, ..get(Property::Cc) }.property(), refused);
        assert_eq!(PropertyCommand { offset: U32::new(0x10), ..get(Property::Cc) }.property(), refused);
        assert_eq!(PropertyCommand::set(Cid(0), Property::Vs, 0).property(), refused);
        assert_eq!(PropertyCommand::set(Cid(0), Property::Cc, 0).property(), Ok(Property::Cc));
    }

    #[test]
    fn connect_data() {
        let sub = Nqn::parse("nqn.2016-06.io.spdk:cnode1").expect("legal");
        let host = Nqn::parse("nqn.2014-08.com.example:host").expect("legal");
        let good = ConnectData::new([7; 16], Cntlid::DYNAMIC, sub, host);
        let names = good.names().expect("legal");
        assert_eq!((names.subnqn, names.hostnqn), (sub.as_str(), host.as_str()));
        assert_eq!(names.cntlid, Cntlid::DYNAMIC);
        let reject = |d: ConnectData| d.names().map_err(|e| e.completion().1).unwrap_err();
        assert_eq!(reject(ConnectData { hostid: [0; 16], ..good }), 0x1_0000);
        assert_eq!(reject(ConnectData { subnqn: [b'x'; 256], ..good }), 0x1_0100);
        assert_eq!(reject(ConnectData { hostnqn: [0xff; 256], ..good }), 0x1_0200);
        assert_eq!(reject(ConnectData { hostnqn: [0; 256], ..good }), 0x1_0200);
        assert_eq!(ConnectReject::Command(ipo::QID).completion().1, 42);
    }

    #[test]
    fn unknown_commands() {
        let mut sqe = Sqe::new(FABRICS);
        for fctype in 0..=255u8 {
            sqe.nsid = U32::new(fctype.into());
            assert_eq!(sqe.fabrics().is_ok(), Fabrics::from_u8(fctype).is_some());
        }
        assert_eq!(Sqe::new(2).fabrics().unwrap_err(), Status::INVALID_OPCODE.with_dnr());
    }
}
