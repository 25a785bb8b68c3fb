//! One lock per project, so that its changing calls happen one after another.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use cocalc_core::ids::ProjectId;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Unused entries are dropped when there are this many.
const SWEEP_AT: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<HashMap<ProjectId, Weak<AsyncMutex<()>>>>);

impl Locks {
    /// Waits for the project's turn. The guard goes into the blocking task, so
    /// that a dropped call keeps its turn until it has physically ended.
    pub(crate) async fn lock(&self, project: ProjectId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if locks.len() >= SWEEP_AT {
                locks.retain(|_, lock| lock.strong_count() > 0);
            }
            let entry = locks.entry(project).or_default();
            entry.upgrade().unwrap_or_else(|| {
                let lock = Arc::new(AsyncMutex::new(()));
                *entry = Arc::downgrade(&lock);
                lock
            })
        };
        lock.lock_owned().await
    }
}
