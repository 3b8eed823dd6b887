//! Passwords, slots and back-ups.

use cryptfold_keystore::{
    Backup, Cost, ExportError, Limits, NewSlot, Password, PasswordError, StoreError, add_password,
    change_password, derive, export, import, remove, unlock,
};
use cryptfold_reduce_format::keys::{Kek, PoolKey, Secret};
use cryptfold_reduce_format::slots::{Kdf, KeyBlock, KeySlot, SlotKind};
use proptest::prelude::*;
use uuid::Uuid;

/// Cheap: the tests are about what is right, not about what is slow.
const CHEAP: Cost = Cost::Argon2id { memory_kib: 64, passes: 1, lanes: 2 };
const CHEAP_PBKDF2: Cost = Cost::Pbkdf2 { iterations: 1000 };

fn password(text: &str) -> Password {
    Password::new(text.into()).unwrap()
}

fn new(cost: Cost, salt: u8) -> NewSlot<'static> {
    NewSlot { cost, salt: [salt; 32], created_ms: 1_700_000_000_000, label: "" }
}

fn key() -> PoolKey {
    PoolKey(Secret::take(&mut std::array::from_fn(|i| i as u8 * 7)))
}

/// A pool with a key file's slot.
fn block() -> KeyBlock {
    let kek = Kek(Secret::take(&mut std::array::from_fn(|i| i as u8 + 1)));
    let file = KeySlot::seal(SlotKind::KeyFile, Kdf::None, &kek, &key(), 1).unwrap();
    let mut slots = [const { None }; 12];
    slots[0] = Some(file);
    KeyBlock { pool: Uuid::from_u128(77), generation: 1, slots, erasure: [Some([9; 40]), None] }
}

fn limits() -> Limits {
    Limits::default()
}

/// Figures of OpenSSL's implementations (Python's `cryptography` and `hashlib`).
#[test]
fn derivations_are_the_standard_ones() {
    let salt: [u8; 32] = std::array::from_fn(|i| i as u8);
    let id = |kdf| derive(&password("correct horse"), &kdf, &limits()).unwrap().0.expose().to_vec();
    let pbkdf2 = id(Kdf::Pbkdf2 { iterations: 1000, salt });
    assert_eq!(hex(&pbkdf2), "67d13ea64761843ed78a407d66d0af0ddb745f3071ee473708fc89250a64d26e");
    let argon = id(Kdf::Argon2id { memory_kib: 256, passes: 2, lanes: 2, salt });
    assert_eq!(hex(&argon), "74d8f7cfde94a937eec2653a415b964ff95bfa8fcffbd8d815e8ee6b09ebd9e9");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn passwords_have_eight_characters_at_least_and_do_not_show() {
    assert_eq!(Password::new("1234567".into()).unwrap_err(), PasswordError::Short { chars: 7 });
    assert_eq!(
        Password::new("äöüäöüä".into()).unwrap_err(),
        PasswordError::Short { chars: 7 },
        "characters, not bytes"
    );
    assert_eq!(Password::new("x".repeat(1025)).unwrap_err(), PasswordError::Long { bytes: 1025 });
    assert_eq!(format!("{:?}", password("12345678")), "Password(..)");
}

#[test]
fn several_passwords_open_one_pool() {
    let mut b = block();
    assert_eq!(unlock(&b, &password("none of them"), &limits()).unwrap_err(), StoreError::NoPasswordSlot);
    assert_eq!(add_password(&mut b, &key(), &password("first password"), &new(CHEAP, 1), &limits()), Ok(1));
    assert_eq!(
        add_password(&mut b, &key(), &password("second password"), &new(CHEAP_PBKDF2, 2), &limits()),
        Ok(2)
    );
    assert_eq!(b.generation, 3);
    assert!(unlock(&b, &password("first password"), &limits()) == Ok((1, key())));
    assert!(unlock(&b, &password("second password"), &limits()) == Ok((2, key())));
    assert_eq!(unlock(&b, &password("third password"), &limits()).unwrap_err(), StoreError::WrongPassword);
    // The parameters are recorded, and survive the trip to the device.
    let slot = b.slots[1].as_ref().unwrap();
    assert_eq!(slot.kdf, Kdf::Argon2id { memory_kib: 64, passes: 1, lanes: 2, salt: [1; 32] });
    assert_eq!(KeySlot::decode(&slot.encode().unwrap()).unwrap().as_ref(), Some(slot));
    for i in 3..12 {
        add_password(&mut b, &key(), &password("one of many"), &new(CHEAP, i), &limits()).unwrap();
    }
    let full = add_password(&mut b, &key(), &password("one too many"), &new(CHEAP, 99), &limits());
    assert_eq!(full.unwrap_err(), StoreError::Full(12));
}

#[test]
fn changing_a_password_keeps_the_key_and_ends_the_old_password() {
    let mut b = block();
    let labelled = NewSlot { label: "operator", ..new(CHEAP, 1) };
    add_password(&mut b, &key(), &password("old password"), &labelled, &limits()).unwrap();
    let before = b.clone();
    let wrong = change_password(
        &mut b,
        (&password("no password"), &limits()),
        &password("new password"),
        &new(CHEAP, 2),
        &limits(),
    );
    assert_eq!(wrong.unwrap_err(), StoreError::WrongPassword);
    let long = "l".repeat(60);
    let unstorable = NewSlot { label: &long, ..new(CHEAP, 2) };
    assert!(
        change_password(
            &mut b,
            (&password("old password"), &limits()),
            &password("new password"),
            &unstorable,
            &limits()
        )
        .is_err()
    );
    assert_eq!(b, before, "nothing changes when it fails");
    let changed = change_password(
        &mut b,
        (&password("old password"), &limits()),
        &password("new password"),
        &new(CHEAP, 2),
        &limits(),
    );
    assert_eq!(changed, Ok(1));
    assert_eq!(b.slots[1].as_ref().unwrap().label, "operator");
    assert!(unlock(&b, &password("new password"), &limits()) == Ok((1, key())));
    assert_eq!(unlock(&b, &password("old password"), &limits()).unwrap_err(), StoreError::WrongPassword);
    assert_eq!(b.slots[0], before.slots[0], "other slots stay");
}

#[test]
fn the_last_slot_stays() {
    let mut b = block();
    assert_eq!(remove(&mut b, 0), Err(StoreError::Last(0)));
    add_password(&mut b, &key(), &password("the password"), &new(CHEAP, 1), &limits()).unwrap();
    assert_eq!(remove(&mut b, 5), Err(StoreError::Empty(5)));
    assert_eq!(remove(&mut b, 12), Err(StoreError::Empty(12)));
    remove(&mut b, 0).unwrap();
    assert_eq!(remove(&mut b, 1), Err(StoreError::Last(1)));
}

#[test]
fn slots_that_ask_for_too_much_are_not_tried_and_hide_no_other() {
    let tight = Limits { memory_kib: 64, passes: 1, iterations: 1000, approved: false };
    let mut b = block();
    let dear = Cost::Argon2id { memory_kib: 128, passes: 1, lanes: 1 };
    add_password(&mut b, &key(), &password("dear password"), &new(dear, 1), &limits()).unwrap();
    let e = unlock(&b, &password("dear password"), &tight).unwrap_err();
    assert_eq!(e, PasswordError::Memory { asked: 128, limit: 64 }.into());
    add_password(&mut b, &key(), &password("cheap password"), &new(CHEAP, 2), &limits()).unwrap();
    assert!(unlock(&b, &password("cheap password"), &tight) == Ok((2, key())));
    let p = password("any password");
    let asks = |kdf| derive(&p, &kdf, &tight).unwrap_err();
    assert!(matches!(
        asks(Kdf::Pbkdf2 { iterations: 1001, salt: [0; 32] }),
        PasswordError::Time { asked: 1001, .. }
    ));
    let passes = Kdf::Argon2id { memory_kib: 64, passes: 2, lanes: 1, salt: [0; 32] };
    assert!(matches!(asks(passes), PasswordError::Time { asked: 2, .. }));
    assert_eq!(asks(Kdf::None), PasswordError::Parameters);
    let lanes = Kdf::Argon2id { memory_kib: 8, passes: 1, lanes: 2, salt: [0; 32] };
    assert_eq!(asks(lanes), PasswordError::Parameters);
}

#[test]
fn a_fips_mode_takes_pbkdf2_and_long_passwords_only() {
    let strict = Limits { approved: true, ..limits() };
    let mut b = block();
    add_password(&mut b, &key(), &password("a good password"), &new(CHEAP, 1), &limits()).unwrap();
    let refused = unlock(&b, &password("a good password"), &strict).unwrap_err();
    assert_eq!(refused, PasswordError::NotApproved.into());
    let mut way_out = b.clone();
    let old = password("a good password");
    let same = change_password(&mut way_out, (&old, &strict), &old, &new(CHEAP_PBKDF2, 2), &strict);
    assert_eq!(same, Err(PasswordError::NotApproved.into()));
    let changed = change_password(&mut way_out, (&old, &limits()), &old, &new(CHEAP_PBKDF2, 2), &strict);
    assert!(changed == Ok(1) && unlock(&way_out, &old, &strict) == Ok((1, key())), "{changed:?}");
    let short = add_password(&mut b, &key(), &password("only 13 bytes"), &new(CHEAP_PBKDF2, 1), &strict);
    assert_eq!(short, Err(PasswordError::ShortApproved { bytes: 13 }.into()));
    add_password(&mut b, &key(), &password("now 14 bytes ."), &new(CHEAP_PBKDF2, 1), &strict).unwrap();
    assert!(
        unlock(&b, &password("now 14 bytes ."), &strict) == Ok((2, key())),
        "the other slot hides nothing"
    );
}

#[test]
fn a_back_up_brings_the_slots_back() {
    let mut b = block();
    add_password(&mut b, &key(), &password("the password"), &new(CHEAP, 1), &limits()).unwrap();
    let saved = Backup { keys: b.clone(), superblock: Box::new([3; 4096]) };
    for cost in [CHEAP, CHEAP_PBKDF2] {
        let text = export(&saved, &password("of the back-up"), cost, [9; 32], 5).unwrap();
        let back = import(&text, &password("of the back-up"), &limits()).unwrap();
        assert_eq!(back, saved);
        assert!(unlock(&back.keys, &password("the password"), &limits()) == Ok((1, key())));
        assert_eq!(
            import(&text, &password("the password"), &limits()).unwrap_err(),
            ExportError::DoesNotOpen
        );
        // Nothing of a slot is in the open.
        let wrapped = hex(&b.slots[1].as_ref().unwrap().wrapped);
        assert!(!hex(text.as_bytes()).contains(&wrapped));
        let damaged = text.replacen("\"slots\": \"", "\"slots\": \"AAAA", 1);
        assert!(import(&damaged, &password("of the back-up"), &limits()).is_err());
    }
    for (text, words) in
        [("", "no JSON"), ("{}", "format"), ("{\"format\": \"cryptfold key slots 2\"}", "kdf")]
    {
        let e = import(text, &password("of the back-up"), &limits()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
}

proptest! {
    #[test]
    fn any_damage_to_a_back_up_is_found(at in any::<u16>(), byte in b' '..b'~') {
        let b = Backup { keys: block(), superblock: Box::new([3; 4096]) };
        let text = export(&b, &password("of the back-up"), CHEAP_PBKDF2, [9; 32], 5).unwrap();
        let mut bytes = text.into_bytes();
        let at = usize::from(at) % bytes.len();
        bytes[at] = byte;
        let text = String::from_utf8(bytes).unwrap();
        // A back-up that opens is the one that was made; its date and the UUID in the open are for people.
        if let Ok(back) = import(&text, &password("of the back-up"), &Limits { iterations: 2000, ..limits() }) {
            prop_assert_eq!(back, b);
        }
    }
}
