//! cryptfold-bdev-crypto
