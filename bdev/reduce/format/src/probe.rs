//! Recognises what a device carries already, so that creating a pool does not destroy it unasked.
