//! Where the files of a repository are: a directory, or a bucket.

pub(crate) mod bucket;
mod directory;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use cocalc_backup::{Bounds, Location, protocol::FailureKind};

use crate::{
    failure::Failed,
    renewal::{Renewal, Which},
};
use bucket::Bucket;
use directory::Directory;

/// How a file is written where there may be one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mode {
    /// It must be the first: [`exists`] if it is not.
    First,
    /// Its name says what is in it, so one that is there is the same. Nothing
    /// that is there is changed, so that this needs no right to change anything.
    Once,
    /// It takes the place of what is there.
    Over,
}

/// Holds files by name, `/` between directories. What is put is durable and
/// whole, or not there.
pub(crate) trait Store: Send + Sync + 'static {
    /// Prepares an empty repository.
    fn create(&self) -> Result<(), Failed>;

    /// The names below `directory`, the last part of each, and their sizes.
    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, Failed>;

    /// The size of one file, if it is there.
    fn size(&self, name: &str) -> Result<Option<u64>, Failed>;

    /// All of a file.
    fn read(&self, name: &str) -> Result<Bytes, Failed>;

    /// A part of a file.
    fn read_part(&self, name: &str, offset: u64, length: u64) -> Result<Bytes, Failed>;

    /// Writes a file.
    fn write(&self, name: &str, parts: &[Bytes], mode: Mode) -> Result<(), Failed>;

    /// Deletes a file. Deleting what is not there is harmless.
    fn remove(&self, name: &str) -> Result<(), Failed>;

    /// Deletes what writes that were cut off this long ago have left.
    fn tidy(&self, older_than: Duration) -> Result<(), Failed>;

    /// What time it is where the files are, to a second or so. Writes a file to
    /// find out.
    fn now(&self) -> Result<SystemTime, Failed>;

    /// Deletes what is left when all files are gone.
    fn erase(&self) -> Result<(), Failed>;
}

/// Opens the store at `location`.
pub(crate) fn open(
    location: &Location,
    bounds: &Bounds,
    renewal: &Arc<Renewal>,
    which: Which,
) -> Result<Box<dyn Store>, Failed> {
    Ok(match location {
        Location::Directory { path } => Box::new(Directory::new(path)?),
        Location::S3(_) | Location::Gcs(_) => Box::new(Bucket::new(location, bounds, renewal, which)?),
    })
}

/// The file that tells the time of the store.
pub(crate) const CLOCK: &str = "cocalc/clock";

/// The failure of [`Store::write`] with [`Mode::First`].
pub(crate) fn exists(name: &str) -> Failed {
    Failed::new(FailureKind::Invalid, format!("{name} exists"))
}
