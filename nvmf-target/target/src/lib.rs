//! cryptfold-nvmf-target
