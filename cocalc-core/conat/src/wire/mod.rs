//! The frames on the wire, as pure functions.

pub(crate) mod event;
mod packet;
pub(crate) mod raw;

pub use packet::{Ack, Decoder, Event, Frame, Packet, PacketError, TEXT_BYTES_MAX, ack, event};
pub use raw::PLACEHOLDER;

/// The largest WebSocket message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 8_000_000;
