//! cryptfold-bdev-uring
