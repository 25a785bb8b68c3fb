//! What users send faster than their processes read.
//!
//! The protocol library grants a channel new credit when data arrives, not
//! when it is consumed, and the amount is one number for the whole connection.
//! Left alone it either stops every channel when one process does not read, or
//! keeps everything in memory. Instead each channel has a queue here, and the
//! number is chosen anew after each grant ([`Credit::next`]):
//!
//! - While no queue is over [`STALLED_BYTES`] it is the full window.
//! - While one is, it is two bytes: whoever sends more than its window runs
//!   out of credit and waits, as the protocol means it to. It goes on sending
//!   two bytes at a time, and after each the connection reads nothing for a
//!   moment ([`REST`]), so that this costs nothing to speak of. Typing goes on
//!   undisturbed: nobody types a window full.
//! - If that has held up another channel for [`PATIENCE`], the other gets
//!   grants of moderate size. If the stalled channel's two bytes come first,
//!   they take that grant, and its queue grows by it. When it is over
//!   [`CHANNEL_BYTES_MAX`], the channel is closed, and its user told why.
//!
//! So a stalled channel is stopped at its source; one that stalls for long
//! beside others that need the connection is given up. Memory is bounded by
//! [`CHANNEL_BYTES_MAX`] and [`CONNECTION_BYTES_MAX`], also against clients
//! that ignore their credit.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc;

/// The credit of a channel that reads.
pub(crate) const WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// The least that can be granted and still be granted again.
const TRICKLE_BYTES: u32 = 2;
/// The credit of a channel that was held up for long enough.
const TURN_BYTES: u32 = 256 * 1024;
/// How long a channel that does not read may hold up another.
const PATIENCE: Duration = Duration::from_secs(10);
/// From here a channel does not read.
const STALLED_BYTES: usize = 1024 * 1024;
/// From here downwards it reads again.
const READING_BYTES: usize = 512 * 1024;
/// How long nothing is read after a trickle. Nobody notices it while typing.
pub(crate) const REST: Duration = Duration::from_millis(20);
/// What one channel's queue may hold.
pub(crate) const CHANNEL_BYTES_MAX: usize = 32 * 1024 * 1024;
/// What all queues of a connection may hold.
pub(crate) const CONNECTION_BYTES_MAX: usize = 128 * 1024 * 1024;
/// What an entry of a queue costs besides its bytes.
const ENTRY_BYTES: usize = 64;

/// How full a queue is, seen from both ends.
#[derive(Debug, Default)]
pub(crate) struct Level {
    bytes: AtomicUsize,
    closed: AtomicBool,
}

/// The end into which the connection puts what arrives.
#[derive(Debug)]
pub(crate) struct InputSender {
    queue: mpsc::UnboundedSender<Bytes>,
    level: Arc<Level>,
}

/// The end from which a process is fed.
#[derive(Debug)]
pub(crate) struct InputReceiver {
    queue: mpsc::UnboundedReceiver<Bytes>,
    level: Arc<Level>,
    taken: usize,
}

/// Makes the queue of one channel. Its size is counted in bytes, not entries.
pub(crate) fn input() -> (InputSender, InputReceiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let level = Arc::new(Level::default());
    (InputSender { queue: sender, level: level.clone() }, InputReceiver { queue: receiver, level, taken: 0 })
}

impl InputSender {
    /// Adds `data`; `false` if the queue cannot take it.
    pub(crate) fn push(&self, data: &[u8]) -> bool {
        let cost = data.len() + ENTRY_BYTES;
        if self.level.closed.load(Ordering::Acquire) {
            // The process reads no more, which is its right.
            return true;
        }
        if self.level.bytes.fetch_add(cost, Ordering::AcqRel) + cost > CHANNEL_BYTES_MAX {
            return false;
        }
        // A receiver that closes just now forgets the level with the queue.
        let _ = self.queue.send(Bytes::copy_from_slice(data));
        true
    }

    pub(crate) fn queued(&self) -> usize {
        if self.level.closed.load(Ordering::Acquire) { 0 } else { self.level.bytes.load(Ordering::Acquire) }
    }
}

impl InputReceiver {
    /// The next piece, once the previous one has been consumed; `None` after
    /// the last. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.level.bytes.fetch_sub(std::mem::take(&mut self.taken), Ordering::AcqRel);
        let data = self.queue.recv().await?;
        self.taken = data.len() + ENTRY_BYTES;
        Some(data)
    }
}

impl Drop for InputReceiver {
    fn drop(&mut self) {
        self.level.closed.store(true, Ordering::Release);
    }
}

/// Chooses the credit of the next grant.
#[derive(Debug, Default)]
pub(crate) struct Credit {
    stalled: BTreeSet<u32>,
    held_up: Option<Instant>,
}

impl Credit {
    /// Notes how much `channel` has queued.
    pub(crate) fn note(&mut self, channel: u32, queued: usize) {
        if queued > STALLED_BYTES {
            self.stalled.insert(channel);
        } else if queued < READING_BYTES {
            self.stalled.remove(&channel);
        }
        if self.stalled.is_empty() {
            self.held_up = None;
        }
    }

    /// Whether `channel` did not read when last looked at.
    pub(crate) fn is_stalled(&self, channel: u32) -> bool {
        self.stalled.contains(&channel)
    }

    /// The channels that did not read when last looked at.
    pub(crate) fn stalled(&self) -> Vec<u32> {
        self.stalled.iter().copied().collect()
    }

    /// The credit of the next grant, now that `channel` was granted `current`.
    pub(crate) fn next(&mut self, channel: u32, current: u32, now: Instant) -> u32 {
        if self.stalled.is_empty() {
            return WINDOW_BYTES;
        }
        if self.stalled.contains(&channel) || current != TRICKLE_BYTES {
            return TRICKLE_BYTES;
        }
        let since = *self.held_up.get_or_insert(now);
        if now.saturating_duration_since(since) < PATIENCE { TRICKLE_BYTES } else { TURN_BYTES }
    }

    /// Whether reading should rest after data for which `current` was granted.
    pub(crate) fn rests(&self, current: u32) -> bool {
        current == TRICKLE_BYTES && !self.stalled.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The library's rule, as far as it matters here.
    struct Library {
        target: u32,
        windows: [u32; 2],
    }

    impl Library {
        /// Data of `length` arrives; whether a grant was made.
        fn data(&mut self, channel: usize, length: u32) -> bool {
            let window = &mut self.windows[channel];
            assert!(length <= *window, "the client sent more than its credit");
            *window -= length;
            let grants = *window < self.target / 2;
            if grants {
                *window = self.target;
            }
            grants
        }
    }

    #[test]
    fn a_stalled_channel_waits_and_is_given_up_only_when_it_holds_up_another() {
        let mut library = Library { target: WINDOW_BYTES, windows: [WINDOW_BYTES; 2] };
        let mut credit = Credit::default();
        let start = Instant::now();
        let mut now = start;
        let (mut queued, mut passed, mut settled) = (0_usize, 0_usize, None);
        // Both clients send all they may; channel 0 is never read.
        for turn in 0..100_000 {
            let channel = turn % 2;
            let length = library.windows[channel].min(32 * 1024);
            assert!(length > 0, "a channel without credit never gets any again");
            if channel == 0 {
                queued += length as usize + ENTRY_BYTES;
            } else {
                passed += length as usize;
            }
            let granted = library.target;
            let grants = library.data(channel, length);
            credit.note(0, queued);
            credit.note(1, 0);
            if grants {
                if credit.rests(granted) {
                    now += REST;
                }
                library.target = credit.next(channel as u32, granted, now);
            }
            if now < start + PATIENCE {
                settled = Some(queued);
            }
            if queued > CHANNEL_BYTES_MAX {
                break;
            }
        }
        // While there was patience, it got no more than it had credit for.
        assert!(settled.unwrap() < STALLED_BYTES + 2 * WINDOW_BYTES as usize, "{settled:?}");
        assert!(passed > CHANNEL_BYTES_MAX / 2, "the other passed only {passed}");
        // Once it reads, everybody has the full window again.
        credit.note(0, 0);
        assert_eq!(credit.next(0, TRICKLE_BYTES, now), WINDOW_BYTES);
        assert!(!credit.rests(TRICKLE_BYTES));
    }

    #[tokio::test]
    async fn a_queue_knows_its_level_and_its_end() {
        let (sender, mut receiver) = input();
        assert!(sender.push(&[0; 1000]));
        assert_eq!(sender.queued(), 1000 + ENTRY_BYTES);
        assert_eq!(receiver.next().await.unwrap().len(), 1000);
        assert_eq!(sender.queued(), 1000 + ENTRY_BYTES, "what is being written is still held");
        assert!(sender.push(b"x"));
        receiver.next().await.unwrap();
        assert_eq!(sender.queued(), 1 + ENTRY_BYTES);
        let big = vec![0; 1024 * 1024];
        let taken = (0..100).take_while(|_| sender.push(&big)).count();
        assert!(taken < 33, "{taken} MiB were queued");
        drop(receiver);
        assert!(sender.push(&big), "what nobody wants is dropped, not an error");
        assert_eq!(sender.queued(), 0);
    }
}
