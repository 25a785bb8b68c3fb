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
//!   connection reads nothing for a moment ([`REST`]), so that this costs
//!   nothing to speak of; a queue that is read again ends that moment, so that a
//!   process that paused does not wait for its input. Without those two bytes
//!   it could never be granted anything again.
//! - Just after such a packet its sender is known to have nothing under way for
//!   a round trip. If another, which reads, has come to the end of its credit
//!   in the meantime, two bytes of it are under way already: the next grant is
//!   [`TURN_BYTES`], and it is the other that takes it. So it goes on beside
//!   the stalled one, by a window in a round trip or two.
//! - Should the stalled one be the next nevertheless, because the other had
//!   nothing more to send just then, its queue grows by that grant. When it is over
//!   [`CHANNEL_BYTES_MAX`], the channel is closed, and its user told why.
//!
//! Memory is bounded by [`CHANNEL_BYTES_MAX`], [`CONNECTION_BYTES_MAX`] and a
//! [`Budget`] of the whole server, also against clients that ignore their
//! credit.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cocalc_core::ids::ProjectId;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

/// The credit of a channel that reads.
pub(crate) const WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// The least that can be granted and still be granted again.
const TRICKLE_BYTES: u32 = 2;
/// The credit of a channel that reads, beside one that does not.
const TURN_BYTES: u32 = WINDOW_BYTES;
/// Who sent nothing for so long has nothing to send.
const QUIET: Duration = Duration::from_millis(500);
/// From here a channel does not read.
const STALLED_BYTES: usize = 1024 * 1024;
/// From here downwards it reads again.
const READING_BYTES: usize = 512 * 1024;
/// How long nothing is read after a trickle. Nobody notices it while typing.
const REST: Duration = Duration::from_millis(20);
/// The same while others wait for their turn, which comes after a trickle.
const SHORT_REST: Duration = Duration::from_millis(2);
/// What one channel's queue may hold.
pub(crate) const CHANNEL_BYTES_MAX: usize = 32 * 1024 * 1024;
/// What all queues of a connection may hold.
pub(crate) const CONNECTION_BYTES_MAX: usize = 64 * 1024 * 1024;
/// What a queue may hold when the [`Budget`] is used up.
const SCARCE_BYTES: usize = 64 * 1024;
/// What an entry of a queue costs besides its bytes.
const ENTRY_BYTES: usize = 64;

/// What all queues of a server may hold together. Who has most gives up first,
/// and of its channels the one that has not read for longest.
#[derive(Debug)]
pub(crate) struct Budget {
    max: usize,
    shares: Mutex<Shares>,
}

#[derive(Debug, Default)]
struct Shares {
    used: usize,
    /// The number of the last queue that stalled.
    last: u64,
    projects: HashMap<ProjectId, Share>,
}

#[derive(Debug, Default)]
struct Share {
    used: usize,
    /// By their numbers: those that have not read for longest come first.
    stalled: BTreeMap<u64, CancellationToken>,
}

impl Budget {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, shares: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn used(&self) -> usize {
        self.lock().used
    }
}

/// How full a queue is, seen from both ends. The lock of the budget orders
/// all changes.
#[derive(Debug)]
struct Level {
    bytes: AtomicUsize,
    closed: AtomicBool,
    /// Its number among the stalled ones; 0 if it is none.
    stalled: AtomicU64,
    project: ProjectId,
    budget: Arc<Budget>,
    overflow: CancellationToken,
    reads_again: Arc<Notify>,
}

impl Level {
    /// Counts `cost` more; `false` if there is no room for it.
    fn add(&self, cost: usize) -> bool {
        let mut guard = self.budget.lock();
        let shares = &mut *guard;
        if self.closed.load(Ordering::Acquire) {
            return true;
        }
        let bytes = self.bytes.load(Ordering::Acquire) + cost;
        self.bytes.store(bytes, Ordering::Release);
        shares.used += cost;
        let share = shares.projects.entry(self.project).or_default();
        share.used += cost;
        if bytes > STALLED_BYTES && self.stalled.load(Ordering::Acquire) == 0 {
            shares.last += 1;
            self.stalled.store(shares.last, Ordering::Release);
            share.stalled.insert(shares.last, self.overflow.clone());
        }
        if bytes > CHANNEL_BYTES_MAX {
            return false;
        }
        if shares.used <= self.budget.max {
            return true;
        }
        // Its end frees what it has, a moment later.
        let most = shares.projects.values_mut().filter(|share| !share.stalled.is_empty());
        let longest = most.max_by_key(|share| share.used).and_then(|share| share.stalled.pop_first());
        match longest {
            Some((_, overflow)) => {
                overflow.cancel();
                !self.overflow.is_cancelled()
            }
            None => bytes <= SCARCE_BYTES || shares.used <= self.budget.max + self.budget.max / 4,
        }
    }

    fn sub(&self, cost: usize) {
        if cost == 0 {
            return;
        }
        let mut shares = self.budget.lock();
        let bytes = self.bytes.load(Ordering::Acquire).saturating_sub(cost);
        self.settle(&mut shares, bytes);
    }

    /// Forgets what nobody will take any more.
    fn close(&self) {
        let mut shares = self.budget.lock();
        self.closed.store(true, Ordering::Release);
        self.settle(&mut shares, 0);
    }

    fn settle(&self, shares: &mut Shares, bytes: usize) {
        let freed = self.bytes.swap(bytes, Ordering::AcqRel).saturating_sub(bytes);
        shares.used = shares.used.saturating_sub(freed);
        let Some(share) = shares.projects.get_mut(&self.project) else { return };
        share.used = share.used.saturating_sub(freed);
        if bytes < READING_BYTES {
            let stalled = self.stalled.swap(0, Ordering::AcqRel);
            if share.stalled.remove(&stalled).is_some() {
                self.reads_again.notify_one();
            }
        }
        if share.used == 0 {
            shares.projects.remove(&self.project);
        }
    }
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

/// Makes the queue of one channel of `project`, which `overflow` closes, and
/// which tells `reads_again` when it had stalled and does not any more. Its size
/// is counted in bytes, not entries.
pub(crate) fn input(
    budget: &Arc<Budget>,
    project: ProjectId,
    overflow: &CancellationToken,
    reads_again: &Arc<Notify>,
) -> (InputSender, InputReceiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let level = Arc::new(Level {
        bytes: AtomicUsize::new(0),
        closed: AtomicBool::new(false),
        stalled: AtomicU64::new(0),
        project,
        budget: budget.clone(),
        overflow: overflow.clone(),
        reads_again: Arc::clone(reads_again),
    });
    (InputSender { queue: sender, level: level.clone() }, InputReceiver { queue: receiver, level, taken: 0 })
}

impl InputSender {
    /// Adds `data`; `false` if the queue cannot take it.
    pub(crate) fn push(&self, data: &[u8]) -> bool {
        if self.level.closed.load(Ordering::Acquire) {
            // The process reads no more, which is its right.
            return true;
        }
        let fits = self.level.add(data.len() + ENTRY_BYTES);
        if fits {
            // A receiver that closes just now forgets the level with the queue.
            let _ = self.queue.send(Bytes::copy_from_slice(data));
        }
        fits
    }

    pub(crate) fn queued(&self) -> usize {
        self.level.bytes.load(Ordering::Acquire)
    }
}

impl InputReceiver {
    /// The next piece, once the previous one has been consumed; `None` after
    /// the last. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.level.sub(std::mem::take(&mut self.taken));
        let data = self.queue.recv().await?;
        self.taken = data.len() + ENTRY_BYTES;
        Some(data)
    }
}

impl Drop for InputReceiver {
    fn drop(&mut self) {
        self.level.close();
    }
}

/// Chooses the credit of the next grant.
#[derive(Debug, Default)]
pub(crate) struct Credit {
    /// Who does not read, and when something last came from it.
    stalled: BTreeMap<u32, Option<Instant>>,
    /// Who reads, and has come to the end of its credit: to wait for that
    /// shows that it has more to send.
    hungry: BTreeSet<u32>,
}

impl Credit {
    /// Notes how much `channel` has queued.
    pub(crate) fn note(&mut self, channel: u32, queued: usize) {
        if queued > STALLED_BYTES {
            self.stalled.entry(channel).or_insert(None);
            self.hungry.remove(&channel);
        } else if queued < READING_BYTES {
            self.stalled.remove(&channel);
        }
        if self.stalled.is_empty() {
            self.hungry.clear();
        }
    }

    /// Notes that data of `channel` came, which has `left` of its credit, a
    /// grant just now included.
    pub(crate) fn came(&mut self, channel: u32, left: u32, now: Instant) {
        if let Some(last) = self.stalled.get_mut(&channel) {
            *last = Some(now);
        } else if !self.stalled.is_empty() && left <= TRICKLE_BYTES {
            self.hungry.insert(channel);
        }
    }

    /// Forgets `channel`, which has closed.
    pub(crate) fn forget(&mut self, channel: u32) {
        self.stalled.remove(&channel);
        self.hungry.remove(&channel);
    }

    /// Whether `channel` did not read when last looked at.
    pub(crate) fn is_stalled(&self, channel: u32) -> bool {
        self.stalled.contains_key(&channel)
    }

    /// The channels that did not read when last looked at.
    pub(crate) fn stalled(&self) -> Vec<u32> {
        self.stalled.keys().copied().collect()
    }

    /// The credit of the next grant, now that `channel` was granted `current`.
    pub(crate) fn next(&mut self, channel: u32, current: u32, now: Instant) -> u32 {
        if self.stalled.is_empty() {
            return WINDOW_BYTES;
        }
        if self.is_stalled(channel) {
            if current != TRICKLE_BYTES {
                // Either it stalled only now, or it took another's turn, who
                // then has nothing to send.
                self.hungry.clear();
                return TRICKLE_BYTES;
            }
            return if self.hungry.is_empty() { TRICKLE_BYTES } else { TURN_BYTES };
        }
        self.hungry.remove(&channel);
        // It has no credit left, and nobody is there to wait for.
        let quiet =
            |last: &Option<Instant>| last.is_some_and(|last| now.saturating_duration_since(last) > QUIET);
        if current == TRICKLE_BYTES && self.stalled.values().all(quiet) { TURN_BYTES } else { TRICKLE_BYTES }
    }

    /// How long reading should rest after data for which `current` was granted.
    pub(crate) fn rest(&self, current: u32) -> Option<Duration> {
        let trickle = current == TRICKLE_BYTES && !self.stalled.is_empty();
        trickle.then_some(if self.hungry.is_empty() { REST } else { SHORT_REST })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// The library's rule, as far as it matters here.
    struct Library {
        target: u32,
        windows: Vec<u32>,
    }

    impl Library {
        /// Data of `length` arrives; how much was granted for it.
        fn data(&mut self, channel: usize, length: u32) -> Option<u32> {
            let window = &mut self.windows[channel];
            assert!(length <= *window, "the client sent more than its credit");
            *window -= length;
            let granted = (*window < self.target / 2).then(|| self.target - *window);
            if granted.is_some() {
                *window = self.target;
            }
            granted
        }
    }

    /// A client, a line with a delay, the library, and processes that read.
    struct Simulation {
        micros: u64,
        delay: u64,
        library: Library,
        credit: Credit,
        start: Instant,
        /// Client: credit, and what it still wants to send.
        client: Vec<(u32, u64)>,
        up: VecDeque<(u64, usize, u32)>,
        down: VecDeque<(u64, usize, u32)>,
        queued: Vec<usize>,
        taken: Vec<u64>,
        resting_until: u64,
        turn: usize,
    }

    const PACKET: u32 = 32 * 1024;
    /// A packet on a line of 320 MB/s.
    const PACKET_MICROS: u64 = 100;

    impl Simulation {
        fn new(channels: usize, delay: u64) -> Self {
            Self {
                micros: 0,
                delay,
                library: Library { target: WINDOW_BYTES, windows: vec![WINDOW_BYTES; channels] },
                credit: Credit::default(),
                start: Instant::now(),
                client: vec![(WINDOW_BYTES, 0); channels],
                up: VecDeque::new(),
                down: VecDeque::new(),
                queued: vec![0; channels],
                taken: vec![0; channels],
                resting_until: 0,
                turn: 0,
            }
        }

        /// One packet's time passes; `reads` says how many bytes each process
        /// takes in it at most.
        fn step(&mut self, reads: &[usize]) {
            self.micros += PACKET_MICROS;
            while self.down.front().is_some_and(|(at, ..)| *at <= self.micros) {
                let (_, channel, grant) = self.down.pop_front().unwrap();
                self.client[channel].0 += grant;
            }
            // The line holds what is under way, and a socket's buffer.
            if self.up.len() < 128 {
                for _ in 0..self.client.len() {
                    self.turn = (self.turn + 1) % self.client.len();
                    let (credit, wanted) = &mut self.client[self.turn];
                    let length = u32::try_from(*wanted).unwrap_or(PACKET).min(PACKET).min(*credit);
                    if length > 0 {
                        *credit -= length;
                        *wanted -= u64::from(length);
                        self.up.push_back((self.micros + self.delay, self.turn, length));
                        break;
                    }
                }
            }
            let before = self.queued.clone();
            for (channel, read) in reads.iter().enumerate() {
                let taken = self.queued[channel].min(*read);
                self.queued[channel] -= taken;
                self.taken[channel] += taken as u64;
            }
            let again = |channel: &u32| {
                let channel = *channel as usize;
                before[channel] >= READING_BYTES && self.queued[channel] < READING_BYTES
            };
            if self.credit.stalled().iter().any(again) {
                self.resting_until = 0;
            }
            if self.resting_until > self.micros {
                return;
            }
            while let Some(&(at, channel, length)) = self.up.front() {
                if at > self.micros || self.resting_until > self.micros {
                    break;
                }
                self.up.pop_front();
                self.receive(channel, length);
            }
        }

        /// What `Connection` does.
        fn receive(&mut self, channel: usize, length: u32) {
            let now = self.start + Duration::from_micros(self.micros);
            let number = u32::try_from(channel).unwrap();
            let mut current = None;
            if let Some(grant) = self.library.data(channel, length) {
                for stalled in self.credit.stalled() {
                    self.credit.note(stalled, self.queued[stalled as usize]);
                }
                current = Some(self.library.target);
                self.library.target = self.credit.next(number, self.library.target, now);
                self.down.push_back((self.micros + self.delay, channel, grant));
            }
            self.queued[channel] += length as usize;
            self.credit.note(number, self.queued[channel]);
            self.credit.came(number, self.library.windows[channel], now);
            if let Some(rest) = current.and_then(|current| self.credit.rest(current)) {
                self.resting_until = self.micros + u64::try_from(rest.as_micros()).unwrap();
            }
        }
    }

    const ALL: usize = usize::MAX;

    #[test]
    fn a_stalled_channel_waits_while_others_go_on() {
        for delay_millis in [0, 1, 10, 80] {
            let mut simulation = Simulation::new(3, delay_millis * 1000 / 2);
            simulation.client[0].1 = u64::MAX;
            simulation.client[1].1 = u64::MAX;
            let mut typed = 0;
            let mut slowest = 0;
            for step in 0..300_000_u64 {
                // Somebody types: a byte each 50 ms, which comes soon.
                if step % 500 == 0 {
                    simulation.client[2].1 += 1;
                    typed = step;
                }
                simulation.step(&[0, ALL, ALL]);
                if simulation.taken[2] == step / 500 + 1 && typed > 0 {
                    slowest = slowest.max(step - typed);
                    typed = 0;
                }
            }
            let (passed, queued) = (simulation.taken[1] >> 20, simulation.queued[0] >> 20);
            // In 30 s: a turn in a round trip, at least.
            let least = 30_000 / (delay_millis + 25) / 2;
            assert!(passed > least, "{delay_millis} ms: only {passed} MiB passed");
            assert!(queued < 8, "{delay_millis} ms: {queued} MiB are queued");
            let millis = slowest * PACKET_MICROS / 1000;
            assert!(millis < delay_millis + 100, "{delay_millis} ms: a key took {millis} ms");
            // Once it reads, everybody has the full window again.
            for _ in 0..20_000 {
                simulation.step(&[ALL, ALL, ALL]);
            }
            assert_eq!(simulation.library.target, WINDOW_BYTES);
            assert!(simulation.taken[0] > 16 << 20);
        }
    }

    #[test]
    fn a_slow_reader_is_never_given_up_and_alone_has_its_speed() {
        let mut simulation = Simulation::new(1, 5000);
        simulation.client[0].1 = u64::MAX;
        let mut most = 0;
        for _ in 0..300_000 {
            // 3 MB/s.
            simulation.step(&[300]);
            most = most.max(simulation.queued[0]);
        }
        assert!(most < 6 << 20, "{most}");
        assert!(simulation.taken[0] > 80_000_000, "{}", simulation.taken[0]);
    }

    #[test]
    fn a_process_that_pauses_does_not_wait_for_its_input() {
        let mut simulation = Simulation::new(1, 50);
        simulation.client[0].1 = u64::MAX;
        // It takes 160 MB/s, half of what the line has, but for a pause of 12 ms
        // in 40, as one that writes to a disk does: queued is what fills those.
        let (mut waited, mut steps) = (0_u64, 0_u64);
        for step in 0..100_000_u64 {
            let reads = step % 400 >= 120;
            if step > 1000 && reads {
                steps += 1;
                waited += u64::from(simulation.queued[0] == 0);
            }
            simulation.step(&[if reads { PACKET as usize / 2 } else { 0 }]);
        }
        assert!(waited * 100 < steps * 2, "no input at {waited} of {steps} times");
    }

    #[test]
    fn beside_many_pauses_a_stalled_channel_is_still_bounded() {
        // Another that pauses at odd times: its turn may be taken by the one
        // that is stalled. It is bounded by the queue's limit, and rare.
        let mut seed = 7_u64;
        let mut simulation = Simulation::new(3, 10_000);
        simulation.client[0].1 = u64::MAX;
        let mut sent = 0;
        for step in 0..600_000_u64 {
            if step % 3000 == 0 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let burst = seed >> 44;
                simulation.client[1].1 += burst;
                simulation.client[2].1 += burst / 3;
                sent += burst;
            }
            simulation.step(&[0, ALL, ALL]);
        }
        assert!(simulation.taken[1] > sent / 2, "{} of {sent}", simulation.taken[1]);
        assert!(simulation.queued[0] < CHANNEL_BYTES_MAX, "{} MiB", simulation.queued[0] >> 20);
    }

    fn queue(budget: &Arc<Budget>, project: u8) -> (InputSender, InputReceiver, CancellationToken) {
        let overflow = CancellationToken::new();
        let (sender, receiver) =
            input(budget, ProjectId::from_bytes([project; 16]), &overflow, &Arc::default());
        (sender, receiver, overflow)
    }

    #[tokio::test]
    async fn a_queue_knows_its_level_and_its_end() {
        let budget = Budget::new(usize::MAX);
        let (sender, mut receiver, _) = queue(&budget, 1);
        assert!(sender.push(&[0; 1000]));
        assert_eq!(sender.queued(), 1000 + ENTRY_BYTES);
        assert_eq!(receiver.next().await.unwrap().len(), 1000);
        assert_eq!(sender.queued(), 1000 + ENTRY_BYTES, "what is being written is still held");
        assert!(sender.push(b"x"));
        receiver.next().await.unwrap();
        assert_eq!(sender.queued(), 1 + ENTRY_BYTES);
        assert_eq!(budget.used(), 1 + ENTRY_BYTES);
        let big = vec![0; 1024 * 1024];
        let taken = (0..100).take_while(|_| sender.push(&big)).count();
        assert!(taken < 33, "{taken} MiB were queued");
        drop(receiver);
        assert!(sender.push(&big), "what nobody wants is dropped, not an error");
        assert_eq!((sender.queued(), budget.used()), (0, 0));
        assert!(budget.lock().projects.is_empty());
    }

    #[tokio::test]
    async fn who_has_most_gives_up_first() {
        let budget = Budget::new(8 << 20);
        let chunk = vec![0; 512 * 1024];
        // One project has three queues that do not read, another has one, and a
        // third one reads.
        let mut greedy: Vec<_> = (0..3).map(|_| queue(&budget, 1)).collect();
        let modest = queue(&budget, 2);
        for _ in 0..3 {
            for (sender, ..) in greedy.iter().chain([&modest]) {
                assert!(sender.push(&chunk));
            }
        }
        let (sender, mut receiver, overflow) = queue(&budget, 3);
        for _ in 0..100 {
            for _ in 0..6 {
                assert!(sender.push(&chunk));
            }
            // As their tasks do.
            greedy.retain(|(.., overflow)| !overflow.is_cancelled());
            for _ in 0..6 {
                receiver.next().await.unwrap();
            }
        }
        assert!(greedy.len() < 3, "nobody gave up");
        assert!(!modest.2.is_cancelled() && !overflow.is_cancelled());
        drop((greedy, modest, receiver));
        assert_eq!(budget.used(), 0);
    }
}
