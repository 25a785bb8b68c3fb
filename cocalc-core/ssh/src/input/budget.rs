//! The queues of a server's channels, and what they may hold together.

use std::{
    cmp::Reverse,
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cocalc_core::ids::ProjectId;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{CHANNEL_BYTES_MAX, READING_BYTES, STALLED_BYTES};

/// What an entry of a queue costs besides its bytes.
const ENTRY_BYTES: usize = 64;
/// Who has taken nothing of its queue for so long counts as one that does not
/// read. More than 11 KB/s take a packet of 32 KiB sooner.
const PATIENCE: Duration = Duration::from_secs(3);
/// What waits in less than this is not worth a channel: somebody has typed ahead.
const WORTH_BYTES: usize = 64 * 1024;
/// Who has taken more than this has shown that it reads. A pipe to a process
/// that does not read takes a quarter of it; streams of forwarded ports may take
/// more.
const PROBATION_BYTES: usize = 1024 * 1024;
/// How often it is looked for who does not read, above three quarters.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What all queues of a server may hold together, and the queues.
///
/// When they hold too much, channels are given up: their queues are emptied on
/// the spot, so that one need never costs two of them. What is just being written
/// to a process whose channel goes is not counted any more, and gone a moment
/// later.
///
/// - It is always the holder with most that gives up, so that nobody loses
///   anything to what another keeps.
/// - Of its queues, the one goes from which nothing was taken for longest, if its
///   process had [`PATIENCE`] to read.
/// - Above three quarters of the budget nobody else has to go. The last quarter
///   takes up bursts meanwhile; when it is used up too, nobody can be waited for:
///   then it is one that stalled and has not shown yet that it reads, next one that
///   stalled and reads, but slowly, and at last the largest.
#[derive(Debug)]
pub(crate) struct Budget {
    max: usize,
    shares: Mutex<Shares>,
}

/// Whose queues count together.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Holder {
    /// All who use a project.
    Project(ProjectId),
    /// All who pass to projects of which nothing is known here, by their network.
    Passage(Option<IpAddr>),
}

#[derive(Debug, Default)]
struct Shares {
    used: usize,
    /// The number of the last queue.
    last: u64,
    /// When it was looked last for who does not read.
    looked: Option<Instant>,
    holders: HashMap<Holder, Share>,
}

#[derive(Debug, Default)]
struct Share {
    used: usize,
    queues: HashMap<u64, Queue>,
}

#[derive(Debug)]
struct Queue {
    pieces: VecDeque<Bytes>,
    /// With the piece that was taken last, which is being written.
    bytes: usize,
    /// When something was taken last, or there was something to take for the
    /// first time since; `None` until its process is there to take it.
    taken_at: Option<Instant>,
    stalled: bool,
    /// The bytes of all pieces that were taken.
    taken: usize,
    /// Nothing more comes.
    ended: bool,
    given_up: bool,
    overflow: CancellationToken,
    ends: Arc<Ends>,
}

/// What both ends of a queue see without the lock.
#[derive(Debug)]
struct Ends {
    bytes: AtomicUsize,
    ready: Notify,
    reads_again: Arc<Notify>,
}

/// How a process reads; the first of these goes first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Reads {
    /// It had its time, and has not read.
    Not,
    /// It has fallen behind, and not shown yet that it reads.
    Unknown,
    /// It has fallen behind, but reads.
    Slowly,
    /// There is little that it has not read.
    Well,
}

/// In which order queues are given up, the least first: how their processes read;
/// of those that do well how much they hold, the largest first; and how long they
/// were left alone, the longest first, who has not begun last.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Order(Reads, Reverse<usize>, bool, Option<Instant>);

impl Queue {
    fn order(&self, now: Instant) -> Order {
        let reads = self.reads(now);
        let bytes = if reads == Reads::Well { self.bytes } else { 0 };
        Order(reads, Reverse(bytes), self.taken_at.is_none(), self.taken_at)
    }

    fn reads(&self, now: Instant) -> Reads {
        let alone = self.taken_at.is_some_and(|at| now.saturating_duration_since(at) >= PATIENCE);
        match self.stalled {
            _ if alone && self.bytes >= WORTH_BYTES => Reads::Not,
            true if self.taken <= PROBATION_BYTES => Reads::Unknown,
            true => Reads::Slowly,
            false => Reads::Well,
        }
    }
}

impl Budget {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, shares: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what has to go at `now`; what was in those queues is dropped
    /// where nobody waits for the lock.
    fn relieve(&self, shares: &mut Shares, now: Instant) -> Vec<VecDeque<Bytes>> {
        let mut freed = Vec::new();
        while shares.used > self.max - self.max / 4 {
            let urgent = shares.used > self.max;
            // Looking takes time, which everybody waits for.
            let early = |at| now.saturating_duration_since(at) < LOOK_AGAIN;
            if !urgent && freed.is_empty() && shares.looked.is_some_and(early) {
                break;
            }
            shares.looked = Some(now);
            let Some((holder, number)) = shares.victim(urgent, now) else { break };
            freed.push(shares.give_up(holder, number));
        }
        freed
    }
}

impl Shares {
    /// Whose queue goes next. Without `urgent`, only one that had its time.
    fn victim(&self, urgent: bool, now: Instant) -> Option<(Holder, u64)> {
        let holders = self.holders.iter().filter(|(_, share)| share.used > 0);
        let (holder, share) = holders.max_by_key(|(_, share)| share.used)?;
        let queues = share.queues.iter().filter(|(_, queue)| queue.bytes > 0);
        let (number, queue) = queues.min_by_key(|(_, queue)| queue.order(now))?;
        (urgent || queue.reads(now) == Reads::Not).then_some((*holder, *number))
    }

    /// Empties a queue, and closes its channel.
    fn give_up(&mut self, holder: Holder, number: u64) -> VecDeque<Bytes> {
        let Some(queue) = self.queue(holder, number) else { return VecDeque::new() };
        let (pieces, bytes) = (std::mem::take(&mut queue.pieces), queue.bytes);
        queue.given_up = true;
        queue.overflow.cancel();
        self.settle(holder, number, bytes);
        pieces
    }

    /// Counts `freed` bytes less.
    fn settle(&mut self, holder: Holder, number: u64, freed: usize) {
        let Some(share) = self.holders.get_mut(&holder) else { return };
        let Some(queue) = share.queues.get_mut(&number) else { return };
        queue.bytes -= freed;
        queue.ends.bytes.store(queue.bytes, Ordering::Release);
        share.used -= freed;
        self.used -= freed;
        if queue.bytes < READING_BYTES && std::mem::take(&mut queue.stalled) {
            queue.ends.reads_again.notify_one();
        }
    }

    fn queue(&mut self, holder: Holder, number: u64) -> Option<&mut Queue> {
        self.holders.get_mut(&holder)?.queues.get_mut(&number)
    }
}

fn cost(piece: &Bytes) -> usize {
    piece.len() + ENTRY_BYTES
}

/// One queue of a budget.
#[derive(Clone, Debug)]
struct Place {
    budget: Arc<Budget>,
    holder: Holder,
    number: u64,
    ends: Arc<Ends>,
}

/// The end into which the connection puts what arrives.
#[derive(Debug)]
pub(crate) struct InputSender {
    place: Place,
}

/// The end from which a process is fed.
#[derive(Debug)]
pub(crate) struct InputReceiver {
    place: Place,
    /// What the piece costs that was handed out last.
    taken: usize,
}

/// Makes the queue of one channel of `holder`, which `overflow` closes, and
/// which tells `reads_again` when it had stalled and does not any more. Its size
/// is counted in bytes, not entries.
pub(crate) fn input(
    budget: &Arc<Budget>,
    holder: Holder,
    overflow: &CancellationToken,
    reads_again: &Arc<Notify>,
) -> (InputSender, InputReceiver) {
    let reads_again = Arc::clone(reads_again);
    let ends = Arc::new(Ends { bytes: AtomicUsize::new(0), ready: Notify::new(), reads_again });
    let queue = Queue {
        pieces: VecDeque::new(),
        bytes: 0,
        taken_at: None,
        stalled: false,
        taken: 0,
        ended: false,
        given_up: false,
        overflow: overflow.clone(),
        ends: ends.clone(),
    };
    let mut shares = budget.lock();
    shares.last += 1;
    let number = shares.last;
    shares.holders.entry(holder).or_default().queues.insert(number, queue);
    drop(shares);
    let place = Place { budget: budget.clone(), holder, number, ends };
    (InputSender { place: place.clone() }, InputReceiver { place, taken: 0 })
}

impl InputSender {
    /// Adds `data`; `false` if the queue cannot take it, and is given up.
    pub(crate) fn push(&self, data: &[u8]) -> bool {
        self.push_at(Bytes::copy_from_slice(data), Instant::now())
    }

    fn push_at(&self, piece: Bytes, now: Instant) -> bool {
        let Place { budget, holder, number, ends } = &self.place;
        let mut guard = budget.lock();
        let shares = &mut *guard;
        // Without a receiver the process reads no more, which is its right.
        let Some(share) = shares.holders.get_mut(holder) else { return true };
        let Some(queue) = share.queues.get_mut(number) else { return true };
        if queue.given_up {
            return true;
        }
        let cost = cost(&piece);
        if queue.bytes == 0 {
            queue.taken_at = queue.taken_at.map(|_| now);
        }
        queue.pieces.push_back(piece);
        queue.bytes += cost;
        queue.stalled |= queue.bytes > STALLED_BYTES;
        ends.bytes.store(queue.bytes, Ordering::Release);
        let full = queue.bytes > CHANNEL_BYTES_MAX;
        share.used += cost;
        shares.used += cost;
        let mut freed = Vec::new();
        if full {
            freed.push(shares.give_up(*holder, *number));
        }
        freed.append(&mut budget.relieve(shares, now));
        let fits = shares.queue(*holder, *number).is_none_or(|queue| !queue.given_up);
        drop(guard);
        ends.ready.notify_one();
        fits
    }

    pub(crate) fn queued(&self) -> usize {
        self.place.ends.bytes.load(Ordering::Acquire)
    }

    /// When it would be given up, compared with others; `None` if nothing waits.
    pub(crate) fn order(&self, now: Instant) -> Option<Order> {
        let mut shares = self.place.budget.lock();
        let queue = shares.queue(self.place.holder, self.place.number)?;
        (queue.bytes > 0).then(|| queue.order(now))
    }
}

impl Drop for InputSender {
    /// Ends the input; but if the channel was given up, by whomever, what came
    /// is a part, whose end nobody may take for its end.
    fn drop(&mut self) {
        let Place { budget, holder, number, ends } = &self.place;
        let mut shares = budget.lock();
        let given_up = shares.queue(*holder, *number).is_some_and(|queue| {
            queue.ended = true;
            queue.overflow.is_cancelled() && !queue.given_up
        });
        let freed = given_up.then(|| shares.give_up(*holder, *number));
        drop(shares);
        drop(freed);
        ends.ready.notify_one();
    }
}

enum Next {
    Piece(Bytes),
    Ended,
    Wait,
    /// Nothing comes any more, and that is not its end.
    Never,
}

impl InputReceiver {
    /// The next piece, once the previous one has been consumed; `None` after
    /// the last; never anything if the queue was given up, so that no process
    /// takes that for the end of its input. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.take_at(Instant::now()) {
                Next::Piece(piece) => return Some(piece),
                Next::Ended => return None,
                Next::Wait => self.place.ends.ready.notified().await,
                Next::Never => std::future::pending().await,
            }
        }
    }

    fn take_at(&mut self, now: Instant) -> Next {
        let Place { budget, holder, number, .. } = &self.place;
        let mut shares = budget.lock();
        let taken = std::mem::take(&mut self.taken);
        let Some(queue) = shares.queue(*holder, *number) else { return Next::Ended };
        if queue.given_up {
            return Next::Never;
        }
        queue.taken_at = Some(now);
        let next = match queue.pieces.pop_front() {
            Some(piece) => {
                queue.taken = queue.taken.saturating_add(piece.len());
                self.taken = cost(&piece);
                Next::Piece(piece)
            }
            None if queue.ended => Next::Ended,
            None => Next::Wait,
        };
        // The places of many small pieces are memory, too.
        if queue.pieces.len() < queue.pieces.capacity() / 4 {
            queue.pieces.shrink_to(queue.pieces.len() * 2);
        }
        shares.settle(*holder, *number, taken);
        next
    }
}

impl Drop for InputReceiver {
    /// Forgets what nobody will take any more.
    fn drop(&mut self) {
        let Place { budget, holder, number, .. } = &self.place;
        let mut shares = budget.lock();
        let bytes = shares.queue(*holder, *number).map_or(0, |queue| queue.bytes);
        shares.settle(*holder, *number, bytes);
        let Some(share) = shares.holders.get_mut(holder) else { return };
        let queue = share.queues.remove(number);
        if share.queues.is_empty() {
            shares.holders.remove(holder);
        }
        drop(shares);
        drop(queue);
    }
}

#[cfg(test)]
mod tests;
