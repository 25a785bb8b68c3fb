//! What a fenced host had, brought up elsewhere: the whole of it, and the change
//! of owner of each project.

use cocalc_ids::{AccountId, Epoch, HostId, OperationId, ProjectId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::Value;

use super::{
    Error, Job, Operation, OperationState, ProjectState, Result, Store, operation, peer::find_host, project,
};
use crate::{
    database::{json, parsed, parsed_opt},
    error::Fault,
};

/// The recovery of what a fenced host had.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Recovery {
    /// Its id, among those of operations.
    pub id: OperationId,
    /// Of which host.
    pub host: HostId,
    /// Who asked for it.
    pub account: AccountId,
    /// To which hosts; any if empty.
    pub to: Vec<HostId>,
    /// How far it is.
    pub state: OperationState,
    /// Whether no further project is to be begun.
    pub cancel: bool,
    /// When it began.
    pub created: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
}

/// What became of one project in a [`Recovery`].
#[derive(Clone, Debug, PartialEq)]
pub struct RecoveredProject {
    /// Which.
    pub project: ProjectId,
    /// What became of it.
    pub outcome: RecoveryOutcome,
    /// The operation that brought it up, or tried.
    pub operation: Option<OperationId>,
    /// What is known of it, for people and programs.
    pub details: Value,
}

/// What became of a project.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RecoveryOutcome {
    /// Its turn has not come.
    Waiting,
    /// Its operation goes on.
    Restoring,
    /// It is up elsewhere.
    Restored,
    /// It has no backup: it is lost until its host returns, and was not
    /// touched.
    NoBackup,
    /// It is still the host's, because something failed.
    Failed,
    /// It is somebody else's business: deleted, or another host's meanwhile.
    Passed,
}

impl RecoveryOutcome {
    /// As in the database and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Restoring => "restoring",
            Self::Restored => "restored",
            Self::NoBackup => "no_backup",
            Self::Failed => "failed",
            Self::Passed => "passed",
        }
    }

    fn parse(text: &str) -> Self {
        let all = [Self::Restoring, Self::Restored, Self::NoBackup, Self::Failed, Self::Passed];
        all.into_iter().find(|outcome| outcome.as_str() == text).unwrap_or(Self::Waiting)
    }
}

const COLUMNS: &str = "id, host, account, destinations, state, cancel, created, updated";

fn read(row: &Row<'_>) -> rusqlite::Result<Recovery> {
    Ok(Recovery {
        id: parsed(row, 0)?,
        host: parsed(row, 1)?,
        account: parsed(row, 2)?,
        to: json(row, 3)?,
        state: match row.get_ref(4)?.as_str()? {
            "done" => OperationState::Done,
            "failed" => OperationState::Failed,
            "cancelled" => OperationState::Cancelled,
            _ => OperationState::Running,
        },
        cancel: row.get(5)?,
        created: Timestamp::from_millis(row.get(6)?),
        updated: Timestamp::from_millis(row.get(7)?),
    })
}

fn find(db: &Connection, id: OperationId) -> Result<Recovery, Fault<Error>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM recoveries WHERE id = ?1"))?
        .query_row([id.to_string()], read)
        .optional()?
        .ok_or(Fault::Refused(Error::NotFound { what: "operation" }))
}

impl Store {
    /// Begins the recovery of all that a fenced host owns now. A repeated call
    /// finds what it began.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::NotFenced`]; [`Error::Busy`] with another
    /// recovery of the host; or the database failed.
    pub fn begin_recovery(
        &self,
        id: OperationId,
        host: HostId,
        account: AccountId,
        to: &[HostId],
        now: Timestamp,
    ) -> Result<Recovery> {
        self.database.write("begin a recovery", |db| {
            match find(db, id) {
                Ok(known) => return Ok(known),
                Err(Fault::Refused(Error::NotFound { .. })) => {}
                Err(fault) => return Err(fault),
            }
            if find_host(db, host)?.fenced.is_none() {
                return Err(Fault::Refused(Error::NotFenced));
            }
            let sql = "SELECT id FROM recoveries WHERE host = ?1 AND state = 'running'";
            let other = db.query_row(sql, [host.to_string()], |row| parsed(row, 0)).optional()?;
            if let Some(operation) = other {
                return Err(Fault::Refused(Error::Busy { operation }));
            }
            db.execute(
                "INSERT INTO recoveries (id, host, account, destinations, state, created, updated)
                 VALUES (?1, ?2, ?3, ?4, 'running', ?5, ?5)",
                params![
                    id.to_string(),
                    host.to_string(),
                    account.to_string(),
                    serde_json::to_string(to)?,
                    now.millis()
                ],
            )?;
            db.execute(
                "INSERT INTO recovery_projects (recovery, project)
                 SELECT ?1, id FROM projects WHERE host = ?2 AND state <> 'deleted'",
                params![id.to_string(), host.to_string()],
            )?;
            find(db, id)
        })
    }

    /// The recovery, and what became of each project, in the order of their
    /// ids.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn recovery(&self, id: OperationId) -> Result<(Recovery, Vec<RecoveredProject>)> {
        self.database.read("read a recovery", |db| {
            let recovery = find(db, id)?;
            let sql = "SELECT project, outcome, operation, details FROM recovery_projects
                       WHERE recovery = ?1 ORDER BY project";
            let projects = db
                .prepare_cached(sql)?
                .query_map([id.to_string()], |row| {
                    Ok(RecoveredProject {
                        project: parsed(row, 0)?,
                        outcome: RecoveryOutcome::parse(row.get_ref(1)?.as_str()?),
                        operation: parsed_opt(row, 2)?,
                        details: json(row, 3)?,
                    })
                })?
                .collect::<Result<_, _>>()?;
            Ok((recovery, projects))
        })
    }

    /// The recoveries that go on.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn recoveries_running(&self) -> Result<Vec<Recovery>> {
        self.database.read("list running recoveries", |db| {
            let sql =
                format!("SELECT {COLUMNS} FROM recoveries WHERE state = 'running' ORDER BY created, id");
            Ok(db.prepare_cached(&sql)?.query_map([], read)?.collect::<Result<_, _>>()?)
        })
    }

    /// Notes what became of a project.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn note_recovered(&self, id: OperationId, project: &RecoveredProject, now: Timestamp) -> Result<()> {
        self.database.write("note what became of a project", |db| {
            db.execute(
                "UPDATE recovery_projects SET outcome = ?3, operation = ?4, details = ?5
                 WHERE recovery = ?1 AND project = ?2",
                params![
                    id.to_string(),
                    project.project.to_string(),
                    project.outcome.as_str(),
                    project.operation.map(|id| id.to_string()),
                    project.details.to_string()
                ],
            )?;
            let sql = "UPDATE recoveries SET updated = ?2 WHERE id = ?1";
            db.execute(sql, params![id.to_string(), now.millis()])?;
            Ok(())
        })
    }

    /// Asks a recovery to begin no further project.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::Stale`] if it has ended; or the database
    /// failed.
    pub fn cancel_recovery(&self, id: OperationId, now: Timestamp) -> Result<Recovery> {
        self.database.write("cancel a recovery", |db| {
            let sql = "UPDATE recoveries SET cancel = 1, updated = ?2 WHERE id = ?1 AND state = 'running'";
            let changed = db.execute(sql, params![id.to_string(), now.millis()])?;
            let recovery = find(db, id)?;
            if changed == 1 { Ok(recovery) } else { Err(Fault::Refused(Error::Stale { what: "operation" })) }
        })
    }

    /// Ends a recovery; what has ended stays as it is.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn end_recovery(&self, id: OperationId, state: OperationState, now: Timestamp) -> Result<()> {
        self.database.write("end a recovery", |db| {
            let sql = "UPDATE recoveries SET state = ?2, updated = ?3 WHERE id = ?1 AND state = 'running'";
            db.execute(sql, params![id.to_string(), state.as_str(), now.millis()])?;
            Ok(())
        })
    }

    /// Begins to bring a project of the fenced host `from` up on `to`, from
    /// `backup`: with owner, epoch and state as they are now. A repeated call
    /// finds what it began.
    ///
    /// # Errors
    ///
    /// As [`begin`](Self::begin); [`Error::NotFenced`]; [`Error::Stale`] if it
    /// is another host's.
    #[expect(clippy::too_many_arguments, reason = "each is a part of the new row")]
    pub fn begin_recover(
        &self,
        id: OperationId,
        project: ProjectId,
        account: AccountId,
        from: HostId,
        to: HostId,
        backup: &str,
        allowed: &[ProjectState],
        now: Timestamp,
    ) -> Result<Operation> {
        self.database.write("begin to recover a project", |db| {
            match operation::find(db, id) {
                Ok(known) => return Ok(known),
                Err(Fault::Refused(Error::NotFound { .. })) => {}
                Err(fault) => return Err(fault),
            }
            let found = project::find(db, project)?;
            if found.host != from {
                return Err(Fault::Refused(Error::Stale { what: "owner" }));
            }
            if find_host(db, from)?.fenced.is_none() {
                return Err(Fault::Refused(Error::NotFenced));
            }
            let job =
                Job::Recover { from, epoch: found.epoch, to, backup: backup.to_owned(), was: found.known };
            operation::begin(db, id, project, account, &job, allowed, now)
        })
    }

    /// Gives a project that has been restored on `to` to that host, under the
    /// next epoch, if the operation `id` fences it and `from` still owns it in
    /// `epoch`, and is fenced. The new epoch; `None` if nothing was changed.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn recover_project(
        &self,
        id: OperationId,
        project: ProjectId,
        (from, epoch): (HostId, Epoch),
        to: HostId,
    ) -> Result<Option<Epoch>> {
        let next = epoch.next();
        self.database.write("give a project to another host", |db| {
            let changed = db.execute(
                "UPDATE projects SET host = ?5, epoch = ?6, backup = NULL, unknown = NULL
                 WHERE id = ?1 AND fence = ?2 AND host = ?3 AND epoch = ?4
                   AND EXISTS (SELECT 1 FROM peers WHERE peers.id = ?3 AND fenced IS NOT NULL)",
                params![
                    project.to_string(),
                    id.to_string(),
                    from.to_string(),
                    epoch.number(),
                    to.to_string(),
                    next.number()
                ],
            )?;
            Ok((changed == 1).then_some(next))
        })
    }
}
