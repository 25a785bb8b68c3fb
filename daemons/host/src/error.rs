//! Why a host could not be started.

use std::path::PathBuf;

use cocalc_core::BoxError;

/// Why a host could not be started, or stopped by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A directory or file cannot be used.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: BoxError,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({key})")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// It is no member of a federation.
    #[error("cannot join the federation")]
    Join(#[from] cocalc_daemon::join::Error),
    /// A part could not be opened.
    #[error("cannot open the {part}")]
    Open {
        /// Which part.
        part: &'static str,
        /// Why.
        source: BoxError,
    },
}

impl Error {
    /// A part that could not be opened.
    pub(crate) fn open(part: &'static str) -> impl FnOnce(BoxError) -> Self {
        move |source| Self::Open { part, source }
    }
}
