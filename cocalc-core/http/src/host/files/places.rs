//! Who may have how much at a time of what takes long.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cocalc_core::ids::ProjectId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// How long [`Places::soon`] waits for others.
const TURN: Duration = Duration::from_secs(10);

/// Places for something that is done a few times at once, of which one project
/// gets a part only.
#[derive(Debug)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    of_one: usize,
    by_project: Mutex<BTreeMap<ProjectId, Arc<Semaphore>>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Held {
    _one: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Places {
    pub(super) fn new(all: usize, of_one: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), of_one, by_project: Mutex::default() }
    }

    fn own(&self, project: ProjectId) -> Arc<Semaphore> {
        let mut known = self.by_project.lock().unwrap_or_else(PoisonError::into_inner);
        // Who waits or holds a place has one of them, too.
        known.retain(|other, places| *other == project || Arc::strong_count(places) > 1);
        let new = || Arc::new(Semaphore::new(self.of_one));
        Arc::clone(known.entry(project).or_insert_with(new))
    }

    pub(super) fn now(&self, project: ProjectId) -> Option<Held> {
        let one = self.own(project).try_acquire_owned().ok()?;
        Some(Held { _one: one, _all: Arc::clone(&self.all).try_acquire_owned().ok()? })
    }

    /// Waits, but not for long. Its own others first: who waits for those keeps
    /// no place from anybody else.
    pub(super) async fn soon(&self, project: ProjectId) -> Option<Held> {
        let places = async {
            let one = self.own(project).acquire_owned().await.ok()?;
            Some(Held { _one: one, _all: Arc::clone(&self.all).acquire_owned().await.ok()? })
        };
        timeout(TURN, places).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_project_takes_a_part_of_the_places_only() {
        let places = Places::new(3, 2);
        let (greedy, other, third) = (ProjectId::random(), ProjectId::random(), ProjectId::random());
        let first = places.now(greedy).unwrap();
        let _second = places.now(greedy).unwrap();
        assert!(places.now(greedy).is_none() && places.soon(greedy).await.is_none());
        let last = places.now(other).unwrap();
        assert!(places.soon(third).await.is_none(), "there are three in all");
        let waiting = places.soon(third);
        drop(last);
        let held = waiting.await.unwrap();
        drop((first, held));
        assert!(places.now(other).is_some());
        assert!(places.by_project.lock().unwrap().len() <= 3);
    }
}
