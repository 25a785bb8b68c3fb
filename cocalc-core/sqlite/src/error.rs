//! Why a store failed.

use std::path::PathBuf;

use cocalc_core::BoxError;

/// Why a store could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be opened as a database.
    #[error("cannot open the database {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BoxError,
    },
    /// A newer program wrote the file; this one would lose what it doesn't know.
    #[error("the database {} has schema {found}, this program knows up to {known}", path.display())]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Its schema version.
        found: usize,
        /// The newest version this program knows.
        known: usize,
    },
    /// A migration failed; the file is as it was before.
    #[error("cannot bring the database {} to schema {version}", path.display())]
    Migration {
        /// The file.
        path: PathBuf,
        /// The version that could not be reached.
        version: usize,
        /// Why.
        source: BoxError,
    },
    /// What the file holds makes no sense.
    #[error("the database is damaged: {what}")]
    Damaged {
        /// What was found.
        what: String,
    },
    /// The database failed.
    #[error("the database could not {operation}")]
    Failed {
        /// What was being done.
        operation: &'static str,
        /// Why.
        source: BoxError,
    },
}

/// What the body of a transaction ends with, when it does not end well: `E` is
/// the store's own refusal, everything else is folded into [`Error`].
#[derive(Debug)]
pub(crate) enum Fault<E = Error> {
    /// The database library says so.
    Sqlite(rusqlite::Error),
    /// A value does not fit its column, in either direction.
    Json(serde_json::Error),
    /// The store refuses; nothing is written.
    Refused(E),
}

impl<E> From<rusqlite::Error> for Fault<E> {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl<E> From<serde_json::Error> for Fault<E> {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(error)
    }
}

impl<E: From<Error>> Fault<E> {
    pub(crate) fn fold(self, operation: &'static str) -> E {
        match self {
            Self::Sqlite(rusqlite::Error::FromSqlConversionFailure(column, _, source)) => {
                E::from(Error::Damaged {
                    what: format!("column {column} while trying to {operation}: {source}"),
                })
            }
            Self::Sqlite(source) => E::from(Error::Failed { operation, source: source.into() }),
            Self::Json(source) => E::from(Error::Damaged { what: format!("{operation}: {source}") }),
            Self::Refused(error) => error,
        }
    }
}
