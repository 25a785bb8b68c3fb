//! How much more a client may send.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{CHANNEL_BYTES_MAX, READING_BYTES, STALLED_BYTES, WINDOW_BYTES};

/// The least that can be granted and still be granted again.
const TRICKLE_BYTES: u32 = 2;
/// The least credit of a channel that reads, beside one that does not.
const TURN_BYTES_MIN: usize = 4 * 1024;
/// Who sent nothing for so long has nothing to send.
const QUIET: Duration = Duration::from_millis(500);
/// How long nothing is read after a trickle. Nobody notices it while typing.
const REST: Duration = Duration::from_millis(20);
/// How long a client has, at first and at most, to send what it was just granted
/// for a channel that waits for its turn.
const ANSWER_MIN: Duration = Duration::from_millis(2);
const ANSWER_MAX: Duration = Duration::from_millis(100);

/// Chooses the credit of the next grant.
#[derive(Debug)]
pub(crate) struct Credit {
    stalled: BTreeMap<u32, Stalled>,
    /// Who reads, and has come to the end of its credit: to wait for that
    /// shows that it has more to send.
    hungry: BTreeSet<u32>,
    /// Who came last of those that do not read.
    last: Option<u32>,
    /// After whom of those a channel comes that reads: clients serve their channels
    /// in an order of their own, but always the same.
    after: BTreeMap<u32, u32>,
    /// Whether the next grant is a turn.
    turn: bool,
    /// How long the client's answers seem to take.
    answer: Duration,
}

/// A channel that does not read.
#[derive(Debug)]
struct Stalled {
    queued: usize,
    /// When something last came from it.
    came: Option<Instant>,
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            stalled: BTreeMap::new(),
            hungry: BTreeSet::new(),
            last: None,
            after: BTreeMap::new(),
            turn: false,
            answer: ANSWER_MIN,
        }
    }
}

impl Credit {
    /// Notes how much `channel` has queued.
    pub(crate) fn note(&mut self, channel: u32, queued: usize) {
        if queued > STALLED_BYTES {
            self.stalled.entry(channel).or_insert(Stalled { queued, came: None }).queued = queued;
            self.hungry.remove(&channel);
        } else if queued < READING_BYTES {
            self.stalled.remove(&channel);
        } else if let Some(stalled) = self.stalled.get_mut(&channel) {
            stalled.queued = queued;
        }
        if self.stalled.is_empty() {
            *self = Self::default();
        }
    }

    /// Notes that data of `channel` came, which has `left` of its credit, a
    /// grant just now included.
    pub(crate) fn came(&mut self, channel: u32, left: u32, now: Instant) {
        if let Some(stalled) = self.stalled.get_mut(&channel) {
            stalled.came = Some(now);
            self.last = Some(channel);
        } else if !self.stalled.is_empty() && left <= TRICKLE_BYTES {
            self.hungry.insert(channel);
        }
    }

    /// Forgets `channel`, which has closed.
    pub(crate) fn forget(&mut self, channel: u32) {
        self.stalled.remove(&channel);
        self.hungry.remove(&channel);
        self.after.remove(&channel);
        if self.stalled.is_empty() {
            *self = Self::default();
        }
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
        let turn = std::mem::take(&mut self.turn);
        if self.stalled.is_empty() {
            return WINDOW_BYTES;
        }
        if self.is_stalled(channel) {
            if turn {
                // It took another's turn, who has nothing to send, or a client
                // that was busy, and answered two grants in one go.
                self.answer = (self.answer * 2).min(ANSWER_MAX);
            }
            if current != TRICKLE_BYTES {
                self.hungry.clear();
                return TRICKLE_BYTES;
            }
            self.turn = self.hungry.iter().any(|waits| self.comes_after(*waits, channel));
            return if self.turn { self.turn_bytes() } else { TRICKLE_BYTES };
        }
        if turn {
            self.answer = (self.answer - self.answer / 512).max(ANSWER_MIN);
        }
        if current == TRICKLE_BYTES
            && let Some(last) = self.last
        {
            self.after.insert(channel, last);
        }
        self.hungry.remove(&channel);
        // It has no credit left, and nobody is there to wait for.
        let quiet =
            |stalled: &Stalled| stalled.came.is_some_and(|last| now.saturating_duration_since(last) > QUIET);
        if current == TRICKLE_BYTES && self.stalled.values().all(quiet) {
            self.turn_bytes()
        } else {
            TRICKLE_BYTES
        }
    }

    /// Whether `channel` is the next to come after `stalled`, as far as is known.
    fn comes_after(&self, channel: u32, stalled: u32) -> bool {
        let known = self.after.get(&channel).filter(|after| self.stalled.contains_key(after));
        known.map_or(self.stalled.len() == 1, |after| *after == stalled)
    }

    /// The credit of a turn: what a queue that does not read can take, should it
    /// get there, sixteen times and more.
    fn turn_bytes(&self) -> u32 {
        let most = self.stalled.values().map(|stalled| stalled.queued).max().unwrap_or(0);
        let bytes = (CHANNEL_BYTES_MAX.saturating_sub(most) / 16).max(TURN_BYTES_MIN);
        u32::try_from(bytes).unwrap_or(WINDOW_BYTES).min(WINDOW_BYTES)
    }

    /// How long reading should rest after data of `channel` for which `current`
    /// was granted.
    pub(crate) fn rest(&self, channel: u32, current: u32) -> Option<Duration> {
        if self.stalled.is_empty() || current != TRICKLE_BYTES || self.turn {
            // Whose turn it is has sent already.
            return None;
        }
        Some(if self.hungry.contains(&channel) { self.answer } else { REST })
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
        /// For how long the client sleeps at most, each time that it has done
        /// all it could: what came meanwhile it finds together, and serves the
        /// channels in their order, as OpenSSH does.
        naps: u64,
        asleep_until: u64,
        seed: u64,
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
                naps: 0,
                asleep_until: 0,
                seed: 7,
            }
        }

        fn below(&mut self, end: u64) -> u64 {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.seed >> 33) % end
        }

        /// One packet's time passes; `reads` says how many bytes each process
        /// takes in it at most.
        fn step(&mut self, reads: &[usize]) {
            self.micros += PACKET_MICROS;
            let awake = self.asleep_until <= self.micros;
            while awake && self.down.front().is_some_and(|(at, ..)| *at <= self.micros) {
                let (_, channel, grant) = self.down.pop_front().unwrap();
                self.client[channel].0 += grant;
            }
            // The line holds what is under way, and a socket's buffer.
            let up = self.up.len();
            if awake && up < 128 {
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
            if awake && self.up.len() == up && self.naps > 0 {
                self.asleep_until = self.micros + self.below(self.naps);
                self.turn = self.client.len() - 1;
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
            if let Some(rest) = current.and_then(|current| self.credit.rest(number, current)) {
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
    fn beside_busy_clients_stalled_channels_get_little_of_what_others_get() {
        // Channels in the client's order, and whether each reads.
        let orders: [&[bool]; 8] = [
            &[false, true],
            &[true, false],
            &[false, false, true],
            &[false, true, false],
            &[true, false, false],
            &[false, false, false, true],
            &[false, false, true, true],
            &[true, false, true, false],
        ];
        for (delay, naps_millis) in [(50, 0), (50, 5), (50, 20), (5000, 0), (40_000, 5)] {
            for reads in orders {
                let mut simulation = Simulation::new(reads.len(), delay);
                simulation.naps = naps_millis * 1000;
                simulation.client.iter_mut().for_each(|(_, wanted)| *wanted = u64::MAX);
                let rates: Vec<usize> = reads.iter().map(|reads| if *reads { ALL } else { 0 }).collect();
                for _ in 0..150_000 {
                    simulation.step(&rates);
                }
                let (mut passed, mut queued) = (0, 0);
                for (channel, reads) in reads.iter().enumerate() {
                    if *reads {
                        passed += simulation.taken[channel] >> 20;
                        assert!(simulation.taken[channel] >> 20 > 2, "{channel} of {reads:?} stands still");
                    } else {
                        queued = queued.max(simulation.queued[channel] >> 20);
                    }
                }
                // In 15 s.
                assert!(
                    passed > 50 && queued < 24,
                    "{reads:?}, {delay} µs, naps of {naps_millis} ms: {passed} MiB passed, {queued} MiB queued"
                );
            }
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
}
