//! Bringing projects up again after a reboot: one first, as a canary, then a
//! few at a time. Pure.
//!
//! If what broke the machine comes up with the first project, or the runner
//! itself is broken, one project has been tried and not a thousand.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use cocalc_ids::ProjectId;

/// How a [`Wave`] goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct WaveSettings {
    /// How many at once, after the canary; at least 1.
    pub at_once: usize,
    /// After so many failures in a row it is back to canaries; at least 1.
    pub failures_max: u32,
    /// How long to wait after a canary that failed; twice as long after each
    /// further one.
    pub pause: Duration,
    /// And at most so long.
    pub pause_max: Duration,
}

impl Default for WaveSettings {
    fn default() -> Self {
        Self {
            at_once: 4,
            failures_max: 3,
            pause: Duration::from_secs(2),
            pause_max: Duration::from_secs(60),
        }
    }
}

/// Projects that are to come up, each once.
#[derive(Clone, Debug)]
pub struct Wave {
    settings: WaveSettings,
    left: VecDeque<ProjectId>,
    going: BTreeSet<ProjectId>,
    /// Whether a canary has lived.
    open: bool,
    failures: u32,
    /// Not before this time, on the caller's clock.
    not_before: Duration,
}

impl Wave {
    /// Begins with these, in this order.
    pub fn new(projects: impl IntoIterator<Item = ProjectId>, settings: WaveSettings) -> Self {
        Self {
            settings,
            left: projects.into_iter().collect(),
            going: BTreeSet::new(),
            open: false,
            failures: 0,
            not_before: Duration::ZERO,
        }
    }

    /// The projects to start now; `now` is any clock that only goes forward.
    pub fn next(&mut self, now: Duration) -> Vec<ProjectId> {
        if now < self.not_before {
            return Vec::new();
        }
        let at_once = if self.open { self.settings.at_once.max(1) } else { 1 };
        let mut begun = Vec::new();
        while self.going.len() < at_once {
            let Some(project) = self.left.pop_front() else { break };
            self.going.insert(project);
            begun.push(project);
        }
        begun
    }

    /// One has come up, or has not.
    pub fn ended(&mut self, project: ProjectId, well: bool, now: Duration) {
        if !self.going.remove(&project) {
            return;
        }
        if well {
            (self.open, self.failures, self.not_before) = (true, 0, Duration::ZERO);
            return;
        }
        self.failures = self.failures.saturating_add(1);
        if !self.open || self.failures >= self.settings.failures_max.max(1) {
            self.open = false;
            let doublings = self.failures.saturating_sub(1).min(16);
            let pause = self.settings.pause.saturating_mul(1 << doublings).min(self.settings.pause_max);
            self.not_before = now.saturating_add(pause);
        }
    }

    /// When to ask again, if nothing is under way; `None` when all have been
    /// tried.
    pub fn wakes(&self) -> Option<Duration> {
        (!self.left.is_empty()).then_some(self.not_before)
    }

    /// Whether all have been tried.
    pub fn is_over(&self) -> bool {
        self.left.is_empty() && self.going.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn projects(count: u8) -> Vec<ProjectId> {
        (0..count).map(|id| ProjectId::from_bytes([id; 16])).collect()
    }

    const SEC: Duration = Duration::from_secs(1);

    #[test]
    fn a_canary_first_and_then_a_few_at_a_time() {
        let all = projects(7);
        let mut wave = Wave::new(all.clone(), WaveSettings::default());
        assert_eq!(wave.next(SEC), all[..1]);
        assert_eq!(wave.next(SEC), [], "the canary is not up");
        wave.ended(all[0], true, SEC);
        assert_eq!(wave.next(SEC), all[1..5]);
        wave.ended(all[2], true, SEC);
        assert_eq!(wave.next(SEC), [all[5]]);
        for project in &all {
            wave.ended(*project, true, SEC);
        }
        assert_eq!(wave.next(SEC), [all[6]]);
        assert!(!wave.is_over());
        wave.ended(all[6], true, SEC);
        assert!(wave.is_over() && wave.wakes().is_none());
    }

    #[test]
    fn a_canary_that_dies_holds_the_others_back_longer_and_longer() {
        let all = projects(20);
        let mut wave = Wave::new(all.clone(), WaveSettings::default());
        let mut now = SEC;
        let mut tried = 0;
        for pause in [2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(wave.next(now), [all[tried]]);
            wave.ended(all[tried], false, now);
            tried += 1;
            assert_eq!(wave.next(now + SEC * (pause - 1)), []);
            assert_eq!(wave.wakes(), Some(now + SEC * pause));
            now += SEC * pause;
        }
        assert_eq!(wave.next(now), [all[tried]]);
        wave.ended(all[tried], true, now);
        assert_eq!(wave.next(now).len(), 4, "one lives: the rest may come");
    }

    #[test]
    fn failures_in_a_row_close_it_again() {
        let all = projects(20);
        let mut wave = Wave::new(all.clone(), WaveSettings::default());
        wave.next(SEC);
        wave.ended(all[0], true, SEC);
        let going = wave.next(SEC);
        for project in &going[..3] {
            wave.ended(*project, false, SEC);
        }
        assert_eq!(wave.next(SEC), []);
        assert_eq!(wave.next(SEC * 100), [], "one still goes on");
        wave.ended(going[3], false, SEC);
        assert_eq!(wave.next(SEC * 100).len(), 1);
    }

    proptest! {
        #[test]
        fn each_is_tried_once_and_never_more_at_a_time(
            outcomes in proptest::collection::vec(any::<bool>(), 0..60),
            at_once in 1usize..8,
        ) {
            let count = u8::try_from(outcomes.len()).unwrap();
            let settings = WaveSettings { at_once, ..WaveSettings::default() };
            let mut wave = Wave::new(projects(count), settings);
            let (mut now, mut going, mut tried) = (SEC, VecDeque::new(), 0);
            while !wave.is_over() {
                let begun = wave.next(now);
                tried += begun.len();
                going.extend(begun);
                prop_assert!(going.len() <= at_once);
                match going.pop_front() {
                    Some(project) => {
                        let well = outcomes[usize::from(project.as_bytes()[0])];
                        wave.ended(project, well, now);
                    }
                    None => now = wave.wakes().unwrap(),
                }
            }
            prop_assert_eq!(tried, outcomes.len());
        }
    }
}
