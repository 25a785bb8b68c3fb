//! Raw files of projects: where they are, and what may be done to them.

pub(crate) mod archive;
pub(crate) mod conditions;
pub(crate) mod kind;
pub(crate) mod listing;
pub(crate) mod path;
pub(crate) mod read;
pub(crate) mod remove;
pub(crate) mod tree;

use std::{any::Any, fmt, io, os::fd::OwnedFd};

use async_trait::async_trait;
use cocalc_core::{
    clock::Timestamp,
    ids::{ProjectId, SnapshotName},
    storage,
};

/// Finds the files of projects that are on this host, whether these run or not.
#[async_trait]
pub trait ProjectFiles: fmt::Debug + Send + Sync + 'static {
    /// The directory that `files/` shows, opened (`O_PATH` suffices), or `None`
    /// if the project has no files here. Nothing in the path to it may be the
    /// tenant's to change. New files get its owner and group.
    ///
    /// # Errors
    ///
    /// What could not be opened.
    async fn root(&self, project: ProjectId) -> io::Result<Option<OwnedFd>>;

    /// Waits until the files may be changed, and keeps it so until what is
    /// returned is dropped: meanwhile nobody freezes, restores or removes them.
    /// `None` if this host may not change them now. A wait may be long; it is
    /// given up by dropping the future.
    async fn turn(&self, project: ProjectId) -> Option<Box<dyn Any + Send>>;

    /// The former states of the files that are kept, oldest first.
    ///
    /// # Errors
    ///
    /// What could not be asked.
    async fn states(&self, project: ProjectId) -> io::Result<Vec<FormerState>>;

    /// What [`root`](Self::root) was in a former state, or `None` if there is no
    /// such state.
    ///
    /// # Errors
    ///
    /// What could not be opened.
    async fn state(&self, project: ProjectId, name: &SnapshotName) -> io::Result<Option<Former>>;

    /// Copies a file, link or folder, with all that is in it: what is at its new
    /// place appears whole or not at all, and durably. If something is replaced
    /// by it, the present state is kept as a former one. Only while somebody has
    /// the project's [`turn`](Self::turn).
    ///
    /// # Errors
    ///
    /// As [`Storage::copy`](storage::Storage::copy).
    async fn copy(&self, project: ProjectId, what: Copying) -> Result<(), storage::Error>;
}

/// Says of a former state of a project's files what people choose it by.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FormerState {
    /// Its name.
    pub name: SnapshotName,
    /// When it was taken.
    pub taken: Timestamp,
    /// Whether that was by itself.
    pub automatic: bool,
}

/// A former state's files.
#[derive(Debug)]
pub struct Former {
    /// Their directory, opened.
    pub root: OwnedFd,
    /// What keeps the state from being deleted.
    pub held: Box<dyn Any + Send + Sync>,
}

/// What is copied, in paths below the root of the files.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Copying {
    /// The state that it is copied from; that of now if `None`.
    pub from: Option<SnapshotName>,
    /// What, with `/` between names.
    pub path: Vec<u8>,
    /// To where.
    pub to: Vec<u8>,
    /// Whether what is there is replaced.
    pub replace: bool,
}
