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
use cocalc_core::ids::ProjectId;

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
}
