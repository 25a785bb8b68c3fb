//! What users send faster than their processes read.
//!
//! The protocol library grants a channel new credit when data arrives, not
//! when it is consumed, and the amount is one number for the whole connection.
//! Left alone it either stops every channel when one process does not read, or
//! keeps everything in memory. Instead each channel has a queue here, and the
//! number is chosen anew after each grant ([`Credit::next`]), for the packet
//! that comes next, whosever it is:
//!
//! - While no queue is over [`STALLED_BYTES`] it is the full window.
//! - While one is, it is two bytes: whoever sends more than its window runs
//!   out of credit and waits, as the protocol means it to. It goes on sending
//!   two bytes at a time, one packet in a round trip, and after each the
//!   connection reads nothing for a moment (`REST`), so that this costs
//!   nothing to speak of; a queue that is read again ends that moment, so that a
//!   process that paused does not wait for its input. Without those two bytes
//!   it could never be granted anything again.
//! - Just after such a packet its sender is known to have nothing under way for
//!   a round trip. If another, which reads, has come to the end of its credit
//!   in the meantime, two bytes of it are under way already: the next grant is
//!   a turn, and it is the other that takes it. So it goes on beside
//!   the stalled one, by a window in a round trip or two. Clients serve their
//!   channels in an order that stays: with several that stalled, a turn comes after
//!   the one after which the other was seen last.
//! - Should a stalled one be the next nevertheless, because the other had
//!   nothing more to send just then, or because a busy client answered both
//!   grants in one go, its queue grows by that grant. So from then on the client
//!   has longer to answer the one before the other is granted anything; and a turn
//!   is never more than a sixteenth of what the queue may still take.
//! - When a queue is over [`CHANNEL_BYTES_MAX`], the channel is closed, and its user
//!   told why.
//!
//! Memory is bounded by [`CHANNEL_BYTES_MAX`], [`CONNECTION_BYTES_MAX`] and a
//! [`Budget`] of the whole server, also against clients that ignore their
//! credit. Whoever has to give up is never a channel that reads while there is,
//! in its connection or its project, one that does not, and of which more than
//! some kilobytes wait.

mod budget;
mod credit;

pub(crate) use budget::{Budget, Holder, InputReceiver, InputSender, input};
pub(crate) use credit::Credit;

/// The credit of a channel that reads.
pub(crate) const WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// From here a channel does not read.
const STALLED_BYTES: usize = 1024 * 1024;
/// From here downwards it reads again.
const READING_BYTES: usize = 512 * 1024;
/// What one channel's queue may hold.
pub(crate) const CHANNEL_BYTES_MAX: usize = 32 * 1024 * 1024;
/// What all queues of a connection may hold.
pub(crate) const CONNECTION_BYTES_MAX: usize = 64 * 1024 * 1024;
