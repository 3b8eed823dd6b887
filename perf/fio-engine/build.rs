//! Compiles what faces fio, where FIO_SRC names a configured source tree of fio. Without it the library builds and is tested, and
//! fio can not load it.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=FIO_SRC");
    println!("cargo:rerun-if-changed=src/shim.c");
    println!("cargo:rustc-check-cfg=cfg(fio)");
    let Some(source) = std::env::var_os("FIO_SRC").filter(|s| !s.is_empty()).map(PathBuf::from) else {
        return;
    };
    let config = source.join("config-host.h");
    if !source.join("ioengines.h").exists() || !config.exists() {
        let at = source.display();
        println!(
            "cargo:warning=FIO_SRC={at}: no configured source of fio (ioengines.h and config-host.h, which ./configure makes)"
        );
        std::process::exit(1);
    }
    println!("cargo:rerun-if-changed={}", config.display());
    let Some(version) = version(&source) else {
        println!(
            "cargo:warning=FIO_SRC={}: FIO-VERSION-GEN does not say which version this is",
            source.display()
        );
        std::process::exit(1);
    };
    cc::Build::new()
        .define("FIO_VERSION", Some(format!("\"{version}\"").as_str()))
        .file("src/shim.c")
        // Not -isystem: its headers have names such as err.h.
        .flag("-iquote")
        .flag(source.as_os_str())
        .flag(format!("-I{}", source.display()))
        .flag("-include")
        .flag(config.as_os_str())
        .define("_GNU_SOURCE", None)
        .define("BITS_PER_LONG", Some("64"))
        .std("gnu11")
        .warnings(false)
        .compile("cryptfold_fio_shim");
    println!("cargo:rustc-cfg=fio");
}

/// What fio's Makefile makes of FIO-VERSION-GEN in a released source.
fn version(source: &Path) -> Option<String> {
    let text = std::fs::read_to_string(source.join("FIO-VERSION-GEN")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("DEF_VER="))?;
    Some(line.trim().to_owned())
}
