use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// What a keeper has done since it began, and how it stands.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Numbers {
    /// Backups made.
    pub made: u64,
    /// Tries that failed.
    pub failed: u64,
    /// Backups that were broken off, because the project left or somebody
    /// asked.
    pub cancelled: u64,
    /// Bytes that were in the backups made.
    pub bytes: u64,
    /// Bytes that they added to repositories.
    pub added_bytes: u64,
    /// How long they took, in milliseconds, together.
    pub millis: u64,
    /// How many go on now.
    pub running: u64,
    /// How many projects have something that no backup has.
    pub pending: u64,
    /// How many of these have failed.
    pub failing: u64,
    /// For how long the oldest of that has been there.
    pub oldest: Duration,
    /// How long the longest overdue look has been due.
    pub overdue: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) made: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) added_bytes: AtomicU64,
    pub(super) millis: AtomicU64,
}

pub(super) fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn read(&self) -> Numbers {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Numbers {
            made: read(&self.made),
            failed: read(&self.failed),
            cancelled: read(&self.cancelled),
            bytes: read(&self.bytes),
            added_bytes: read(&self.added_bytes),
            millis: read(&self.millis),
            ..Numbers::default()
        }
    }
}
