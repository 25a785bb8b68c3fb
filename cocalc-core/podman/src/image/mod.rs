//! How a host comes by images: from Debian packages, by a [`Recipe`]; from a
//! registry or an archive that another tool wrote, through podman ([`Pull`]).
//! What comes is a tar archive of a root file system, which whoever keeps images
//! unpacks; [`dress`] gives one that was made for other purposes what a project
//! needs.
//!
//! podman's own storage is used while an image comes, in a directory of its own
//! that goes afterwards. No start of a project needs it.

mod dress;
mod lines;
mod oci;
mod recipe;

use std::{io, path::PathBuf, time::Duration};

pub use self::{
    dress::dress,
    oci::{Origin, Pull, Pulled},
    recipe::{Recipe, build_tar, tar_name},
};

/// What an image's way here is at.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// What is being done, for people.
    pub phase: String,
    /// Bytes that have come, if that is known.
    pub bytes: Option<u64>,
}

/// Why an image could not be built or brought here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The tool is missing.
    #[error("{tool} is not installed (apt-get install -y {tool})")]
    NoTool {
        /// Which.
        tool: &'static str,
    },
    /// The recipe makes no sense.
    #[error("the recipe makes no sense: {reason}")]
    Recipe {
        /// Why.
        reason: String,
    },
    /// The cache, or another directory, can't be used.
    #[error("could not use the directory {dir}")]
    Cache {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tool failed.
    #[error("{tool} failed: {complaint}")]
    Failed {
        /// Which.
        tool: &'static str,
        /// Its last lines.
        complaint: String,
    },
    /// It is larger than an image may be.
    #[error("it takes more than {bytes_max} bytes")]
    TooLarge {
        /// What it may take.
        bytes_max: u64,
    },
    /// It took too long.
    #[error("{tool} took longer than {limit:?}")]
    TimedOut {
        /// Which tool.
        tool: &'static str,
        /// The limit.
        limit: Duration,
    },
}
