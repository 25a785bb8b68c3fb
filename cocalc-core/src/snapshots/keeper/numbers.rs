//! What a keeper has done, for metrics.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// What a keeper has done since it began, and how it stands.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Numbers {
    /// Automatic snapshots taken.
    pub taken: u64,
    /// Automatic snapshots deleted.
    pub deleted: u64,
    /// Looks at a project that failed.
    pub failed: u64,
    /// How long the longest overdue project has been due.
    pub overdue: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    taken: AtomicU64,
    deleted: AtomicU64,
    failed: AtomicU64,
}

impl Counters {
    pub(super) fn taken(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn deleted(&self) {
        self.deleted.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, overdue: Duration) -> Numbers {
        Numbers {
            taken: self.taken.load(Ordering::Relaxed),
            deleted: self.deleted.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            overdue,
        }
    }
}
