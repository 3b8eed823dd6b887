//! cryptfold-bdev-sim
