//! Any text as a pre-shared key for TLS or as an identity: parsed or refused; a parsed key comes back from its text.
#![no_main]

use cryptfold_nvmf_auth::psk::{Identity, Psk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(psk) = Psk::parse(text) {
        let again = Psk::parse(&psk.to_text()).expect("its own text");
        assert_eq!((again.hash(), &*again.to_text()), (psk.hash(), &*psk.to_text()));
    }
    let _ = Identity::parse(text);
});
