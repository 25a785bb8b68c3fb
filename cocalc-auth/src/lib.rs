//! Connect tokens, the ACL cache, sessions, rate limits and the audit chain,
//! as pure cores: no async, no I/O, the time is an argument.

pub mod stream;
