//! cryptfold-bdev-split
