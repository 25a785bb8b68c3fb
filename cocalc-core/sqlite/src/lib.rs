//! SQLite stores of CoCalc: the master's, and a host's.
//!
//! Each store is one file, opened by one process. This crate is not a general
//! database layer: what a store can do is its methods, and no type of the
//! database library appears in them.
//!
//! [`Database`] is what the stores share: a private file in WAL mode, one
//! writer, one reader that never waits for it, and schema migrations that only
//! go forward.
//!
//! ```
//! use cocalc_sqlite::{Database, Durability};
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("store.db");
//! let migrations = ["CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;"];
//! let database = Database::open(&path, Durability::Full, &migrations)?;
//! database.check()?;
//! drop(database);
//! // A program that is older than its data refuses to touch it.
//! assert!(Database::open(&path, Durability::Full, &[]).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod database;
mod error;
mod host_acl;
mod host_backups;
mod host_ledger;
pub mod master;

pub use database::{Database, Durability};
pub use error::Error;
pub use host_acl::HostAcl;
pub use host_backups::HostBackups;
pub use host_ledger::HostLedger;
