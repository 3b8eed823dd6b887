//! cryptfold-reduce
