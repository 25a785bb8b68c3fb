//! What a host may run: epochs, grants, freezes and reservations.
//!
//! A host runs a project, or writes its files, only while
//! [`Entry::may_run`] names an epoch: it durably holds that grant, has not
//! frozen it, and has seen no higher one. [`Entry`] is the pure part: each
//! transition either brings about a state or refuses, and may be repeated.
//! [`Ledger`] keeps the entries of one host, and saves each change through a
//! [`LedgerStore`] before anybody can see it.
//!
//! ```
//! use std::sync::Arc;
//! use cocalc_core::{grant::{Ledger, MemoryLedgerStore}, control::ProjectConfig};
//! use cocalc_ids::{Epoch, HostId, ProjectId};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await?;
//! let project = ProjectId::random();
//! ledger.create(project, Epoch::FIRST, ProjectConfig::default()).await?;
//! assert!(ledger.permit(project, Epoch::FIRST).is_ok());
//! assert!(ledger.permit(project, Epoch::FIRST.next()).is_err());
//! # Ok(()) }
//! ```

mod entry;
mod ledger;
mod orphans;
mod store;

pub use entry::{Entry, Frozen, MovedTo, Refusal, Reservation};
pub use ledger::{Ledger, LedgerError};
pub use orphans::sweep as sweep_orphans;
pub use store::{LedgerStore, MemoryLedgerStore};
