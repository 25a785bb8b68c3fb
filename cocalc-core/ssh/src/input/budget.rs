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
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MIB: usize = 1024 * 1024;

    impl Budget {
        fn used(&self) -> usize {
            self.lock().used
        }
    }

    fn queue(budget: &Arc<Budget>, project: u8) -> (InputSender, InputReceiver, CancellationToken) {
        let overflow = CancellationToken::new();
        let (sender, receiver) =
            input(budget, Holder::Project(ProjectId::from_bytes([project; 16])), &overflow, &Arc::default());
        (sender, receiver, overflow)
    }

    #[tokio::test]
    async fn a_queue_knows_its_level_and_its_end() {
        let budget = Budget::new(usize::MAX);
        let (sender, mut receiver, overflow) = queue(&budget, 1);
        assert!(sender.push(&[0; 1000]));
        assert_eq!(sender.queued(), 1000 + ENTRY_BYTES);
        assert_eq!(receiver.next().await.unwrap().len(), 1000);
        assert_eq!(sender.queued(), 1000 + ENTRY_BYTES, "what is being written is still held");
        assert!(sender.push(b"x"));
        receiver.next().await.unwrap();
        assert_eq!(sender.queued(), 1 + ENTRY_BYTES);
        assert_eq!(budget.used(), 1 + ENTRY_BYTES);
        let big = vec![0; MIB];
        let taken = (0..100).take_while(|_| sender.push(&big)).count();
        assert!(taken < 33, "{taken} MiB were queued");
        assert!(overflow.is_cancelled());
        assert_eq!(budget.used(), 0, "what is given up is free at once");
        // The end of what was given up is not the end of the input.
        drop(sender);
        let next = tokio::time::timeout(Duration::from_millis(20), receiver.next());
        assert!(next.await.is_err(), "a part was taken for the whole");
        drop(receiver);
        assert_eq!(budget.used(), 0);
        assert!(budget.lock().holders.is_empty());

        let (sender, receiver, _) = queue(&budget, 1);
        assert!(sender.push(&big));
        drop(receiver);
        assert!(sender.push(&big), "what nobody wants is dropped, not an error");
        assert_eq!((sender.queued(), budget.used()), (0, 0));

        // What was sent before the end arrives, and who waits learns of the end.
        let (sender, mut receiver, _) = queue(&budget, 1);
        assert!(sender.push(b"last"));
        let rest = tokio::spawn(async move {
            let first = receiver.next().await;
            (first, receiver.next().await)
        });
        tokio::task::yield_now().await;
        drop(sender);
        assert_eq!(rest.await.unwrap(), (Some(Bytes::from_static(b"last")), None));
    }

    #[test]
    fn who_has_most_gives_up_first() {
        let budget = Budget::new(8 << 20);
        let chunk = Bytes::from(vec![0; 512 * 1024]);
        let start = Instant::now();
        // One project has three queues that do not read, another has one, and a
        // third one reads.
        let mut greedy: Vec<_> = (0..3).map(|_| queue(&budget, 1)).collect();
        let mut modest = queue(&budget, 2);
        for (_, receiver, _) in greedy.iter_mut().chain([&mut modest]) {
            assert!(matches!(receiver.take_at(start), Next::Wait));
        }
        for _ in 0..3 {
            for (sender, ..) in greedy.iter().chain([&modest]) {
                assert!(sender.push_at(chunk.clone(), start));
            }
        }
        let (sender, mut receiver, overflow) = queue(&budget, 3);
        let mut reads = |at: Instant| {
            for _ in 0..6 {
                assert!(sender.push_at(chunk.clone(), at));
            }
            greedy.retain(|(.., overflow)| !overflow.is_cancelled());
            for _ in 0..6 {
                assert!(matches!(receiver.take_at(at), Next::Piece(_)));
            }
            assert!(matches!(receiver.take_at(at), Next::Wait));
            greedy.len()
        };
        assert!((0..100).all(|_| reads(start) == 2), "one was enough");
        // Above three quarters who does not read may stay for a while, until
        // its project has no more than others.
        assert_eq!(reads(start + PATIENCE - Duration::from_millis(1)), 2);
        assert!((0..100).all(|_| reads(start + PATIENCE + LOOK_AGAIN) == 1));
        assert!(!modest.2.is_cancelled() && !overflow.is_cancelled());
        drop((greedy, modest, receiver));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn many_small_queues_are_bounded_as_well() {
        let budget = Budget::new(MIB);
        let piece = Bytes::from(vec![0; 1000]);
        let queues: Vec<_> = (0..100).map(|number| queue(&budget, number % 7)).collect();
        for _ in 0..1000 {
            for (sender, ..) in &queues {
                sender.push_at(piece.clone(), Instant::now());
                assert!(budget.used() <= MIB);
            }
        }
        assert!(queues.iter().any(|(.., overflow)| overflow.is_cancelled()));
    }

    #[test]
    fn what_is_being_written_to_who_does_not_read_costs_nobody_else_a_channel() {
        let budget = Budget::new(8 << 20);
        let start = Instant::now();
        let packet = Bytes::from(vec![0; 256 * 1024]);
        // All of it is in the hands of tasks that write to processes that do not read.
        let mut greedy: Vec<_> = (0..31).map(|_| queue(&budget, 1)).collect();
        for (sender, receiver, _) in &mut greedy {
            assert!(sender.push_at(packet.clone(), start));
            assert!(matches!(receiver.take_at(start), Next::Piece(_)));
        }
        let others: Vec<_> = (2..100).map(|project| queue(&budget, project)).collect();
        for second in 0..20 {
            for (sender, ..) in &others {
                assert!(sender.push_at(Bytes::from(vec![0; 1000]), start + Duration::from_secs(second)));
                assert!(budget.used() <= 8 << 20);
            }
        }
        assert!(greedy.iter().any(|(.., overflow)| overflow.is_cancelled()));
        // Who was given up gets nothing more, and counts for nothing.
        for (_, receiver, overflow) in &mut greedy {
            let given_up = matches!(receiver.take_at(start), Next::Never);
            assert_eq!(given_up, overflow.is_cancelled());
        }
        drop(greedy);
        drop(others);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_places_of_small_pieces_are_given_back() {
        let budget = Budget::new(usize::MAX);
        let (sender, mut receiver, _) = queue(&budget, 1);
        for _ in 0..100_000 {
            assert!(sender.push_at(Bytes::from_static(b"x"), Instant::now()));
        }
        for _ in 0..99_990 {
            assert!(matches!(receiver.take_at(Instant::now()), Next::Piece(_)));
        }
        let place = &sender.place;
        let capacity = budget.lock().queue(place.holder, place.number).unwrap().pieces.capacity();
        assert!(capacity < 100, "{capacity} places for ten pieces");
    }

    #[test]
    fn who_was_left_alone_for_long_goes_before_who_reads_also_with_little() {
        let budget = Budget::new(8 << 20);
        let start = Instant::now();
        let piece = Bytes::from(vec![0; 900_000]);
        let mut parked: Vec<_> = (0..8).map(|_| queue(&budget, 1)).collect();
        let mut typed = queue(&budget, 1);
        for (sender, receiver, _) in parked.iter_mut().chain([&mut typed]) {
            assert!(matches!(receiver.take_at(start), Next::Wait));
            let piece = if sender.place.number == 9 { Bytes::from_static(b"ls") } else { piece.clone() };
            assert!(sender.push_at(piece, start));
        }
        // One that waits for its project to start, with more than they have.
        let starting = queue(&budget, 1);
        let later = start + Duration::from_secs(3600);
        for _ in 0..2 {
            assert!(starting.0.push_at(piece.clone(), later));
        }
        let parked = parked.iter().filter(|(.., overflow)| !overflow.is_cancelled()).count();
        assert!((4..8).contains(&parked), "{parked}");
        assert!(!typed.2.is_cancelled() && !starting.2.is_cancelled());
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % end
        }
    }

    /// A channel of the simulation, as its author knows it.
    struct Channel {
        project: u8,
        sender: InputSender,
        receiver: InputReceiver,
        overflow: CancellationToken,
        /// Whether it reads; how often, in milliseconds, and how many pieces.
        reads: Option<(u64, u64)>,
        read_at: u64,
        /// Since when it has had something to read, and not read.
        waits_since: Option<u64>,
        /// Whether it has fallen behind.
        stalled: bool,
        /// How much it has read, in bytes.
        taken: usize,
    }

    /// Channels that read, more or less, and channels that do not, of few or of
    /// many projects, open, send in bursts, and stop to read. Gives how many were
    /// given up, and how often one that reads stayed beside.
    fn simulate(seed: u64) -> (usize, usize) {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let max = MIB * (4 + random.below(28) as usize);
        let budget = Budget::new(max);
        let start = Instant::now();
        let piece = Bytes::from(vec![0; 32 * 1024]);
        let projects = 1 + random.below(5);
        let mut channels: BTreeMap<u64, Channel> = BTreeMap::new();
        let (mut given_up, mut spared) = (0, 0);
        let mut now = 0;
        for step in 0..3000_u64 {
            now += random.below(8);
            let at = start + Duration::from_millis(now);
            if channels.len() < 16 && random.below(10) == 0 {
                let project = random.below(projects) as u8;
                let (sender, mut receiver, overflow) = queue(&budget, project);
                assert!(matches!(receiver.take_at(at), Next::Wait));
                let reads = (random.below(2) == 0).then(|| (1 + random.below(1500), 1 + random.below(200)));
                let channel = Channel {
                    project,
                    sender,
                    receiver,
                    overflow,
                    reads,
                    read_at: now,
                    waits_since: None,
                    stalled: false,
                    taken: 0,
                };
                channels.insert(step, channel);
            }
            for channel in channels.values_mut() {
                let Some((every, pieces)) = channel.reads else { continue };
                if random.below(4000) == 0 {
                    channel.reads = None;
                    continue;
                }
                if now < channel.read_at + every {
                    continue;
                }
                channel.read_at = now;
                for _ in 0..pieces {
                    match channel.receiver.take_at(at) {
                        Next::Piece(piece) => {
                            channel.waits_since = Some(now);
                            channel.taken += piece.len();
                        }
                        _ => channel.waits_since = None,
                    }
                    if channel.sender.queued() < READING_BYTES {
                        channel.stalled = false;
                    }
                }
            }
            let Some(pushing) = channels.keys().nth(random.below(16) as usize).copied() else { continue };
            // What a client may send to who does not read, and a whole burst.
            let full = channels[&pushing].sender.queued() > 3 * MIB && random.below(20) > 0;
            let pieces = if full { 1 } else { random.below(64) };
            for _ in 0..pieces {
                let used_before = budget.used();
                let extra = cost(&piece);
                let own = channels[&pushing].sender.queued() + extra > CHANNEL_BYTES_MAX;
                // Seldom, since it takes most of the time of this test.
                let tight = own || used_before + extra > max - max / 4;
                let queued = |(number, channel): (&u64, &Channel)| (*number, channel.sender.queued());
                let before: BTreeMap<u64, usize> =
                    if tight { channels.iter().map(queued).collect() } else { BTreeMap::new() };
                let channel = channels.get_mut(&pushing).unwrap();
                channel.waits_since.get_or_insert(now);
                if channel.sender.queued() + extra > STALLED_BYTES {
                    channel.stalled = true;
                }
                let fits = channel.sender.push_at(piece.clone(), at);
                assert_eq!(fits, !channel.overflow.is_cancelled());
                // Always bounded, and counted rightly.
                let used = budget.used();
                assert!(used <= max, "seed {seed}: {used} of {max}");
                if !tight {
                    assert!(fits, "seed {seed}: nothing had to go");
                    continue;
                }
                let held: usize = channels.values().map(|channel| channel.sender.queued()).sum();
                assert_eq!(held, used, "seed {seed}");
                let mut gone: Vec<u64> = channels
                    .iter()
                    .filter(|(_, channel)| channel.overflow.is_cancelled())
                    .map(|(number, _)| *number)
                    .collect();
                if gone.is_empty() {
                    continue;
                }
                given_up += gone.len();
                // No more than was needed: without the last of them it was too much.
                let largest = gone.iter().map(|number| before[number] + extra).max().unwrap();
                let wanted = used_before + extra;
                if !own {
                    assert!(wanted > max - max / 4, "seed {seed}: nothing had to go");
                    assert!(used + largest > max - max / 4, "seed {seed}: too much went");
                }
                gone.sort_unstable();
                for number in &gone {
                    let victim = &channels[number];
                    if own && *number == pushing {
                        continue;
                    }
                    let waits = |channel: &Channel| channel.waits_since.map_or(0, |since| now - since);
                    for (other, channel) in &channels {
                        if channel.project != victim.project || gone.contains(other) {
                            continue;
                        }
                        let bytes =
                            |number: &u64| before[number] + if *number == pushing { extra } else { 0 };
                        if bytes(other) == 0 {
                            continue;
                        }
                        let reads = |channel: &Channel| channel.taken > PROBATION_BYTES;
                        spared += usize::from(channel.stalled && reads(channel));
                        let class = |number: &u64, channel: &Channel| match channel.stalled {
                            _ if waits(channel) >= 3000 && bytes(number) >= WORTH_BYTES => 0,
                            stalled => 3 - usize::from(stalled) - usize::from(stalled && !reads(channel)),
                        };
                        let (its, the_others) = (class(number, victim), class(other, channel));
                        let before_it = match its {
                            3 => bytes(other) > bytes(number),
                            _ => waits(channel) > waits(victim),
                        };
                        assert!(
                            its < the_others || (its == the_others && !before_it),
                            "seed {seed}: not who reads least"
                        );
                    }
                    // It had its time, or there was no more room at all.
                    assert!(wanted > max || waits(victim) >= 3000, "seed {seed}: no patience");
                    // Nobody else had more at that moment: since then both have
                    // only given back.
                    let has = |project: u8| {
                        let its = channels.values().filter(|channel| channel.project == project);
                        its.map(|channel| channel.sender.queued()).sum::<usize>()
                    };
                    let gave = gone.iter().filter(|other| channels[other].project == victim.project);
                    let had = has(victim.project) + gave.map(|other| before[other] + extra).sum::<usize>();
                    for project in 0..projects as u8 {
                        assert!(had >= has(project), "seed {seed}: another project has more");
                    }
                }
                for number in gone {
                    channels.remove(&number);
                }
                if !channels.contains_key(&pushing) {
                    break;
                }
            }
        }
        drop(channels);
        assert_eq!(budget.used(), 0);
        assert!(budget.lock().holders.is_empty());
        (given_up, spared)
    }

    #[test]
    fn who_reads_is_never_given_up_for_who_does_not() {
        let seeds = if std::env::var_os("COCALC_FULL").is_some() { 500 } else { 5 };
        let (mut given_up, mut spared) = (0, 0);
        for seed in 0..seeds {
            let (all, readers) = simulate(seed);
            given_up += all;
            spared += readers;
        }
        // Otherwise nothing was shown.
        assert!(given_up > 100 * seeds as usize && spared > 20 * seeds as usize, "{given_up}, {spared}");
    }
}
