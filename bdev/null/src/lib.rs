//! cryptfold-bdev-null
