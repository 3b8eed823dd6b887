//! cryptfold-perf
