//! Long-running operations, each of which is the fence of its project.

use cocalc_core::{control::ProjectReport, storage::Place};
use cocalc_ids::{
    AccountId, Epoch, HostId, ImageDigest, OperationId, ProjectId, SnapshotName, Timestamp, TreePath,
};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Error, ProjectState, Result, Store, project};
use crate::{
    database::{json, parsed},
    error::Fault,
};

/// What an operation does.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Job {
    /// Makes the project on its host.
    Create,
    /// Starts it.
    Start,
    /// Stops it.
    Stop {
        /// How long its processes may take to end, in milliseconds.
        grace_ms: u64,
    },
    /// Deletes it with its files.
    Delete,
    /// Takes a snapshot.
    Snapshot {
        /// Its name.
        name: SnapshotName,
    },
    /// Deletes a snapshot.
    DeleteSnapshot {
        /// Its name.
        name: SnapshotName,
    },
    /// Goes back to a snapshot.
    RestoreSnapshot {
        /// To which.
        name: SnapshotName,
        /// Under which name the present state is kept.
        former: SnapshotName,
    },
    /// Brings one path back from a snapshot.
    RestorePath {
        /// From which.
        name: SnapshotName,
        /// Which path.
        path: TreePath,
        /// Under which name the present state is kept.
        former: SnapshotName,
    },
    /// Copies a path of another project on the same host, or of the same
    /// project, into it.
    Copy {
        /// What is copied.
        from: Place,
        /// To where.
        to: TreePath,
        /// Whether what is there is replaced.
        replace: bool,
    },
    /// Makes the project on its host, as a copy of another one there.
    Clone {
        /// Of which project.
        source: ProjectId,
        /// Of which snapshot; of its present state if `None`.
        name: Option<SnapshotName>,
    },
    /// Restores one of its backups.
    RestoreBackup {
        /// Which.
        backup: String,
        /// To where.
        to: RestoreTo,
    },
    /// Makes the project on its host, from a backup of another one.
    FromBackup {
        /// Of which project.
        source: ProjectId,
        /// Which.
        backup: String,
    },
    /// Gives it another image.
    SetImage {
        /// Which.
        image: ImageDigest,
        /// Whether it is stopped and started for that if it runs.
        restart: bool,
    },
    /// Moves it to another host.
    Move {
        /// Where to.
        to: HostId,
    },
    /// Brings it up on another host from a backup, because its own is dead.
    Recover {
        /// The host that is dead.
        from: HostId,
        /// Its epoch there.
        epoch: Epoch,
        /// Where to.
        to: HostId,
        /// From which backup.
        backup: String,
        /// Its state before.
        was: ProjectState,
    },
    /// Backs it up.
    BackUp,
    /// Takes backups off the list.
    ForgetBackups {
        /// Which.
        backups: Vec<String>,
    },
    /// Forgets the backups that the policy does not keep, and deletes what
    /// nothing needs any more.
    PruneBackups,
    /// Looks for damage in its repository.
    CheckBackups {
        /// Whether all data are read.
        read_data: bool,
    },
    /// Deletes all of its backups.
    EraseBackups,
    /// Tries out whether its newest backup can be restored.
    DrillBackup,
}

/// To where a backup is restored.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "to", rename_all = "snake_case")]
pub enum RestoreTo {
    /// In the place of all that is there.
    InPlace {
        /// Under which name the present state is kept.
        former: SnapshotName,
        /// Whether the project is started again.
        start: bool,
    },
    /// One path.
    Path {
        /// Which, in the backup.
        path: TreePath,
        /// To where, in the project.
        target: TreePath,
        /// Whether what is there is replaced.
        replace: bool,
        /// Under which name the present state is kept.
        former: SnapshotName,
    },
}

impl Job {
    /// Its kind, as in JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop { .. } => "stop",
            Self::Delete => "delete",
            Self::Snapshot { .. } => "snapshot",
            Self::DeleteSnapshot { .. } => "delete_snapshot",
            Self::RestoreSnapshot { .. } => "restore_snapshot",
            Self::RestorePath { .. } => "restore_path",
            Self::Copy { .. } => "copy",
            Self::Clone { .. } => "clone",
            Self::RestoreBackup { .. } => "restore_backup",
            Self::FromBackup { .. } => "create_from_backup",
            Self::SetImage { .. } => "set_image",
            Self::Move { .. } => "move",
            Self::Recover { .. } => "recover",
            Self::BackUp => "back_up",
            Self::ForgetBackups { .. } => "forget_backups",
            Self::PruneBackups => "prune_backups",
            Self::CheckBackups { .. } => "check_backups",
            Self::EraseBackups => "erase_backups",
            Self::DrillBackup => "drill_backup",
        }
    }

    /// The state that a project has while this goes on; `None`: it keeps its own.
    fn meanwhile(&self) -> Option<ProjectState> {
        match self {
            Self::Create | Self::Clone { .. } | Self::FromBackup { .. } => Some(ProjectState::Creating),
            Self::Start => Some(ProjectState::Starting),
            Self::Stop { .. } | Self::Delete => Some(ProjectState::Stopping),
            Self::Move { .. } | Self::Recover { .. } => Some(ProjectState::Moving),
            Self::Snapshot { .. }
            | Self::DeleteSnapshot { .. }
            | Self::RestoreSnapshot { .. }
            | Self::RestorePath { .. }
            | Self::Copy { .. }
            | Self::RestoreBackup { .. }
            | Self::SetImage { .. }
            | Self::BackUp
            | Self::ForgetBackups { .. }
            | Self::PruneBackups
            | Self::CheckBackups { .. }
            | Self::EraseBackups
            | Self::DrillBackup => None,
        }
    }

    /// Whether it goes on beside whatever else is done to the project, which it
    /// does not fence: work on its backups.
    pub fn is_beside(&self) -> bool {
        matches!(
            self,
            Self::BackUp
                | Self::ForgetBackups { .. }
                | Self::PruneBackups
                | Self::CheckBackups { .. }
                | Self::EraseBackups
                | Self::DrillBackup
        )
    }

    /// Whether two operations beside must not go on at once.
    fn excludes(&self, other: &Self) -> bool {
        // While a repository is erased nobody else may work on it.
        let erases = |job: &Self| *job == Self::EraseBackups;
        self.is_beside()
            && other.is_beside()
            && (self.kind() == other.kind() || erases(self) || erases(other))
    }

    /// Whether it brings the project into being.
    pub fn creates(&self) -> bool {
        matches!(self, Self::Create | Self::Clone { .. } | Self::FromBackup { .. })
    }

    /// Whether it is about the project's files only, and leaves the project's
    /// state as it was, even if it fails.
    pub fn keeps_state(&self) -> bool {
        self.meanwhile().is_none()
    }
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OperationState {
    /// It goes on.
    Running,
    /// It ended well.
    Done,
    /// It failed.
    Failed,
    /// It was cancelled, and its effects were undone.
    Cancelled,
}

impl OperationState {
    /// As in the database and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// An operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// The project it is about.
    pub project: ProjectId,
    /// Who asked for it.
    pub account: AccountId,
    /// What it does.
    pub job: Job,
    /// How far it is.
    pub state: OperationState,
    /// Whether somebody asked to cancel it.
    pub cancel: bool,
    /// What is being done, for people.
    pub phase: String,
    /// Bytes, rate and estimate, where they make sense.
    pub progress: Value,
    /// Why it failed: `code` and `detail`.
    pub error: Option<Value>,
    /// When it began.
    pub created: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
}

/// Something that happened in an operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its place, from 1.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// What was being done then.
    pub phase: String,
    /// How far it was.
    pub progress: Value,
}

/// How an operation ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Well, or why not.
    pub outcome: Outcome,
    /// The state in which it leaves the project.
    pub project: ProjectState,
    /// Why it is in that state, for people.
    pub reason: Option<String>,
    /// What its host last reported, if it did.
    pub report: Option<ProjectReport>,
}

/// Well, or why not.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Well.
    Done,
    /// It failed.
    Failed {
        /// For programs.
        code: String,
        /// For people.
        detail: String,
    },
    /// It was cancelled.
    Cancelled,
}

const COLUMNS: &str = "id, project, account, job, state, cancel, phase, progress, error, created, updated";

fn read(row: &Row<'_>) -> rusqlite::Result<Operation> {
    Ok(Operation {
        id: parsed(row, 0)?,
        project: parsed(row, 1)?,
        account: parsed(row, 2)?,
        job: json(row, 3)?,
        state: match row.get_ref(4)?.as_str()? {
            "done" => OperationState::Done,
            "failed" => OperationState::Failed,
            "cancelled" => OperationState::Cancelled,
            _ => OperationState::Running,
        },
        cancel: row.get(5)?,
        phase: row.get(6)?,
        progress: json(row, 7)?,
        error: match row.get_ref(8)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(json(row, 8)?),
        },
        created: Timestamp::from_millis(row.get(9)?),
        updated: Timestamp::from_millis(row.get(10)?),
    })
}

pub(super) fn find(db: &Connection, id: OperationId) -> Result<Operation, Fault<Error>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM operations WHERE id = ?1"))?
        .query_row([id.to_string()], read)
        .optional()?
        .ok_or(Fault::Refused(Error::NotFound { what: "operation" }))
}

pub(super) fn insert(
    db: &Transaction<'_>,
    id: OperationId,
    project: ProjectId,
    account: AccountId,
    job: &Job,
    now: Timestamp,
) -> Result<(), Fault<Error>> {
    db.execute(
        "INSERT INTO operations (id, project, account, job, state, phase, created, updated)
         VALUES (?1, ?2, ?3, ?4, 'running', 'queued', ?5, ?5)",
        params![
            id.to_string(),
            project.to_string(),
            account.to_string(),
            serde_json::to_string(job)?,
            now.millis()
        ],
    )?;
    add_event(db, id, "queued", "{}", now)
}

pub(super) fn begin(
    db: &Transaction<'_>,
    id: OperationId,
    project: ProjectId,
    account: AccountId,
    job: &Job,
    allowed: &[ProjectState],
    now: Timestamp,
) -> Result<Operation, Fault<Error>> {
    let found = project::find(db, project)?;
    if let Some(operation) = found.fence {
        // A repeated call finds what it began.
        if operation == id {
            return find(db, id);
        }
        return Err(Fault::Refused(Error::Busy { operation }));
    }
    match find(db, id) {
        Ok(known) => return Ok(known),
        Err(Fault::Refused(Error::NotFound { .. })) => {}
        Err(fault) => return Err(fault),
    }
    if !allowed.contains(&found.state) {
        return Err(Fault::Refused(Error::WrongState { state: found.state }));
    }
    insert(db, id, project, account, job, now)?;
    let state = job.meanwhile().unwrap_or(found.known);
    db.execute(
        "UPDATE projects SET fence = ?2, state = ?3 WHERE id = ?1 AND fence IS NULL",
        params![project.to_string(), id.to_string(), state.as_str()],
    )?;
    find(db, id)
}

/// Begins an operation that fences nothing.
fn begin_beside(
    db: &Transaction<'_>,
    id: OperationId,
    project: ProjectId,
    account: AccountId,
    job: &Job,
    now: Timestamp,
) -> Result<Operation, Fault<Error>> {
    match find(db, id) {
        // A repeated call finds what it began.
        Ok(known) => return Ok(known),
        Err(Fault::Refused(Error::NotFound { .. })) => {}
        Err(fault) => return Err(fault),
    }
    let known: bool =
        db.query_row("SELECT EXISTS (SELECT 1 FROM projects WHERE id = ?1)", [project.to_string()], |row| {
            row.get(0)
        })?;
    if !known {
        return Err(Fault::Refused(Error::NotFound { what: "project" }));
    }
    let sql = format!("SELECT {COLUMNS} FROM operations WHERE project = ?1 AND state = 'running'");
    let running: Vec<Operation> =
        db.prepare_cached(&sql)?.query_map([project.to_string()], read)?.collect::<Result<_, _>>()?;
    if let Some(other) = running.iter().find(|other| other.job.excludes(job)) {
        return Err(Fault::Refused(Error::Busy { operation: other.id }));
    }
    insert(db, id, project, account, job, now)?;
    find(db, id)
}

/// How many events of an operation are all kept.
const EVENTS_KEPT: u64 = 200;

fn add_event(
    db: &Transaction<'_>,
    id: OperationId,
    phase: &str,
    progress: &str,
    now: Timestamp,
) -> Result<(), Fault<Error>> {
    db.execute(
        "INSERT INTO operation_events (operation, seq, at, phase, progress)
         SELECT ?1, 1 + ifnull(max(seq), 0), ?2, ?3, ?4 FROM operation_events WHERE operation = ?1",
        params![id.to_string(), now.millis(), phase, progress],
    )?;
    // A stream of hours tells every second how far it is: of what has been
    // told of one phase, past the first, the newest is enough.
    db.execute(
        "DELETE FROM operation_events WHERE operation = ?1 AND phase = ?2 AND seq > ?3
         AND seq = (SELECT max(seq) - 1 FROM operation_events WHERE operation = ?1)",
        params![id.to_string(), phase, EVENTS_KEPT],
    )?;
    Ok(())
}

impl Store {
    /// Begins an operation: sets the project's fence and its state, in one
    /// transaction. `allowed` says in which states of the project it makes
    /// sense.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::Busy`] with the operation under way;
    /// [`Error::WrongState`]; or the database failed.
    pub fn begin(
        &self,
        id: OperationId,
        project: ProjectId,
        account: AccountId,
        job: &Job,
        allowed: &[ProjectState],
        now: Timestamp,
    ) -> Result<Operation> {
        self.database.write("begin an operation", |db| begin(db, id, project, account, job, allowed, now))
    }

    /// Begins an operation beside others ([`Job::is_beside`]), also on a project
    /// that is deleted: it fences nothing, and the project's state stays as it
    /// is.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::Busy`] with one that it cannot go on
    /// beside; or the database failed.
    pub fn begin_beside(
        &self,
        id: OperationId,
        project: ProjectId,
        account: AccountId,
        job: &Job,
        now: Timestamp,
    ) -> Result<Operation> {
        self.database
            .write("begin an operation beside others", |db| begin_beside(db, id, project, account, job, now))
    }

    /// The operation.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn operation(&self, id: OperationId) -> Result<Operation> {
        self.database.read("read an operation", |db| find(db, id))
    }

    /// The operations that go on.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn operations_running(&self) -> Result<Vec<Operation>> {
        self.database.read("list running operations", |db| {
            let sql =
                format!("SELECT {COLUMNS} FROM operations WHERE state = 'running' ORDER BY created, id");
            Ok(db.prepare_cached(&sql)?.query_map([], read)?.collect::<Result<_, _>>()?)
        })
    }

    /// The newest `limit` operations on projects of which `account` is a
    /// member, or on all with `None`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn operations(&self, account: Option<AccountId>, limit: usize) -> Result<Vec<Operation>> {
        self.database.read("list operations", |db| {
            let list = match account {
                Some(account) => {
                    let sql = format!(
                        "SELECT {COLUMNS} FROM operations
                         WHERE project IN (SELECT project FROM members WHERE account = ?1)
                         ORDER BY created DESC, id LIMIT ?2"
                    );
                    let values = params![account.to_string(), limit];
                    db.prepare_cached(&sql)?.query_map(values, read)?.collect::<Result<_, _>>()?
                }
                None => {
                    let sql = format!("SELECT {COLUMNS} FROM operations ORDER BY created DESC, id LIMIT ?1");
                    db.prepare_cached(&sql)?.query_map([limit], read)?.collect::<Result<_, _>>()?
                }
            };
            Ok(list)
        })
    }

    /// The newest `limit` operations on a project.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn operations_of(&self, project: ProjectId, limit: usize) -> Result<Vec<Operation>> {
        self.database.read("list a project's operations", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM operations WHERE project = ?1 ORDER BY created DESC, id LIMIT ?2"
            );
            let values = params![project.to_string(), limit];
            Ok(db.prepare_cached(&sql)?.query_map(values, read)?.collect::<Result<_, _>>()?)
        })
    }

    /// The operation that was to bring a project into being.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn creation(&self, project: ProjectId) -> Result<Operation> {
        self.database.read("read a project's first operation", |db| {
            let sql =
                format!("SELECT {COLUMNS} FROM operations WHERE project = ?1 ORDER BY created, id LIMIT 1");
            db.prepare_cached(&sql)?
                .query_row([project.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "operation" }))
        })
    }

    /// What happened in the operation after event `after`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn events(&self, id: OperationId, after: u64) -> Result<Vec<Event>> {
        self.database.read("read an operation's events", |db| {
            let sql = "SELECT seq, at, phase, progress FROM operation_events
                       WHERE operation = ?1 AND seq > ?2 ORDER BY seq";
            let events = db
                .prepare_cached(sql)?
                .query_map(params![id.to_string(), after], |row| {
                    Ok(Event {
                        seq: row.get(0)?,
                        at: Timestamp::from_millis(row.get(1)?),
                        phase: row.get(2)?,
                        progress: json(row, 3)?,
                    })
                })?
                .collect::<Result<_, _>>()?;
            Ok(events)
        })
    }

    /// Records what a running operation is doing; nothing for one that ended.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn progress(&self, id: OperationId, phase: &str, progress: &Value, now: Timestamp) -> Result<()> {
        self.database.write("record progress", |db| {
            let progress = progress.to_string();
            let changed = db.execute(
                "UPDATE operations SET phase = ?2, progress = ?3, updated = ?4 WHERE id = ?1 AND state = 'running'",
                params![id.to_string(), phase, progress, now.millis()],
            )?;
            if changed == 1 { add_event(db, id, phase, &progress, now) } else { Ok(()) }
        })
    }

    /// Asks a running operation to cancel. What that means is its business; it
    /// may have passed the point from which it only goes forward.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::Stale`] if it has ended; or the database
    /// failed.
    pub fn cancel(&self, id: OperationId, now: Timestamp) -> Result<Operation> {
        self.database.write("cancel an operation", |db| {
            let sql = "UPDATE operations SET cancel = 1, updated = ?2 WHERE id = ?1 AND state = 'running'";
            let changed = db.execute(sql, params![id.to_string(), now.millis()])?;
            let operation = find(db, id)?;
            if changed == 1 { Ok(operation) } else { Err(Fault::Refused(Error::Stale { what: "operation" })) }
        })
    }

    /// Ends an operation: its state, that of its project, and the fence, in one
    /// transaction. Ending it again is harmless, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn end(&self, id: OperationId, ended: &Ended, now: Timestamp) -> Result<Operation> {
        self.database.write("end an operation", |db| {
            let operation = find(db, id)?;
            if operation.state != OperationState::Running {
                return Ok(operation);
            }
            let (state, error) = match &ended.outcome {
                Outcome::Done => (OperationState::Done, None),
                Outcome::Cancelled => (OperationState::Cancelled, None),
                Outcome::Failed { code, detail } => {
                    let error = serde_json::json!({ "code": code, "detail": detail });
                    (OperationState::Failed, Some(error.to_string()))
                }
            };
            db.execute(
                "UPDATE operations SET state = ?2, phase = ?2, error = ?3, updated = ?4 WHERE id = ?1",
                params![id.to_string(), state.as_str(), error, now.millis()],
            )?;
            add_event(db, id, state.as_str(), &operation.progress.to_string(), now)?;
            let report = ended.report.as_ref();
            db.execute(
                "UPDATE projects SET fence = NULL, reason = ?4,
                   unknown = iif(?3 = 'unknown', ifnull(?4, ifnull(unknown, 'its host cannot tell what it does')),
                                 NULL),
                   state = CASE WHEN ?3 <> 'unknown' THEN ?3
                                WHEN state IN ('stopped', 'running', 'failed') THEN state
                                ELSE 'failed' END,
                   phases = ifnull(?5, phases), started = ifnull(?6, started), made = max(made, ?7)
                 WHERE id = ?1 AND fence = ?2",
                params![
                    operation.project.to_string(),
                    id.to_string(),
                    ended.project.as_str(),
                    ended.reason,
                    report.map(|report| serde_json::to_string(&report.phases)).transpose()?,
                    report.and_then(|report| report.status.started).map(Timestamp::millis),
                    operation.job.creates() && ended.outcome == Outcome::Done
                ],
            )?;
            find(db, id)
        })
    }
}
