//! cryptfold-tests
