//! Runs the host daemon.

fn main() {}
