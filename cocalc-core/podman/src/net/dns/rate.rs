//! How much a project asks: the servers are its neighbours', too, and so are the
//! descriptors of this process.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// How many questions of one project are asked on per second, if its host says
/// nothing. A page of a browser asks a few dozen.
pub(crate) const QUESTIONS_PER_SEC: u32 = 100;
/// For how many seconds' worth of them there is room at once, after a pause.
const BURST_SECS: u32 = 5;
/// How many questions of one project wait for their answers.
pub(super) const QUESTIONS_MAX: usize = 64;
/// From so many of all projects on a project has a few only, so that those that ask
/// servers which do not answer leave something to the others.
const ALL_MAX: usize = 1024;
const FEW: usize = 4;
/// How often it is said of a project that questions of it are dropped.
const TOLD: Duration = Duration::from_secs(60);

/// How often a project asks: a bucket that fills evenly.
#[derive(Debug)]
pub(super) struct Rate {
    per_sec: u32,
    left: f64,
    at: Instant,
    dropped: u64,
    told: Option<Instant>,
}

impl Rate {
    pub(super) fn new(per_sec: u32, now: Instant) -> Self {
        let mut rate = Self { per_sec, left: 0.0, at: now, dropped: 0, told: None };
        rate.left = rate.most();
        rate
    }

    fn most(&self) -> f64 {
        f64::from(self.per_sec) * f64::from(BURST_SECS)
    }

    /// Whether one more may be asked.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.left = (self.left + passed * f64::from(self.per_sec)).min(self.most());
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }

    /// Hears that a question was dropped; how many were since it was said last, if
    /// it is time to say so.
    pub(super) fn dropped(&mut self, now: Instant) -> Option<u64> {
        self.dropped += 1;
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < TOLD) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.dropped))
    }
}

/// One of the questions that wait for their answers.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    own: &'a AtomicUsize,
    all: &'a AtomicUsize,
}

impl<'a> Waiting<'a> {
    /// One more of a project and of all, if there may be.
    pub(super) fn begin(own: &'a AtomicUsize, all: &'a AtomicUsize) -> Option<Self> {
        let before = (own.fetch_add(1, Ordering::Relaxed), all.fetch_add(1, Ordering::Relaxed));
        // Whatever becomes of it, it counts until it is dropped.
        let one = Self { own, all };
        let most = if before.1 < ALL_MAX { QUESTIONS_MAX } else { FEW };
        (before.0 < most).then_some(one)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.own.fetch_sub(1, Ordering::Relaxed);
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_that_asks_all_the_time_is_slowed_down_and_others_are_not() {
        let begun = Instant::now();
        let (mut busy, mut calm) = (Rate::new(100, begun), Rate::new(100, begun));
        let answered = (0..10_000).filter(|n| busy.take(begun + Duration::from_millis(*n))).count();
        assert!((1_400..=1_510).contains(&answered), "{answered} in ten seconds");
        assert!((0..50).all(|n| calm.take(begun + Duration::from_millis(n * 20))));
        // A pause of any length is worth no more than the burst; time that goes back, nothing.
        let later = begun + Duration::from_secs(86_400);
        assert_eq!((0..10_000).filter(|_| busy.take(later)).count(), 500);
        assert!((0..100).all(|n| !busy.take(begun + Duration::from_secs(n))));
        assert!(!busy.take(later), "nor is the same time counted twice");
    }

    #[test]
    fn it_is_said_once_a_minute_how_many_were_dropped() {
        let begun = Instant::now();
        let mut rate = Rate::new(1, begun);
        let said: Vec<u64> = (0..150).filter_map(|n| rate.dropped(begun + Duration::from_secs(n))).collect();
        assert_eq!(said, [1, 60, 60]);
    }

    #[test]
    fn few_wait_of_each_project_when_many_wait_of_all() {
        let (all, busy, other) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let held: Vec<_> = (0..100).filter_map(|_| Waiting::begin(&busy, &all)).collect();
        assert_eq!(held.len(), QUESTIONS_MAX);
        let many: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        let theirs: Vec<_> = many
            .iter()
            .flat_map(|own| (0..QUESTIONS_MAX).map(move |_| own))
            .filter_map(|own| Waiting::begin(own, &all))
            .collect();
        assert!(theirs.len() < ALL_MAX + 100 * FEW, "{}", theirs.len());
        let few: Vec<_> = (0..100).filter_map(|_| Waiting::begin(&other, &all)).collect();
        assert_eq!(few.len(), FEW, "something is left to each");
        drop((theirs, held));
        assert_eq!((0..100).filter_map(|_| Waiting::begin(&other, &all)).count(), 100, "one after the other");
        drop(few);
        assert_eq!((all.into_inner(), busy.into_inner(), other.into_inner()), (0, 0, 0));
    }
}
