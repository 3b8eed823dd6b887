//! cryptfold-bdev-error
