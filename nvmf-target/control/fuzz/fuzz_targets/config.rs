//! Any configuration file: parsed or refused, never a panic; a parsed one is checked against the table of methods.
#![no_main]

use std::sync::{Arc, LazyLock};

use cryptfold_control::config::{Config, strip_comments};
use cryptfold_control::{Control, ControlConfig};
use libfuzzer_sys::fuzz_target;

static CONTROL: LazyLock<Arc<Control>> = LazyLock::new(|| Control::new(ControlConfig::default()));

fuzz_target!(|text: &str| {
    if let Ok(plain) = strip_comments(text) {
        assert_eq!(plain.len(), text.len());
        assert_eq!(strip_comments(&plain).as_deref(), Ok(plain.as_str()), "nothing is left to strip");
    }
    if let Ok(config) = Config::parse("fuzz", text)
        && let Err(e) = config.check(&CONTROL)
    {
        assert!(e.to_string().starts_with("fuzz: "));
    }
});
