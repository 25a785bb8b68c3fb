//! The master's store: accounts, hosts, the map of projects to hosts,
//! operations and moves.
//!
//! What must hold together changes in one transaction: an operation and the
//! fence it takes, a new owner and its epoch, a change of members and the
//! version of the ACL.

mod access;
mod account;
mod alias;
mod audit;
mod backup;
mod fence;
mod idempotency;
mod image;
mod login;
mod member;
mod moves;
mod operation;
mod peer;
mod project;
mod receipt;
mod recovery;
mod secret;
mod ssh_key;
mod token;

use std::path::Path;

use cocalc_ids::{OperationId, Timestamp};
use rusqlite::params;

pub use self::{
    access::ProjectAccess,
    account::Account,
    audit::{AUDIT_DAYS_MAX, AuditHead, AuditHeads},
    backup::{BackupKey, BackupRepository, Tending},
    fence::Fence,
    idempotency::Remembered,
    login::Identity,
    member::Member,
    moves::{MoveChange, MoveRow, MoveSaved, NewMove},
    operation::{Ended, Event, Job, Operation, OperationState, Outcome, RestoreTo},
    peer::{Host, Joining, Proxy, Registration},
    project::{NewProject, Project, ProjectState},
    receipt::{Settled, StoredHolder, StoredReceipt},
    recovery::{RecoveredProject, Recovery, RecoveryOutcome},
    secret::StoredSecret,
    ssh_key::StoredSshKey,
    token::{ApiToken, Bearer, JoinKind, KeyLimits, Verb},
};
use crate::{Database, Durability};

/// The result of a store call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

const MIGRATIONS: &[&str] = &[
    include_str!("schema_1.sql"),
    include_str!("schema_2.sql"),
    include_str!("schema_access.sql"),
    include_str!("schema_audit.sql"),
    include_str!("schema_ssh.sql"),
    include_str!("schema_backups.sql"),
    include_str!("schema_secrets.sql"),
    include_str!("schema_fences.sql"),
    include_str!("schema_images.sql"),
    include_str!("schema_aliases.sql"),
    include_str!("schema_logins.sql"),
    include_str!("schema_unknown.sql"),
];

/// The master's database.
#[derive(Debug)]
pub struct Store {
    database: Database,
}

impl Store {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    ///
    /// As [`Database::open`].
    pub fn open(path: &Path) -> Result<Self, crate::Error> {
        Ok(Self { database: Database::open(path, Durability::Full, MIGRATIONS)? })
    }

    /// Reads the smallest thing, to show that the database answers.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn probe(&self) -> Result<()> {
        self.database
            .read("answer a probe", |db| {
                Ok(db.query_row("SELECT one FROM life", [], |row| row.get::<_, i64>(0))?)
            })
            .map(|_| ())
    }

    /// Reads through the whole file and checks that it is sound.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), crate::Error> {
        self.database.check()
    }

    /// Begins a new life of the ordered streams, and returns its epoch.
    ///
    /// It is higher than every one before, even those of a database that was
    /// lost or of the days after a backup that was restored: it never falls
    /// below the time in seconds.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn next_stream(&self, now: Timestamp) -> Result<u64> {
        let floor = u64::try_from(now.secs()).unwrap_or(0);
        self.database.write("begin a stream", |db| {
            let last: u64 = db.query_row("SELECT stream FROM life", [], |row| row.get(0))?;
            let next = floor.max(last + 1);
            db.execute("UPDATE life SET stream = ?1", params![next])?;
            Ok(next)
        })
    }
}

/// Why the store did not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such thing.
    #[error("there is no such {what}")]
    NotFound {
        /// What was asked for.
        what: &'static str,
    },
    /// There is one already.
    #[error("there is already {what}")]
    Exists {
        /// What there is.
        what: &'static str,
    },
    /// It is its owner's, who stays as long as the project.
    #[error("the project's owner keeps that role, and cannot leave")]
    Owner,
    /// An exclusive operation is under way.
    #[error("the project is busy with operation {operation}")]
    Busy {
        /// Which.
        operation: OperationId,
    },
    /// The project is in a state in which this makes no sense.
    #[error("the project is {state}")]
    WrongState {
        /// Its state.
        state: ProjectState,
    },
    /// Nobody has said that the host is dead.
    #[error("the host is not fenced")]
    NotFenced,
    /// Somebody else was first: the row isn't what the caller believed.
    #[error("the {what} changed meanwhile")]
    Stale {
        /// Which row.
        what: &'static str,
    },
    /// There are as many already as are allowed.
    #[error("there are already {limit} {what}")]
    TooMany {
        /// Of what, in the plural.
        what: &'static str,
        /// How many are allowed.
        limit: usize,
    },
    /// Without it nobody could log in to the account.
    #[error("it is the account's last way to log in; set a password or link another first")]
    LastWayIn,
    /// A credential is unknown, used up or expired.
    #[error("the token is not valid")]
    BadToken,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] crate::Error),
}

#[cfg(test)]
mod tests;
