//! Project volumes on Btrfs, and in plain directories.
//!
//! Two backends of [`cocalc_core::storage::Storage`]: [`Btrfs`], with
//! snapshots, quotas, and delta streams by the kernel; and [`Directory`],
//! which works on any file system as any user, and says what it lacks. Beside
//! them, [`loopback`] makes Btrfs file systems in files, and [`StreamGuard`]
//! checks send streams.
//!
//! This crate formats nothing but what [`loopback`] creates, adopts no volume
//! that holds unknown data, and opens no socket. `Btrfs` needs root, and the
//! programs `btrfs`, `tar` and `unshare`.
//!
//! ```
//! use cocalc_core::{ids::ProjectId, storage::{Storage, VolumeOptions}};
//! use cocalc_storage::Directory;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let temporary = tempfile::tempdir()?;
//! # let path = temporary.path().join("store");
//! let store = Directory::open(path).await?;
//! let project = ProjectId::random();
//! let volume = store.create(project, &VolumeOptions::default()).await?;
//! let files = volume.path.ok_or("it has files")?;
//! std::fs::write(files.join("home/notes.txt"), "hello")?;
//! let snapshot = store.snapshot(project, &"first".parse()?).await?;
//! assert_eq!(store.snapshots(project).await?, [snapshot]);
//! # Ok(())
//! # }
//! ```

pub mod btrfs;
mod child;
pub mod directory;
mod extents;
pub mod fail;
mod failure;
mod locks;
pub mod loopback;
mod tree;
mod walk;

pub use btrfs::{
    Btrfs, BtrfsBuilder, ImageError, ImageHeader, ImageLimits, ImageRecord, ImageStream, OpenError, Probe,
    QuotaKind, Scratch, StreamGuard, Trash, probe,
};
pub use directory::{Directory, DirectoryError};
