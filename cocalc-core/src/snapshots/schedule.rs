//! Which project is due for a look. Pure: events and the boot clock in,
//! projects out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use cocalc_ids::ProjectId;

/// How long until a failed look is repeated, at first; each time twice as
/// long, up to the project's interval, and to [`AGAIN_MAX`].
const AGAIN_MIN: Duration = Duration::from_secs(30);
/// And how long at most: what was out of reach may be back.
const AGAIN_MAX: Duration = Duration::from_secs(900);

/// When each project is due.
///
/// Every project has its own phase within the interval, taken from its id, so
/// that thousands of them are spread over it, and stay spread: whatever it
/// missed, a project is looked at once, and next at its own time. The longest
/// overdue come first, so none is passed over for ever.
#[derive(Clone, Debug, Default)]
pub struct Schedule {
    projects: BTreeMap<ProjectId, Slot>,
    /// Those that wait, by when they are due. What is being looked at is not in.
    queue: BTreeSet<(Duration, ProjectId)>,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    interval: Duration,
    due: Duration,
    /// Whether it stays after the next look that ends well.
    running: bool,
    failures: u32,
    /// Whether somebody asked for a look while it was being looked at.
    again: bool,
}

/// How a look ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Everything is as it should be.
    Done,
    /// It is to be tried again soon.
    Failed,
}

impl Schedule {
    /// Expects changes in a project: it is looked at once in every interval.
    /// Another interval than before counts from now on.
    pub fn runs(&mut self, project: ProjectId, interval: Duration, now: Duration) {
        let interval = interval.max(Duration::from_secs(1));
        if let Some(slot) = self.projects.get_mut(&project) {
            slot.running = true;
            if slot.interval == interval {
                return;
            }
        }
        let due = next(project, interval, now);
        self.put(project, Slot { interval, due, running: true, failures: 0, again: false });
    }

    /// Expects no further changes: a last look, then none.
    pub fn rests(&mut self, project: ProjectId, interval: Duration, now: Duration) {
        match self.projects.get_mut(&project) {
            Some(slot) => slot.running = false,
            None => {
                let interval = interval.max(Duration::from_secs(1));
                let due = next(project, interval, now);
                self.put(project, Slot { interval, due, running: false, failures: 0, again: false });
            }
        }
    }

    /// Looks at a project that it knows as soon as it can; and once more if it
    /// is being looked at right now.
    pub fn at_once(&mut self, project: ProjectId, now: Duration) {
        let Some(mut slot) = self.projects.get(&project).copied() else { return };
        if self.queue.contains(&(slot.due, project)) {
            slot.due = slot.due.min(now);
            self.put(project, slot);
        } else if let Some(slot) = self.projects.get_mut(&project) {
            slot.again = true;
        }
    }

    /// Takes a project out.
    pub fn forget(&mut self, project: ProjectId) {
        if let Some(slot) = self.projects.remove(&project) {
            self.queue.remove(&(slot.due, project));
        }
    }

    /// Those that are expected to change.
    pub fn running(&self) -> impl Iterator<Item = ProjectId> {
        self.projects.iter().filter(|(_, slot)| slot.running).map(|(project, _)| *project)
    }

    /// At most `max` that are due, the longest overdue first. Each is out of
    /// the line until [`done`](Self::done) is told how it went.
    pub fn due(&mut self, now: Duration, max: usize) -> Vec<ProjectId> {
        let due: Vec<_> = self.queue.iter().take_while(|(due, _)| *due <= now).take(max).copied().collect();
        for key in &due {
            self.queue.remove(key);
        }
        due.into_iter().map(|(_, project)| project).collect()
    }

    /// Hears how the look at a project went.
    pub fn done(&mut self, project: ProjectId, outcome: Outcome, now: Duration) {
        let Some(mut slot) = self.projects.get(&project).copied() else { return };
        match outcome {
            Outcome::Done if std::mem::take(&mut slot.again) => (slot.due, slot.failures) = (now, 0),
            Outcome::Done if !slot.running => {
                self.forget(project);
                return;
            }
            // One that was late is not looked at again at once.
            Outcome::Done => {
                (slot.due, slot.failures) = (next(project, slot.interval, now + slot.interval / 2), 0);
            }
            Outcome::Failed => {
                let pause = AGAIN_MIN.saturating_mul(1 << slot.failures.min(16));
                slot.due = now + pause.min(slot.interval).min(AGAIN_MAX);
                slot.failures = slot.failures.saturating_add(1);
            }
        }
        self.put(project, slot);
    }

    /// How long the longest overdue project has been due.
    pub fn overdue(&self, now: Duration) -> Duration {
        self.queue.first().map_or(Duration::ZERO, |(due, _)| now.saturating_sub(*due))
    }

    /// How many projects it knows.
    pub fn len(&self) -> usize {
        self.projects.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.projects.is_empty()
    }

    fn put(&mut self, project: ProjectId, slot: Slot) {
        if let Some(before) = self.projects.insert(project, slot) {
            self.queue.remove(&(before.due, project));
        }
        self.queue.insert((slot.due, project));
    }
}

/// The first time after `now` in the project's own phase.
fn next(project: ProjectId, interval: Duration, now: Duration) -> Duration {
    let interval = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX).max(1);
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let mut tail = [0; 8];
    // The last bytes of an id are random in every version in use.
    tail.copy_from_slice(&project.as_bytes()[8..]);
    let phase = u64::from_be_bytes(tail) % interval;
    let begun = now - now % interval;
    let at = begun.saturating_add(phase);
    Duration::from_millis(if at > now { at } else { at.saturating_add(interval) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(900);

    fn id(n: u64) -> ProjectId {
        // Spread as random ids are, and the same in every run.
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        bytes[8..].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        ProjectId::from_random_bytes(bytes)
    }

    #[test]
    fn five_thousand_projects_do_not_fire_at_once() {
        let mut schedule = Schedule::default();
        let begun = Duration::from_secs(12_345);
        for n in 0..5_000 {
            schedule.runs(id(n), INTERVAL, begun);
        }
        let mut looks: BTreeMap<ProjectId, Vec<Duration>> = BTreeMap::new();
        for second in 1..=2_700 {
            let now = begun + Duration::from_secs(second);
            let due = schedule.due(now, 1_000);
            assert!(due.len() <= 40, "{} at once; the mean is 5.6", due.len());
            for project in due {
                looks.entry(project).or_default().push(now);
                schedule.done(project, Outcome::Done, now);
            }
        }
        assert_eq!(looks.len(), 5_000);
        assert!(looks.values().all(|at| at.len() == 3), "once in each interval");
    }

    #[test]
    fn after_a_sleep_each_is_looked_at_once_and_the_work_is_bounded() {
        let mut schedule = Schedule::default();
        for n in 0..1_000 {
            schedule.runs(id(n), INTERVAL, Duration::ZERO);
        }
        let mut now = Duration::from_secs(7 * 86_400);
        assert!(schedule.overdue(now) > Duration::from_secs(6 * 86_400));
        let mut seen = BTreeSet::new();
        for _ in 0..63 {
            now += Duration::from_millis(10);
            let due = schedule.due(now, 16);
            assert!(due.len() <= 16);
            for project in due {
                assert!(seen.insert(project), "twice");
                schedule.done(project, Outcome::Done, now);
            }
        }
        assert_eq!(seen.len(), 1_000);
        assert_eq!(schedule.overdue(now), Duration::ZERO);
    }

    #[test]
    fn what_fails_is_tried_soon_and_then_less_often() {
        let mut schedule = Schedule::default();
        schedule.runs(id(1), INTERVAL, Duration::ZERO);
        let mut now = INTERVAL;
        let mut pauses = Vec::new();
        assert_eq!(schedule.due(now, 1), [id(1)]);
        for _ in 0..7 {
            schedule.done(id(1), Outcome::Failed, now);
            let begun = now;
            while schedule.due(now, 1).is_empty() {
                now += Duration::from_secs(1);
            }
            pauses.push((now - begun).as_secs());
        }
        assert_eq!(pauses, [30, 60, 120, 240, 480, 900, 900]);
    }

    #[test]
    fn who_rests_is_looked_at_once_more_unless_it_runs_again() {
        let mut schedule = Schedule::default();
        let now = INTERVAL * 2;
        schedule.rests(id(1), INTERVAL, Duration::ZERO);
        assert_eq!(schedule.due(now, 9), [id(1)]);
        // Begins to run while it is being looked at.
        schedule.runs(id(1), INTERVAL, now);
        schedule.done(id(1), Outcome::Done, now);
        assert_eq!(schedule.len(), 1);
        schedule.rests(id(1), INTERVAL, now);
        let later = now + INTERVAL * 2;
        assert_eq!(schedule.due(later, 9), [id(1)]);
        schedule.done(id(1), Outcome::Done, later);
        assert!(schedule.is_empty() && schedule.due(later * 10, 9).is_empty());
    }

    #[derive(Clone, Debug)]
    enum Event {
        Runs(u64, u64),
        Rests(u64),
        Forget(u64),
        Tick(u64, usize, bool),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            (0_u64..20, 60_u64..2_000).prop_map(|(n, secs)| Event::Runs(n, secs)),
            (0_u64..20).prop_map(Event::Rests),
            (0_u64..20).prop_map(Event::Forget),
            (0_u64..5_000, 1_usize..5, any::<bool>()).prop_map(|(by, max, well)| Event::Tick(by, max, well)),
        ];
        proptest::collection::vec(event, 0..200)
    }

    proptest! {
        #[test]
        fn whatever_happens_nobody_waits_for_ever(events in events()) {
            let mut schedule = Schedule::default();
            let mut now = Duration::from_secs(1_000);
            let mut known = BTreeSet::new();
            for event in events {
                match event {
                    Event::Runs(n, secs) => {
                        schedule.runs(id(n), Duration::from_secs(secs), now);
                        known.insert(id(n));
                    }
                    Event::Rests(n) => {
                        schedule.rests(id(n), INTERVAL, now);
                        known.insert(id(n));
                    }
                    Event::Forget(n) => {
                        schedule.forget(id(n));
                        known.remove(&id(n));
                    }
                    Event::Tick(by, max, well) => {
                        now += Duration::from_secs(by);
                        let due = schedule.due(now, max);
                        prop_assert!(due.len() <= max);
                        for project in due {
                            prop_assert!(known.contains(&project), "one that is not wanted");
                            schedule.done(project, if well { Outcome::Done } else { Outcome::Failed }, now);
                        }
                    }
                }
            }
            // All that it still has are looked at in a bounded number of ticks.
            let wanted: BTreeSet<_> = schedule.projects.keys().copied().collect();
            now += Duration::from_secs(4_000);
            let mut seen = BTreeSet::new();
            for _ in 0..wanted.len().div_ceil(3) {
                for project in schedule.due(now, 3) {
                    seen.insert(project);
                    schedule.done(project, Outcome::Done, now);
                }
            }
            prop_assert_eq!(seen, wanted);
        }
    }
}
