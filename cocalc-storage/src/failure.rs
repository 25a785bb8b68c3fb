//! The private error of the backends, folded into the trait's at their edge.

use std::io;

use cocalc_core::{ids::ProjectId, storage::Error};
use rustix::io::Errno;

/// Why a step of a backend failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It has a meaning in the contract already.
    #[error(transparent)]
    Public(#[from] Error),
    /// A call to the kernel.
    #[error("could not {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    /// Something is not as it must be.
    #[error("{0}")]
    Wrong(String),
}

impl Failure {
    /// Whether the host's volume has no room.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is(source, Errno::NOSPC))
    }

    /// What the caller of `operation` is told.
    pub(crate) fn public(self, backend: &'static str, project: ProjectId, operation: &'static str) -> Error {
        match self {
            Self::Public(error) => error,
            Self::Io { source, .. } if is(&source, Errno::DQUOT) => {
                Error::NoSpace { project, operation, what: "the project's quota" }
            }
            Self::Io { source, .. } if is(&source, Errno::NOSPC) => {
                Error::NoSpace { project, operation, what: "the host's volume" }
            }
            other => Error::Backend { backend, operation, project, source: other.into() },
        }
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

/// Says what was being done when a call failed.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, Failure> {
        self.map_err(|error| Failure::Io { doing, source: error.into() })
    }
}
