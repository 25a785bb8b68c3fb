//! The control plane: the bus to hosts and proxies.

pub(crate) mod announce;
pub(crate) mod gate;
pub(crate) mod peers;
pub(crate) mod serve;
pub(crate) mod streams;
