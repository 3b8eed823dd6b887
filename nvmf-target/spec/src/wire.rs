//! Macros that declare wire structures and bit fields.
//!
//! `wire!` writes each field's byte offset beside its name, as the figures of the specifications do, and
//! asserts offsets and total size at compile time. All integers are little-endian and unaligned, there is no
//! padding, and `Default` is all zeros, so reserved bytes are zero unless somebody sets them.

macro_rules! wire {
    ($(#[$meta:meta])* $vis:vis struct $name:ident : $size:literal {
        $( $(#[$fmeta:meta])* $off:literal => $fvis:vis $field:ident : $ty:ty ),+ $(,)?
    }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, zerocopy::FromBytes, zerocopy::IntoBytes,
            zerocopy::Immutable, zerocopy::KnownLayout, zerocopy::Unaligned,
        )]
        #[repr(C)]
        $vis struct $name { $( $(#[$fmeta])* $fvis $field: $ty ),+ }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $( assert!(core::mem::offset_of!($name, $field) == $off); )+
        };

        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}

macro_rules! bits {
    ($(#[$meta:meta])* $vis:vis struct $name:ident($int:ty) {
        $( $(#[$fmeta:meta])* $get:ident, $with:ident : $lo:literal, $width:literal ; )*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        $vis struct $name(
            /// The raw value, host byte order.
            pub $int,
        );

        impl $name {
            $(
                $(#[$fmeta])*
                pub const fn $get(self) -> $int {
                    (self.0 >> $lo) & (<$int>::MAX >> (<$int>::BITS - $width))
                }

                #[doc = concat!("Replaces `", stringify!($get), "`; bits of `value` beyond the field are dropped.")]
                #[must_use]
                pub const fn $with(self, value: $int) -> Self {
                    let mask: $int = <$int>::MAX >> (<$int>::BITS - $width);
                    Self((self.0 & !(mask << $lo)) | ((value & mask) << $lo))
                }
            )*
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_struct(stringify!($name))$( .field(stringify!($get), &self.$get()) )*.finish()
            }
        }
    };
}

pub(crate) use {bits, wire};
