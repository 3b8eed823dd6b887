//! cryptfold-nvmf-initiator
