//! A runner of nothing.
