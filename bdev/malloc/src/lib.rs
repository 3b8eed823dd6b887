//! cryptfold-bdev-malloc
