//! cryptfold
