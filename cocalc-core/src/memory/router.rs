//! A router that is told.
