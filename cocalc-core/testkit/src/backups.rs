//! The contract suite of `cocalc_core::backups`.
//!
//! A backend's own test calls [`backups`] with one that holds nothing of the
//! projects that the suite makes up, and a directory for trees, on a file
//! system with owners, extended attributes and devices; so it runs as root.
//! [`essentials`] is the part that shows that data arrive and return, for
//! places that differ only in where bytes are kept.

mod promises;
mod zoo;

use std::path::Path;

use cocalc_core::backups::Backups;

pub use promises::Subject;
pub use zoo::{Facts, differences, edit, facts, plant};

/// Checks every promise of the contract, and panics with the first that is
/// broken.
pub async fn backups(backups: &dyn Backups, scratch: &Path) {
    let subject = Subject::new(backups, scratch);
    promises::identity(&subject).await;
    promises::what_volumes_hold(&subject).await;
    promises::one_path(&subject).await;
    promises::browsing(&subject).await;
    promises::incremental_is_full(&subject).await;
    promises::moved(&subject).await;
    promises::wrong_clocks(&subject).await;
    promises::excludes(&subject).await;
    promises::isolation(&subject).await;
    promises::refusals(&subject).await;
    promises::together(&subject).await;
    promises::forgetting(&subject).await;
    promises::pruned_while_backing_up(&subject).await;
    promises::cancelled(&subject).await;
    promises::erased(&subject).await;
}

/// Checks that what is backed up returns, beside others and a prune, and that
/// it can be erased.
pub async fn essentials(backups: &dyn Backups, scratch: &Path) {
    let subject = Subject::new(backups, scratch);
    promises::identity(&subject).await;
    promises::together(&subject).await;
    promises::forgetting(&subject).await;
    promises::erased(&subject).await;
}
