//! cryptfold-control
