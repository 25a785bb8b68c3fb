//! The contract suite of `cocalc_core::router`.
