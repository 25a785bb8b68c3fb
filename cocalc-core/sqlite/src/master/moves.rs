//! The rows of moves, and the change of owner.

use cocalc_ids::{Epoch, HostId, MoveId, OperationId, ProjectId};
use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{Error, Result, Store};
use crate::{database::parsed, error::Fault};

/// A move, which is also an [`Operation`](super::Operation) of the same id.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MoveRow {
    /// Its id, and that of its operation.
    pub id: MoveId,
    /// The project that moves.
    pub project: ProjectId,
    /// How often the row advanced.
    pub step: u64,
    /// The state machine's state; JSON that the store doesn't look into.
    pub state: String,
}

/// A change of owner, decided in the same transaction as a step of a move.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OwnerChange {
    /// The epoch that must still be the project's.
    pub from: Epoch,
    /// The owner of the next epoch; at an abort, the same host as before.
    pub host: HostId,
}

fn read(row: &Row<'_>) -> rusqlite::Result<MoveRow> {
    Ok(MoveRow { id: parsed(row, 0)?, project: parsed(row, 1)?, step: row.get(2)?, state: row.get(3)? })
}

/// The fence of a project that moves is the operation of the move's id.
pub(super) fn operation_of(id: MoveId) -> OperationId {
    OperationId::from_bytes(*id.as_bytes())
}

impl Store {
    /// Puts the first state of a move whose operation was begun. A row that is
    /// there already is returned as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Stale`] if the project's fence is another, or the database
    /// failed.
    pub fn begin_move(&self, id: MoveId, project: ProjectId, state: &str) -> Result<MoveRow> {
        self.database.write("begin a move", |db| {
            require_fence(db, id, project)?;
            db.execute(
                "INSERT INTO moves (id, project, step, state) VALUES (?1, ?2, 0, ?3) ON CONFLICT DO NOTHING",
                params![id.to_string(), project.to_string(), state],
            )?;
            let sql = "SELECT id, project, step, state FROM moves WHERE id = ?1";
            Ok(db.query_row(sql, [id.to_string()], read)?)
        })
    }

    /// The row of a move.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn move_row(&self, id: MoveId) -> Result<MoveRow> {
        self.database.read("read a move", |db| {
            let sql = "SELECT id, project, step, state FROM moves WHERE id = ?1";
            db.query_row(sql, [id.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "move" }))
        })
    }

    /// The moves that go on.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn moves_open(&self) -> Result<Vec<MoveRow>> {
        self.database.read("list moves", |db| {
            let sql = "SELECT id, project, step, state FROM moves WHERE open = 1 ORDER BY id";
            Ok(db.prepare_cached(sql)?.query_map([], read)?.collect::<Result<_, _>>()?)
        })
    }

    /// Advances the row from `step` to `step + 1` with a new state, and with it
    /// the owner, if `change` says so: all in one transaction, in which the
    /// step, the fence and the epoch are still what the caller believed.
    /// Returns the new epoch, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Stale`] if any of them is not, and then nothing is changed; or
    /// the database failed.
    pub fn advance_move(
        &self,
        id: MoveId,
        step: u64,
        state: &str,
        open: bool,
        change: Option<OwnerChange>,
    ) -> Result<Option<Epoch>> {
        self.database.write("advance a move", |db| {
            let project = db
                .query_row(
                    "UPDATE moves SET step = step + 1, state = ?3, open = ?4
                     WHERE id = ?1 AND step = ?2 AND open = 1 RETURNING project",
                    params![id.to_string(), step, state, open],
                    |row| parsed::<ProjectId>(row, 0),
                )
                .optional()?
                .ok_or(Fault::Refused(Error::Stale { what: "move" }))?;
            let Some(change) = change else { return Ok(None) };
            let next = change.from.next();
            let changed = db.execute(
                "UPDATE projects SET host = ?3, epoch = ?4 WHERE id = ?1 AND fence = ?2 AND epoch = ?5",
                params![
                    project.to_string(),
                    operation_of(id).to_string(),
                    change.host.to_string(),
                    next.number(),
                    change.from.number()
                ],
            )?;
            if changed == 1 { Ok(Some(next)) } else { Err(Fault::Refused(Error::Stale { what: "owner" })) }
        })
    }
}

fn require_fence(db: &Transaction<'_>, id: MoveId, project: ProjectId) -> Result<(), Fault<Error>> {
    let fenced = "SELECT 1 FROM projects WHERE id = ?1 AND fence = ?2";
    let values = params![project.to_string(), operation_of(id).to_string()];
    match db.query_row(fenced, values, |_| Ok(())).optional()? {
        Some(()) => Ok(()),
        None => Err(Fault::Refused(Error::Stale { what: "fence" })),
    }
}
