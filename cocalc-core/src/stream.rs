//! Byte streams, as they pass between traits.

use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

/// A source of bytes. A failure of whatever produces them is an error of the
/// last read, never a silent end.
pub type BoxRead = Pin<Box<dyn AsyncRead + Send>>;

/// A sink of bytes. `shutdown` says that no more will come.
pub type BoxWrite = Pin<Box<dyn AsyncWrite + Send>>;

/// Both directions of a connection; shutting down the write half leaves the
/// read half open.
pub trait ByteStream: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> ByteStream for T {}

/// A connection of any kind.
pub type BoxStream = Pin<Box<dyn ByteStream>>;
