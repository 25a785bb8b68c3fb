//! The contract suite of `cocalc_core::storage`: named [`PROPERTIES`], each a
//! promise of the contract.
//!
//! A backend's own test makes a [`Harness`] around two of its stores, which
//! stand for two hosts, and calls [`storage`]; a model-based test runs
//! [`scripts`], and the [`regressions`], with [`agrees_with_model`]. What a backend says it can do
//! ([`Capabilities`](cocalc_core::storage::Capabilities)) chooses the properties
//! that are checked, and each claim is one of these.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! use cocalc_testkit::storage::{MemoryHarness, storage};
//!
//! storage(&MemoryHarness::new()).await;
//! # }
//! ```

mod files;
mod harness;
mod hostile;
mod model;
mod outside;
mod posix;
mod power;
mod promises;
mod properties;
mod sharing;
mod space;
mod streams;
mod truth;
mod zoo;

pub use harness::{FilesHarness, Harness, Host, MemoryHarness, Tree};
pub use model::{Op, Spot, agrees_with_model, regressions, scripts};
pub use properties::{PROPERTIES, Property, Report, examine};
pub use zoo::{disturb, manifest, plant, set_time};

/// Checks every property of the contract that the backend's capabilities ask
/// for, and panics with the names of those that are broken. The stores may
/// hold other projects; these are left alone.
pub async fn storage(harness: &dyn Harness) {
    let report = examine(harness, |_| true).await;
    assert!(report.broken.is_empty(), "{report}");
}
