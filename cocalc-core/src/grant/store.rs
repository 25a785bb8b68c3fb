//! Where a ledger is kept.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use cocalc_ids::ProjectId;

use super::Entry;
use crate::BoxError;

/// Keeps the entries of a host's ledger.
///
/// # Contract
///
/// - When `save` returns `Ok`, the entry survives a loss of power; when it
///   fails or is cut off, the old entry or the new one is kept, whole.
/// - One process at a time.
#[async_trait]
pub trait LedgerStore: fmt::Debug + Send + Sync + 'static {
    /// Every entry, ordered by project.
    async fn load(&self) -> Result<Vec<Entry>, BoxError>;

    /// Keeps `entry` in the place of what was known of its project.
    async fn save(&self, entry: &Entry) -> Result<(), BoxError>;
}

/// A ledger store for tests. It outlives the [`Ledger`](super::Ledger) that
/// uses it, as a disk outlives a process.
#[derive(Debug, Default)]
pub struct MemoryLedgerStore(Mutex<BTreeMap<ProjectId, Entry>>);

#[async_trait]
impl LedgerStore for MemoryLedgerStore {
    async fn load(&self) -> Result<Vec<Entry>, BoxError> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect())
    }

    async fn save(&self, entry: &Entry) -> Result<(), BoxError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(entry.project, entry.clone());
        Ok(())
    }
}
