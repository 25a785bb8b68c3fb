//! The contract suite of `cocalc_core::runner`.
