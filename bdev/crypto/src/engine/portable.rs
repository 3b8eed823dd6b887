//! The portable engine: the `aes` crate's block cipher (AES instructions where the processor has them) in the
//! `xts-mode` crate's mode. The reference for the other engines, and the only one with AES-128-XTS.

use aes::cipher::generic_array::GenericArray;
use aes::cipher::{BlockCipher, BlockDecrypt, BlockEncrypt, KeyInit};
use aes::{Aes128, Aes256};
use xts_mode::Xts128;

use super::{XtsCipher, XtsEngine, XtsKey, check_unit};

// Boxed: key schedules are large, and an enum of both would be moved around.
enum Cipher {
    Aes128(Box<Xts128<Aes128>>),
    Aes256(Box<Xts128<Aes256>>),
}

/// A key set up on the portable engine. The key schedules wipe themselves on drop.
pub struct Portable(Cipher);

fn mode<C>(key: &XtsKey) -> Box<Xts128<C>>
where
    C: KeyInit + BlockCipher + BlockEncrypt + BlockDecrypt,
{
    // XtsKey has checked the length, so the halves have the length that C takes.
    let (data, tweak) = key.bytes().split_at(key.bytes().len() / 2);
    Box::new(Xts128::new(C::new(GenericArray::from_slice(data)), C::new(GenericArray::from_slice(tweak))))
}

impl Portable {
    /// Sets up `key`.
    pub fn new(key: &XtsKey) -> Portable {
        Portable(match key.cipher() {
            XtsCipher::Aes128 => Cipher::Aes128(mode(key)),
            XtsCipher::Aes256 => Cipher::Aes256(mode(key)),
        })
    }
}

impl XtsEngine for Portable {
    fn encrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]) {
        // xts-mode works in place only.
        dst.copy_from_slice(src);
        self.encrypt_in_place(tweak, dst);
    }

    fn decrypt(&self, tweak: u128, src: &[u8], dst: &mut [u8]) {
        dst.copy_from_slice(src);
        self.decrypt_in_place(tweak, dst);
    }

    fn encrypt_in_place(&self, tweak: u128, unit: &mut [u8]) {
        check_unit(unit.len());
        match &self.0 {
            Cipher::Aes128(x) => x.encrypt_sector(unit, tweak.to_le_bytes()),
            Cipher::Aes256(x) => x.encrypt_sector(unit, tweak.to_le_bytes()),
        }
    }

    fn decrypt_in_place(&self, tweak: u128, unit: &mut [u8]) {
        check_unit(unit.len());
        match &self.0 {
            Cipher::Aes128(x) => x.decrypt_sector(unit, tweak.to_le_bytes()),
            Cipher::Aes256(x) => x.decrypt_sector(unit, tweak.to_le_bytes()),
        }
    }
}
