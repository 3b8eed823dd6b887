//! cryptfold-nvmf-spec
