//! Numbers that must not be mixed up, each in its own type. All are plain host-order integers.

macro_rules! id {
    ($(#[$meta:meta])* $name:ident($int:ty), $fmt:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $int);

        impl From<$int> for $name {
            fn from(value: $int) -> Self {
                Self(value)
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, $fmt, self.0)
            }
        }
    };
}

id!(
    /// Command Identifier: unique among a submission queue's outstanding commands; FFFFh should not be used
    /// (NVMe Base 2.0 section 3.3.3.1).
    Cid(u16), "{}"
);
id!(
    /// Queue Identifier: 0 is the Admin Queue, 1..=65534 are I/O queues (NVMe Base 2.0 section 6.3).
    Qid(u16), "{}"
);
id!(
    /// Controller Identifier: 0..=FFEFh name controllers, FFFFh asks for a dynamic one, FFFEh for any static
    /// one (NVMe Base 2.0 section 6.3).
    Cntlid(u16), "{}"
);
id!(
    /// Namespace Identifier: 0 = none, 1..=FFFFFFFEh, FFFFFFFFh = all (NVMe Base 2.0 section 3.2.1.2).
    Nsid(u32), "{}"
);
id!(
    /// Transfer Tag: chosen by the controller in an R2T, echoed in H2CData (NVMe/TCP 1.0 section 3.6.2.8).
    Ttag(u16), "{}"
);

impl Qid {
    /// The Admin Queue.
    pub const ADMIN: Self = Self(0);

    /// Whether this is the Admin Queue.
    pub const fn is_admin(self) -> bool {
        self.0 == 0
    }
}

impl Cntlid {
    /// Connect: "allocate any controller" under the dynamic controller model.
    pub const DYNAMIC: Self = Self(0xffff);
    /// Connect: "any available static controller".
    pub const ANY_STATIC: Self = Self(0xfffe);
    /// Largest identifier of a real controller.
    pub const MAX: Self = Self(0xffef);
}

impl Nsid {
    /// Not a namespace.
    pub const NONE: Self = Self(0);
    /// Broadcast value: all namespaces.
    pub const ALL: Self = Self(0xffff_ffff);

    /// Whether the value can name one namespace (neither 0 nor the broadcast value).
    pub const fn is_specific(self) -> bool {
        self.0 != 0 && self.0 != 0xffff_ffff
    }
}
