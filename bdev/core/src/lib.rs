//! cryptfold-bdev
