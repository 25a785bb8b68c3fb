//! The contract suite of `cocalc_core::storage`.
//!
//! A backend's own test makes a [`Harness`] around two of its stores, which
//! stand for two hosts, and calls [`storage`]; a model-based test runs
//! [`scripts`] with [`agrees_with_model`].
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! use cocalc_testkit::storage::{MemoryHarness, storage};
//!
//! storage(&MemoryHarness::new()).await;
//! # }
//! ```

mod harness;
mod model;
mod promises;
mod streams;

pub use harness::{FilesHarness, Harness, Host, MemoryHarness, Tree};
pub use model::{Op, agrees_with_model, scripts};

/// Checks every promise of the contract, and panics with the first that is
/// broken. The stores may hold other projects; these are left alone.
pub async fn storage(harness: &dyn Harness) {
    promises::volumes(harness).await;
    promises::snapshots(harness).await;
    promises::restores(harness).await;
    promises::set_aside(harness).await;
    promises::clones(harness).await;
    promises::isolation(harness).await;
    promises::limits(harness).await;
    streams::whole(harness).await;
    streams::deltas(harness).await;
    streams::refused(harness).await;
    streams::broken(harness).await;
    streams::cancelled(harness).await;
}
