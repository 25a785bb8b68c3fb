//! Where the files of a repository are: a directory, or a bucket.

mod bucket;
mod directory;

use std::time::Duration;

use bytes::Bytes;
use cocalc_backup::{Bounds, Location, protocol::FailureKind};

use crate::failure::Failed;
pub(crate) use bucket::Bucket;
pub(crate) use directory::Directory;

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

    /// Writes a file. With `only_new` it is [`exists`] if there is one.
    fn write(&self, name: &str, parts: &[Bytes], only_new: bool) -> Result<(), Failed>;

    /// Deletes a file. Deleting what is not there is harmless.
    fn remove(&self, name: &str) -> Result<(), Failed>;

    /// Deletes what writes that were cut off this long ago have left.
    fn tidy(&self, older_than: Duration) -> Result<(), Failed>;

    /// Deletes what is left when all files are gone.
    fn erase(&self) -> Result<(), Failed>;
}

/// Opens the store at `location`.
pub(crate) fn open(location: &Location, bounds: &Bounds) -> Result<Box<dyn Store>, Failed> {
    Ok(match location {
        Location::Directory { path } => Box::new(Directory::new(path)?),
        Location::S3(s3) => Box::new(Bucket::s3(s3, bounds)?),
        Location::Gcs(gcs) => Box::new(Bucket::gcs(gcs, bounds)?),
    })
}

/// The failure of [`Store::write`] with `only_new`.
pub(crate) fn exists(name: &str) -> Failed {
    Failed::new(FailureKind::Invalid, format!("{name} exists"))
}
