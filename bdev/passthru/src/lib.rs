//! cryptfold-bdev-passthru
