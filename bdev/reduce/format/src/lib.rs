//! cryptfold-reduce-format
