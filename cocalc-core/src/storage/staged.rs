use std::{fmt, path::Path};

use async_trait::async_trait;

use super::{Result, Snapshot};

/// An empty place in staging, which becomes a snapshot of its project: what is
/// restored from a backup is written here. Nothing there is ever served.
///
/// Dropping it removes what was written, in the background.
#[async_trait]
pub trait Staged: fmt::Debug + Send + Sync {
    /// The directory to write into. Its own owner, mode, times and attributes
    /// count, too.
    fn path(&self) -> &Path;

    /// Makes what was written the snapshot that was asked for, read-only and
    /// durable. Nothing may write there any more.
    async fn publish(self: Box<Self>) -> Result<Snapshot>;
}
