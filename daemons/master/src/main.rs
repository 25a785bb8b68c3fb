//! Runs the master daemon.

fn main() {}
