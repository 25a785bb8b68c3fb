//! Runs the proxy daemon.

fn main() {}
