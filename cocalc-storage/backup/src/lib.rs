//! Backups of project snapshots in restic's repository format, on a disk, in
//! S3 or in Google Cloud Storage.
//!
//! This crate is the caller's half: [`Rustic`] implements
//! `cocalc_core::backups::Backups` by running the program
//! `cocalc-backup-worker`, one process per call, which is where rustic is
//! linked. Whoever uses this crate builds neither rustic nor a cloud client.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! use std::sync::Arc;
//! use cocalc_backup::{OnePerProject, Rustic, WrappingKey, WrappingKeys};
//! use cocalc_core::{backups::Backups, ids::ProjectId};
//!
//! let wrapping = WrappingKeys::new(WrappingKey::generate("2026")?);
//! let repositories = OnePerProject::in_directory("/var/lib/cocalc/keys", wrapping, "/srv/backups");
//! let backups = Rustic::builder(Arc::new(repositories)).build()?;
//! let project: ProjectId = "6f1c3f0e-8a35-4d8f-9a1e-2b7c4d5e6f70".parse()?;
//! for backup in backups.list(project).await? {
//!     println!("{} {} bytes", backup.id, backup.bytes);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What it is not: a schedule. When a project is backed up, and what is kept,
//! is for the caller to decide.

pub mod protocol;

mod bounds;
mod group;
mod key;
mod key_files;
mod location;
mod mint;
mod name;
mod place;
mod repositories;
mod rustic;
mod shards;
mod shared;
mod worker;

pub use bounds::Bounds;
pub use key::{KeyError, RepositoryKey, WrappedKey, WrappingKey, WrappingKeys};
pub use key_files::KeyStoreError;
pub use location::{Gcs, GcsCredentials, Location, Repository, S3, Secret};
pub use mint::{MintError, Minted, Minter, Places};
pub use name::{ParseRepositoryNameError, RepositoryName, ShardId};
pub use place::{GcsAccess, GcsPlace, Given, Mint, Place, S3Access, S3Keys, S3Place, Scope};
pub use repositories::{Access, OnePerProject, Repositories};
pub use rustic::{Mirrored, Rustic, RusticBuilder};
pub use shards::{Shards, ShardsError};
pub use shared::{SharedShards, SharedShardsError};
pub use worker::BuildError;
