//! Starting a daemon: what comes before its parts, and why it failed.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use cocalc_core::BoxError;
use tokio::net::TcpListener;

use crate::sockets;

/// Why a daemon could not be started.
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
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Its supervisor handed over a socket that nothing is served on.
    #[error("{0}")]
    Handed(String),
    /// It is no member of a federation.
    #[error("cannot join the federation")]
    Join(#[from] crate::join::Error),
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
    pub fn open(part: &'static str) -> impl FnOnce(BoxError) -> Self {
        move |source| Self::Open { part, source }
    }
}

/// Listens on the address that configuration key `key` names; or, if a
/// supervisor of this process has handed over a socket for it, on that.
///
/// # Errors
///
/// [`Error::Listen`].
pub async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let failed = |source| Error::Listen { key, address, source };
    match sockets::take(key, address) {
        Some(socket) => {
            socket.set_nonblocking(true).map_err(failed)?;
            TcpListener::from_std(socket).map_err(failed)
        }
        None => TcpListener::bind(address).await.map_err(failed),
    }
}

/// That every socket that was handed over has been taken: on others,
/// connections would wait for ever.
///
/// # Errors
///
/// [`Error::Handed`].
pub fn all_taken() -> Result<(), Error> {
    sockets::left().map_or(Ok(()), |which| Err(Error::Handed(which)))
}

/// Makes a directory that only this user may enter, if it is not there.
///
/// # Errors
///
/// [`Error::File`].
pub fn make_dir(path: &Path) -> Result<PathBuf, Error> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map(|()| path.to_owned())
        .map_err(|error| Error::File { path: path.into(), source: error.into() })
}
