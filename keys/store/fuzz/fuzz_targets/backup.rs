//! Any bytes as a back-up's text, and as what is in its envelope: refused, or understood; no panic, and no more memory or time than
//! the limits allow.
#![no_main]

use cryptfold_keystore::{Limits, Password, import, parse_content};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = parse_content(bytes);
    let limits = Limits { memory_kib: 64, passes: 2, iterations: 16 };
    let password = Password::new("the password".into()).expect("long enough");
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = import(text, &password, &limits);
    }
});
