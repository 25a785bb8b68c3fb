//! A host's and a proxy's ingress on real sockets, with curl, raw bytes and
//! WebSockets from outside, and apps that behave and misbehave inside.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod archives;
mod changes;
mod contents;
mod faults;
mod files;
mod history;
mod https;
mod page;
mod probes;
mod sessions;
mod streams;
mod support;
