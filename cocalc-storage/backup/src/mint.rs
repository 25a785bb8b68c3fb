//! What a master gives out for one repository: its place, with credentials that
//! reach no other.

use std::{fmt, path::PathBuf};

use async_trait::async_trait;
use cocalc_core::{BoxError, ids::Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    bounds::Bounds,
    location::Location,
    name::RepositoryName,
    place::{Given, Place},
    protocol::{Event, Work},
    repositories::Access,
    worker::{BuildError, Lost, Worker},
};

/// Knows where repositories are, and makes credentials for them.
#[async_trait]
pub trait Places: Send + Sync + 'static {
    /// The place of the repository called `name`, with credentials for `access`.
    async fn location(&self, name: RepositoryName, access: Access) -> Result<Location, BoxError>;
}

#[async_trait]
impl<F: Fn(RepositoryName, Access) -> Location + Send + Sync + 'static> Places for F {
    async fn location(&self, name: RepositoryName, access: Access) -> Result<Location, BoxError> {
        Ok(self(name, access))
    }
}

/// Short-lived credentials, and when they end.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Minted {
    /// The place that they open.
    pub location: Location,
    /// When they end.
    pub expires: Timestamp,
}

/// Gives out what a [`Place`] says. Where that is short-lived credentials, it
/// asks the cloud for them each time, by a worker process, since this crate
/// links no client.
pub struct Minter {
    place: Place,
    worker: Worker,
}

impl fmt::Debug for Minter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minter").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Minter {
    /// Gives out `place`. `worker` is the worker's program, by default
    /// `cocalc-backup-worker` beside the program that runs.
    ///
    /// # Errors
    ///
    /// If the worker's program is not there.
    pub fn new(place: Place, worker: Option<PathBuf>, bounds: Bounds) -> Result<Self, BuildError> {
        Ok(Self { place, worker: Worker::new(worker, bounds)? })
    }

    /// What it gives out.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The place of a repository with credentials for `access`, and when these
    /// end, if they do.
    ///
    /// # Errors
    ///
    /// If the cloud refuses to make them, or cannot be reached.
    pub async fn mint(
        &self,
        name: RepositoryName,
        access: Access,
    ) -> Result<(Location, Option<Timestamp>), MintError> {
        let mint = match self.place.give(name, access) {
            Given::Location(location) => return Ok((location, None)),
            Given::Mint(mint) => mint,
        };
        let failed = |source: BoxError| MintError { name, source };
        match self.worker.run(Work::Mint(Box::new(mint)), None, &|_| ()).await {
            Ok(Event::Minted(minted)) => Ok((minted.location, Some(minted.expires))),
            Ok(Event::Failed(failure)) => Err(failed(failure.words.join("; ").into())),
            Ok(_) => Err(failed("the worker answered something else".into())),
            Err(Lost::Late(within)) => {
                Err(failed(format!("it took longer than {} s", within.as_secs()).into()))
            }
            Err(Lost::Ended(error)) => Err(failed(error)),
        }
    }
}

#[async_trait]
impl Places for Minter {
    async fn location(&self, name: RepositoryName, access: Access) -> Result<Location, BoxError> {
        Ok(self.mint(name, access).await?.0)
    }
}

/// Credentials could not be made.
#[derive(Debug, thiserror::Error)]
#[error("no credentials for the repository {name}")]
pub struct MintError {
    name: RepositoryName,
    source: BoxError,
}
