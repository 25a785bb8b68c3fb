//! The `cocalc` command line.

fn main() {}
