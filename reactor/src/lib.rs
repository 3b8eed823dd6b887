//! cryptfold-reactor
