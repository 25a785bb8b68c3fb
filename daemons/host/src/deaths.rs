//! Projects that end by themselves, again and again soon after their start.
//!
//! Nobody restarts a project that has ended; but whoever opens it wakes it, and a
//! page that asks every second would start it every second. So the more often it
//! has died in a row, the longer it is left alone. Who starts it by command does
//! so at once, and it begins anew: they will have mended it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cocalc_core::{
    activity,
    apps::Backoff,
    clock::Clock,
    ids::{ProjectId, Timestamp},
    runner::{State, Status},
};

/// How many projects are known at most; beyond, those of the longest ago go.
const MOST: usize = 10_000;

/// Who has died. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Deaths {
    clock: Arc<dyn Clock>,
    known: Arc<Mutex<BTreeMap<ProjectId, Death>>>,
}

#[derive(Clone, Debug)]
struct Death {
    backoff: Backoff,
    /// Of which run.
    started: Option<Timestamp>,
    /// When it was seen, on the boot clock.
    at: Duration,
}

impl Deaths {
    /// None are known; ages are by `clock`.
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, known: Arc::default() }
    }

    /// What the runner says of a project: one that has ended by itself is counted,
    /// once for each run. May be called as often as one likes.
    pub(crate) fn seen(&self, status: &Status) {
        if status.state != State::Stopped || status.reason.is_none() || status.started.is_none() {
            return;
        }
        let now = self.clock.boot();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.get(&status.project).is_some_and(|death| death.started == status.started) {
            return;
        }
        if known.len() >= MOST
            && let Some(oldest) = known.iter().min_by_key(|(_, death)| death.at).map(|(project, _)| *project)
        {
            known.remove(&oldest);
        }
        // When it died is not known better than this.
        let ran = status.started.map_or(Duration::ZERO, |started| self.clock.wall().since(started));
        let death = known.entry(status.project).or_insert_with(|| Death {
            backoff: Backoff::default(),
            started: None,
            at: now,
        });
        death.backoff.failed(ran, now);
        (death.started, death.at) = (status.started, now);
    }

    /// It is gone, or was stopped by command.
    pub(crate) fn forget(&self, project: ProjectId) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&project);
    }

    /// It is started. While it is left alone nobody wakes it, so that is somebody's
    /// own wish, and what was before is past.
    pub(crate) fn asked_for(&self, status: &Status) {
        if self.wait(status).is_some() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(death) = known.get_mut(&status.project) {
                // Not forgotten: this run has been counted.
                death.backoff.reset();
            }
        }
    }

    /// How many projects die again and again.
    pub(crate) fn loops(&self) -> usize {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().filter(|death| death.backoff.is_loop()).count()
    }

    /// Why a project is left alone for now: how often it has died, of what, and
    /// when it may be woken again. `None`: it may be.
    pub(crate) fn wait(&self, status: &Status) -> Option<String> {
        self.seen(status);
        let now = self.clock.boot();
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let death = known.get(&status.project)?;
        if status.state != State::Stopped || !death.backoff.is_loop() {
            return None;
        }
        let wait = death.backoff.wait(now)?;
        let millis = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let next = Timestamp::from_millis(self.clock.wall().millis().saturating_add(millis));
        Some(format!(
            "it has ended by itself {} times in a row, soon after its start: {}; it is not woken before {}, but \
             `cocalc project start {}` starts it at once",
            death.backoff.failures(),
            status.reason.as_deref().unwrap_or("nobody knows why"),
            activity::time(next),
            status.project,
        ))
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::clock::SystemClock;

    use super::*;

    #[test]
    fn who_dies_again_and_again_is_left_alone_and_told_until_when() {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let deaths = Deaths::new(Arc::clone(&clock));
        let project = ProjectId::from_bytes([1; 16]);
        let now = clock.wall().millis();
        let dead = |started: i64| Status {
            project,
            epoch: None,
            state: State::Stopped,
            started: Some(Timestamp::from_millis(started)),
            reason: Some("its first process ended with code 3".into()),
        };
        for run in 0..2 {
            assert_eq!(deaths.wait(&dead(now - 10 + run)), None, "that may happen");
        }
        let loops = dead(now - 1);
        let said = deaths.wait(&loops).unwrap();
        assert!(said.contains("3 times in a row") && said.contains("code 3"), "{said}");
        assert_eq!(deaths.wait(&loops).map(|_| deaths.loops()), Some(1), "the same run counts once");
        let again = deaths.wait(&loops).unwrap();
        assert!(again.contains("3 times"), "{again}");
        assert_eq!(deaths.wait(&Status { state: State::Running, ..loops.clone() }), None);
        // Started by command it begins anew, and this run is not counted again.
        deaths.asked_for(&loops);
        assert_eq!((deaths.wait(&loops), deaths.loops()), (None, 0));
        for run in 0..2 {
            assert_eq!(deaths.wait(&dead(now + run)), None);
        }
        assert!(deaths.wait(&dead(now + 2)).is_some_and(|said| said.contains("3 times")));
        deaths.asked_for(&Status { state: State::Running, ..dead(now + 2) });
        assert_eq!(deaths.loops(), 1, "one that runs is not started");
        deaths.forget(project);
        assert_eq!(deaths.wait(&Status { reason: None, ..loops.clone() }), None, "it was stopped");
        // One that has run for long begins anew.
        for run in 0..5 {
            assert_eq!(deaths.wait(&dead(now - 3_600_000 - run)), None);
        }
    }
}
