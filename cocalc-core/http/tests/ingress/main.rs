//! A host's and a proxy's ingress on real sockets, with curl, raw bytes and
//! WebSockets from outside, and apps that behave and misbehave inside.

mod faults;
mod probes;
mod sessions;
mod streams;
mod support;
