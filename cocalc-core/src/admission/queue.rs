//! Who may start now. Pure.

use std::collections::{BTreeMap, VecDeque};

/// How urgent a start is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Urgency {
    /// Somebody waits for it.
    Asked,
    /// Nobody does: a wave after a reboot.
    Background,
}

/// What a [`Queue`] lets through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QueueLimits {
    /// How many start at once; at least 1.
    pub starts_max: usize,
    /// How many wait, of each urgency; more are refused.
    pub waiting_max: usize,
    /// What a start takes until it is over, in bytes of memory.
    pub start_bytes: u64,
    /// What must stay available beside it.
    pub reserve_bytes: u64,
}

impl QueueLimits {
    /// For a machine with so many cores: as many starts as cores, since each
    /// keeps about one busy, and no fewer than two.
    pub fn for_cores(cores: usize) -> Self {
        Self { starts_max: cores.max(2), waiting_max: 4096, start_bytes: 64 << 20, reserve_bytes: 256 << 20 }
    }
}

/// A place in a [`Queue`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Ticket(u64);

/// Says that as many wait as may.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{waiting} projects wait for their start already; try again later")]
pub struct Full {
    /// How many.
    pub waiting: usize,
}

/// After so many starts that somebody waited for, one goes first that nobody
/// does, so that these come to their end too.
const ASKED_IN_A_ROW: u32 = 4;

/// Admits starts by how many go on, and by the memory that is available. Within
/// an urgency, who came first goes first.
#[derive(Clone, Debug)]
pub struct Queue {
    limits: QueueLimits,
    next: u64,
    starting: BTreeMap<Ticket, Urgency>,
    asked: VecDeque<Ticket>,
    background: VecDeque<Ticket>,
    asked_in_a_row: u32,
}

impl Queue {
    /// An empty queue.
    pub fn new(limits: QueueLimits) -> Self {
        Self {
            limits,
            next: 0,
            starting: BTreeMap::new(),
            asked: VecDeque::new(),
            background: VecDeque::new(),
            asked_in_a_row: 0,
        }
    }

    /// Takes a place at the end.
    ///
    /// # Errors
    ///
    /// [`Full`].
    pub fn enter(&mut self, urgency: Urgency) -> Result<Ticket, Full> {
        let line = match urgency {
            Urgency::Asked => &mut self.asked,
            Urgency::Background => &mut self.background,
        };
        if line.len() >= self.limits.waiting_max {
            return Err(Full { waiting: line.len() });
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        line.push_back(ticket);
        Ok(ticket)
    }

    /// Gives up a place, or says that a start is over. Harmless if it was said
    /// before.
    pub fn leave(&mut self, ticket: Ticket) {
        self.starting.remove(&ticket);
        self.asked.retain(|waiting| *waiting != ticket);
        self.background.retain(|waiting| *waiting != ticket);
    }

    /// Whom it is the turn of now, with so many bytes of memory available.
    pub fn admit(&mut self, available_bytes: u64) -> Vec<Ticket> {
        let mut admitted = Vec::new();
        while self.has_room(available_bytes) {
            let background_first = self.asked_in_a_row >= ASKED_IN_A_ROW && !self.background.is_empty();
            let (ticket, urgency) = match (background_first, self.asked.front(), self.background.front()) {
                (false, Some(ticket), _) => (*ticket, Urgency::Asked),
                // Of those nobody waits for, one at a time beside others.
                (_, _, Some(ticket)) if background_first || self.may_add_background() => {
                    (*ticket, Urgency::Background)
                }
                _ => break,
            };
            match urgency {
                Urgency::Asked => {
                    self.asked.pop_front();
                    self.asked_in_a_row = self.asked_in_a_row.saturating_add(1);
                }
                Urgency::Background => {
                    self.background.pop_front();
                    self.asked_in_a_row = 0;
                }
            }
            self.starting.insert(ticket, urgency);
            admitted.push(ticket);
        }
        admitted
    }

    /// How many start now.
    pub fn starting(&self) -> usize {
        self.starting.len()
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.asked.len() + self.background.len()
    }

    /// A place stays free for whom somebody waits for, where there is more than
    /// one.
    fn may_add_background(&self) -> bool {
        let going = self.starting.values().filter(|urgency| **urgency == Urgency::Background).count();
        going < self.limits.starts_max.saturating_sub(1).max(1)
    }

    fn has_room(&self, available_bytes: u64) -> bool {
        let starting = self.starting.len();
        if starting == 0 {
            // However little there is: otherwise nothing would ever go on.
            return true;
        }
        // What those that have begun will take is not gone yet.
        let begun = u64::try_from(starting).unwrap_or(u64::MAX).saturating_add(1);
        let needed = self.limits.start_bytes.saturating_mul(begun).saturating_add(self.limits.reserve_bytes);
        starting < self.limits.starts_max.max(1) && available_bytes >= needed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: QueueLimits =
        QueueLimits { starts_max: 3, waiting_max: 100, start_bytes: 10, reserve_bytes: 100 };

    #[test]
    fn who_came_first_goes_first_and_no_more_at_once_than_may() {
        let mut queue = Queue::new(LIMITS);
        let tickets: Vec<_> = (0..5).map(|_| queue.enter(Urgency::Asked).unwrap()).collect();
        assert_eq!(queue.admit(u64::MAX), tickets[..3]);
        assert_eq!(queue.admit(u64::MAX), []);
        queue.leave(tickets[1]);
        queue.leave(tickets[3]);
        assert_eq!(queue.admit(u64::MAX), [tickets[4]], "who gave up is passed over");
        queue.leave(tickets[1]);
        assert_eq!((queue.starting(), queue.waiting()), (3, 0));
    }

    #[test]
    fn memory_holds_starts_back_but_never_the_only_one() {
        let mut queue = Queue::new(LIMITS);
        let tickets: Vec<_> = (0..3).map(|_| queue.enter(Urgency::Asked).unwrap()).collect();
        assert_eq!(queue.admit(0), tickets[..1]);
        assert_eq!(queue.admit(119), []);
        assert_eq!(queue.admit(120), [tickets[1]]);
        assert_eq!(queue.admit(129), []);
        assert_eq!(queue.admit(130), [tickets[2]]);
    }

    #[test]
    fn background_leaves_a_place_and_is_not_starved() {
        let mut queue = Queue::new(LIMITS);
        let wave: Vec<_> = (0..9).map(|_| queue.enter(Urgency::Background).unwrap()).collect();
        assert_eq!(queue.admit(u64::MAX), wave[..2], "one place stays free");
        let asked: Vec<_> = (0..9).map(|_| queue.enter(Urgency::Asked).unwrap()).collect();
        assert_eq!(queue.admit(u64::MAX), [asked[0]]);
        let mut order = Vec::new();
        let mut going = vec![wave[0], wave[1], asked[0]];
        while let Some(ticket) = going.first().copied() {
            queue.leave(ticket);
            going.remove(0);
            let next = queue.admit(u64::MAX);
            going.extend(&next);
            order.extend(next);
        }
        assert_eq!(order.len(), 15);
        let first_wave = order.iter().position(|ticket| wave.contains(ticket)).unwrap();
        assert!(first_wave <= ASKED_IN_A_ROW as usize, "{order:?}");
    }

    #[test]
    fn the_queue_has_a_size() {
        let mut queue = Queue::new(LIMITS);
        for _ in 0..100 {
            queue.enter(Urgency::Asked).unwrap();
        }
        assert_eq!(queue.enter(Urgency::Asked), Err(Full { waiting: 100 }));
        queue.enter(Urgency::Background).expect("the other line has room");
    }

    proptest! {
        #[test]
        fn everybody_has_a_turn_once_and_limits_hold(
            steps in proptest::collection::vec((0u8..4, any::<bool>(), 0u64..400), 1..300),
        ) {
            let mut queue = Queue::new(LIMITS);
            let (mut waiting, mut going, mut done) = (Vec::new(), Vec::new(), Vec::new());
            for (what, background, memory) in steps {
                match what {
                    0 | 1 => {
                        let urgency = if background { Urgency::Background } else { Urgency::Asked };
                        if let Ok(ticket) = queue.enter(urgency) { waiting.push(ticket) }
                    }
                    2 if !going.is_empty() => {
                        let ticket = going.remove(0);
                        queue.leave(ticket);
                        done.push(ticket);
                    }
                    3 if !waiting.is_empty() => {
                        let ticket = waiting.remove(0);
                        queue.leave(ticket);
                    }
                    _ => {}
                }
                for ticket in queue.admit(memory) {
                    prop_assert!(waiting.contains(&ticket) && !going.contains(&ticket));
                    waiting.retain(|other| *other != ticket);
                    going.push(ticket);
                }
                prop_assert!(going.len() <= LIMITS.starts_max);
                prop_assert_eq!((queue.starting(), queue.waiting()), (going.len(), waiting.len()));
                prop_assert!(!going.is_empty() || waiting.is_empty(), "something always goes on");
            }
        }
    }
}
