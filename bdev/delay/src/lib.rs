//! cryptfold-bdev-delay
