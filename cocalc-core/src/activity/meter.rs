//! Where ingresses note what passes.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cocalc_ids::ProjectId;
use tokio::sync::watch;

use super::Source;
use crate::clock::Clock;

/// The meters of all projects of a host. Clones share them.
#[derive(Clone)]
pub struct Meters {
    clock: Arc<dyn Clock>,
    meters: Arc<Mutex<BTreeMap<ProjectId, Arc<State>>>>,
}

impl fmt::Debug for Meters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meters").finish_non_exhaustive()
    }
}

/// Notes the use of one project. Cheap to clone, and to use for every frame.
#[derive(Clone)]
pub struct Meter {
    clock: Arc<dyn Clock>,
    state: Arc<State>,
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter").finish_non_exhaustive()
    }
}

/// Milliseconds of the boot clock plus one, 0 for never.
#[derive(Debug)]
struct State {
    work: [AtomicU64; Source::ALL.len()],
    presence: [AtomicU64; Source::ALL.len()],
    warning: watch::Sender<Option<Warning>>,
}

/// A project is about to be stopped.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Warning {
    /// When, on the boot clock.
    pub at: Duration,
    /// Why, and what to do, in a sentence for its users.
    pub text: String,
}

/// What a movement of bytes says of a project's users.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Use {
    /// Somebody does something.
    Work,
    /// Something is open, or asks by itself.
    Presence,
}

/// Notes one kind of use of one project, whenever something moves.
#[derive(Clone, Debug)]
pub struct Tap {
    meter: Meter,
    source: Source,
    kind: Use,
}

impl Tap {
    /// Something has moved.
    pub fn moved(&self) {
        match self.kind {
            Use::Work => self.meter.worked(self.source),
            Use::Presence => self.meter.present(self.source),
        }
    }
}

/// What was noted since a project's meter was read last.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Noted {
    /// When each kind of work was last seen.
    pub work: Vec<(Source, Duration)>,
    /// The same of presence.
    pub presence: Vec<(Source, Duration)>,
}

impl Meters {
    /// None yet; times are of `clock`.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, meters: Arc::default() }
    }

    /// The meter of a project. Callers have authorized who uses it: a meter is
    /// made for every project that is asked for.
    pub fn meter(&self, project: ProjectId) -> Meter {
        let mut meters = self.lock();
        let state = meters.entry(project).or_insert_with(|| {
            Arc::new(State {
                work: [const { AtomicU64::new(0) }; Source::ALL.len()],
                presence: [const { AtomicU64::new(0) }; Source::ALL.len()],
                warning: watch::Sender::new(None),
            })
        });
        Meter { clock: Arc::clone(&self.clock), state: Arc::clone(state) }
    }

    /// Takes what was noted of a project.
    pub fn take(&self, project: ProjectId) -> Noted {
        let Some(state) = self.lock().get(&project).cloned() else { return Noted::default() };
        let read = |cells: &[AtomicU64]| {
            let seen =
                Source::ALL.iter().zip(cells).map(|(source, cell)| (*source, cell.swap(0, Ordering::AcqRel)));
            seen.filter(|(_, at)| *at > 0)
                .map(|(source, at)| (source, Duration::from_millis(at - 1)))
                .collect()
        };
        Noted { work: read(&state.work), presence: read(&state.presence) }
    }

    /// Warns the users of a project, or takes that back.
    pub fn warn(&self, project: ProjectId, warning: Option<Warning>) {
        let state = match warning {
            Some(_) => Some(self.meter(project).state),
            None => self.lock().get(&project).cloned(),
        };
        if let Some(state) = state {
            state.warning.send_if_modified(|now| {
                let changed = *now != warning;
                *now = warning;
                changed
            });
        }
    }

    /// Forgets a project, if nobody holds its meter.
    pub fn forget(&self, project: ProjectId) {
        let mut meters = self.lock();
        if meters.get(&project).is_some_and(|state| Arc::strong_count(state) == 1) {
            meters.remove(&project);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Arc<State>>> {
        self.meters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meter {
    /// Somebody does something.
    pub fn worked(&self, source: Source) {
        self.note(&self.state.work, source);
    }

    /// Something is open, or asks by itself.
    pub fn present(&self, source: Source) {
        self.note(&self.state.presence, source);
    }

    /// Notes this kind of use from now on.
    pub fn tap(&self, source: Source, kind: Use) -> Tap {
        Tap { meter: self.clone(), source, kind }
    }

    /// How long it is until the project is stopped, if its users are warned.
    pub fn stops_in(&self) -> Option<Duration> {
        let at = self.state.warning.borrow().as_ref()?.at;
        Some(at.saturating_sub(self.clock.boot()))
    }

    /// The warning that is in force, and those to come.
    pub fn warnings(&self) -> watch::Receiver<Option<Warning>> {
        self.state.warning.subscribe()
    }

    fn note(&self, cells: &[AtomicU64], source: Source) {
        let at = u64::try_from(self.clock.boot().as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let cell = Source::ALL.iter().zip(cells).find(|(one, _)| **one == source);
        if let Some((_, cell)) = cell {
            cell.fetch_max(at, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::clock::ManualClock;

    #[test]
    fn what_was_noted_is_taken_once_and_warnings_reach_who_is_there() {
        let clock = Arc::new(ManualClock::new(cocalc_ids::Timestamp::from_secs(1_800_000_000)));
        let meters = Meters::new(clock.clone());
        let project = ProjectId::random();
        let meter = meters.meter(project);
        assert_eq!(meters.take(project), Noted::default());
        clock.advance(Duration::from_secs(5));
        let at = clock.boot();
        meter.worked(Source::Ssh);
        meter.present(Source::Http);
        let noted = meters.take(project);
        assert_eq!((noted.work, noted.presence), (vec![(Source::Ssh, at)], vec![(Source::Http, at)]));
        assert_eq!(meters.take(project), Noted::default());

        let mut warnings = meter.warnings();
        assert_eq!(meter.stops_in(), None);
        let warning = Warning { at: at + Duration::from_secs(60), text: "soon".into() };
        meters.warn(project, Some(warning.clone()));
        assert!(warnings.has_changed().unwrap());
        assert_eq!(*warnings.borrow_and_update(), Some(warning));
        clock.advance(Duration::from_secs(20));
        assert_eq!(meter.stops_in(), Some(Duration::from_secs(40)));
        meters.warn(project, None);
        assert_eq!(meter.stops_in(), None);
        meters.forget(project);
        assert!(warnings.has_changed().is_ok(), "somebody holds it");
        drop(meter);
        meters.forget(project);
        assert!(warnings.has_changed().is_err());
    }
}
