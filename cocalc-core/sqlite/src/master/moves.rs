//! The rows of moves, and the change of owner.

use cocalc_ids::{AccountId, Epoch, HostId, MoveId, OperationId, ProjectId, Timestamp};
use rusqlite::{OptionalExtension, Row, params};

use super::{Error, Job, Operation, ProjectState, Result, Store, operation};
use crate::{database::parsed, error::Fault};

/// The first revision of a move's state.
const FIRST: u64 = 1;

/// A move, which is also an [`Operation`] of the same id.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MoveRow {
    /// Its id, and that of its operation.
    pub id: MoveId,
    /// The project that moves.
    pub project: ProjectId,
    /// Which state it is, from 1.
    pub revision: u64,
    /// The state machine's state; JSON that the store doesn't look into.
    pub state: String,
}

/// A move that is to begin.
#[derive(Clone, Debug)]
pub struct NewMove<'a> {
    /// Its id; its operation gets the same.
    pub id: MoveId,
    /// The project that moves.
    pub project: ProjectId,
    /// Who asked for it.
    pub account: AccountId,
    /// The owner and epoch on which `state` was built.
    pub from: (HostId, Epoch),
    /// Where to.
    pub to: HostId,
    /// The first state.
    pub state: &'a str,
}

/// What happens to the project's row in the transaction that stores a state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MoveChange {
    /// Nothing.
    None,
    /// It gets a new epoch, and `owner`; at an abort that is the old one.
    Owner {
        /// The epoch that it must still have.
        from: Epoch,
        /// The next one.
        to: Epoch,
        /// The new owner; `None` leaves it.
        owner: Option<HostId>,
    },
    /// The fence is lifted, and this is its state.
    Release {
        /// What it is doing now.
        state: ProjectState,
    },
}

/// What became of a new state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MoveSaved {
    /// It is stored, and the change is made.
    Yes,
    /// Another revision is stored; nothing was changed.
    Superseded,
    /// The project's row has another fence or epoch; nothing was changed.
    Lost,
}

fn read(row: &Row<'_>) -> rusqlite::Result<MoveRow> {
    Ok(MoveRow { id: parsed(row, 0)?, project: parsed(row, 1)?, revision: row.get(2)?, state: row.get(3)? })
}

/// The fence of a project that moves is the operation of the move's id.
pub(super) fn operation_of(id: MoveId) -> OperationId {
    OperationId::from_bytes(*id.as_bytes())
}

impl Store {
    /// Begins a move: its operation, the fence and the first state, in one
    /// transaction. A move that was begun already is returned as it is.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin); [`Error::Stale`] if owner or epoch are not
    /// those of `new` any more.
    pub fn begin_move(
        &self,
        new: &NewMove<'_>,
        allowed: &[ProjectState],
        now: Timestamp,
    ) -> Result<Operation> {
        self.database.write("begin a move", |db| {
            let job = Job::Move { to: new.to };
            let began =
                operation::begin(db, operation_of(new.id), new.project, new.account, &job, allowed, now)?;
            let row = "SELECT 1 FROM moves WHERE id = ?1";
            if db.query_row(row, [new.id.to_string()], |_| Ok(())).optional()?.is_some() {
                return Ok(began);
            }
            let project = super::project::find(db, new.project)?;
            if (project.host, project.epoch) != new.from {
                return Err(Fault::Refused(Error::Stale { what: "owner" }));
            }
            db.execute(
                "INSERT INTO moves (id, project, revision, state) VALUES (?1, ?2, ?3, ?4)",
                params![new.id.to_string(), new.project.to_string(), FIRST, new.state],
            )?;
            Ok(began)
        })
    }

    /// The row of a move.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn move_row(&self, id: MoveId) -> Result<MoveRow> {
        self.database.read("read a move", |db| {
            let sql = "SELECT id, project, revision, state FROM moves WHERE id = ?1";
            db.query_row(sql, [id.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "move" }))
        })
    }

    /// The moves of a project, of all times.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn moves_of(&self, project: ProjectId) -> Result<Vec<MoveRow>> {
        self.database.read("list a project's moves", |db| {
            let sql = "SELECT id, project, revision, state FROM moves WHERE project = ?1";
            Ok(db.prepare_cached(sql)?.query_map([project.to_string()], read)?.collect::<Result<_, _>>()?)
        })
    }

    /// Notes that `hosts` may have something of a project that is about to be
    /// deleted. Doing so again is harmless.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn leave(&self, project: ProjectId, hosts: &[HostId]) -> Result<()> {
        self.database.write("note leftovers", |db| {
            for host in hosts {
                db.execute(
                    "INSERT INTO leftovers (host, project) SELECT id, ?2 FROM peers WHERE id = ?1
                     ON CONFLICT DO NOTHING",
                    params![host.to_string(), project.to_string()],
                )?;
            }
            Ok(())
        })
    }

    /// What a host may have of projects that are deleted, with their last
    /// epoch.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn leftovers(&self, host: HostId) -> Result<Vec<(ProjectId, Epoch)>> {
        self.database.read("list leftovers", |db| {
            let sql = "SELECT p.id, p.epoch FROM leftovers l JOIN projects p ON p.id = l.project
                       WHERE l.host = ?1 AND p.state = 'deleted' ORDER BY p.id";
            let rows = db
                .prepare_cached(sql)?
                .query_map([host.to_string()], |row| {
                    Ok((parsed(row, 0)?, super::project::read_epoch(row, 1)?))
                })?
                .collect::<Result<_, _>>()?;
            Ok(rows)
        })
    }

    /// The hosts that may have something of a project that was deleted.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn leftover_hosts(&self, project: ProjectId) -> Result<Vec<HostId>> {
        self.database.read("list hosts with leftovers", |db| {
            let sql = "SELECT host FROM leftovers WHERE project = ?1 ORDER BY host";
            let hosts = db
                .prepare_cached(sql)?
                .query_map([project.to_string()], |row| parsed(row, 0))?
                .collect::<Result<_, _>>()?;
            Ok(hosts)
        })
    }

    /// The host has nothing of the project any more.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn forgotten(&self, host: HostId, project: ProjectId) -> Result<()> {
        self.database.write("note that a host has forgotten", |db| {
            let sql = "DELETE FROM leftovers WHERE host = ?1 AND project = ?2";
            db.execute(sql, params![host.to_string(), project.to_string()])?;
            Ok(())
        })
    }

    /// Stores the state that follows revision `expected`, and makes `change`
    /// to the project's row: both or none.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn save_move(&self, id: MoveId, expected: u64, state: &str, change: MoveChange) -> Result<MoveSaved> {
        let saved = self.database.write("save a move", |db| {
            let project = db
                .query_row(
                    "UPDATE moves SET revision = revision + 1, state = ?3
                     WHERE id = ?1 AND revision = ?2 RETURNING project",
                    params![id.to_string(), expected, state],
                    |row| parsed::<ProjectId>(row, 0),
                )
                .optional()?
                .ok_or(Fault::Refused(Error::Stale { what: SUPERSEDED }))?;
            let (project, fence) = (project.to_string(), operation_of(id).to_string());
            let changed = match change {
                MoveChange::None => 1,
                // An epoch never falls, whatever the caller computed.
                MoveChange::Owner { from, to, owner } => db.execute(
                    "UPDATE projects SET host = ifnull(?3, host), epoch = ?4
                     WHERE id = ?1 AND fence = ?2 AND epoch = ?5 AND ?4 > ?5",
                    params![project, fence, owner.map(|id| id.to_string()), to.number(), from.number()],
                )?,
                MoveChange::Release { state } => db.execute(
                    "UPDATE projects SET fence = NULL, reason = NULL, state = iif(?3 = 'unknown', 'failed', ?3),
                       unknown = iif(?3 = 'unknown', 'its host cannot tell what it does', NULL)
                     WHERE id = ?1 AND fence = ?2",
                    params![project, fence, state.as_str()],
                )?,
            };
            if changed == 1 { Ok(()) } else { Err(Fault::Refused(Error::Stale { what: LOST })) }
        });
        match saved {
            Ok(()) => Ok(MoveSaved::Yes),
            Err(Error::Stale { what: SUPERSEDED }) => Ok(MoveSaved::Superseded),
            Err(Error::Stale { .. }) => Ok(MoveSaved::Lost),
            Err(error) => Err(error),
        }
    }
}

const SUPERSEDED: &str = "move";
const LOST: &str = "owner";
