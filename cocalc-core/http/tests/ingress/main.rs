//! A host's and a proxy's ingress on real sockets, with curl, Node.js, raw bytes
//! and WebSockets from outside, and apps that behave and misbehave inside, nginx
//! and Node.js among them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod archives;
mod autobahn;
mod bodies;
mod changes;
mod contents;
mod enemy;
mod faults;
mod files;
mod history;
mod hostile;
mod https;
mod page;
mod probes;
mod retries;
mod sessions;
mod streams;
mod support;
