//! Projects, and the map that says who owns them.

use std::{fmt, str::FromStr};

use cocalc_core::{
    backups::Status,
    control::{ProjectConfig, ProjectReport},
    runner::State,
};
use cocalc_ids::{AccountId, Epoch, HostId, OperationId, ParseIdError, ProjectId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::{Error, Job, Result, Store};
use crate::{
    database::{json, parsed, parsed_opt},
    error::Fault,
};

/// A row of the map, with what is known of the project.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its name, for people.
    pub name: String,
    /// Who owns it.
    pub owner: AccountId,
    /// How it is made and run.
    pub config: ProjectConfig,
    /// The host that owns it.
    pub host: HostId,
    /// In which epoch.
    pub epoch: Epoch,
    /// Its state, of that epoch.
    pub state: ProjectState,
    /// The last one that was known: the same, unless that is unknown.
    pub known: ProjectState,
    /// Why it is in that state, for people.
    pub reason: Option<String>,
    /// Milliseconds of each phase of the last start.
    pub phases: Vec<(String, u64)>,
    /// When it was last started.
    pub started: Option<Timestamp>,
    /// The exclusive operation that is under way.
    pub fence: Option<OperationId>,
    /// The version of its member set.
    pub acl_version: u64,
    /// How long cached rights go on after the lease; `None` is the default.
    pub grace_ms: Option<u64>,
    /// Whether a proxy that terminates SSH may attest for it.
    pub proxy_ssh: bool,
    /// The ports whose apps viewers may see.
    pub viewable_ports: Vec<u16>,
    /// Whether the project's own `~/.ssh/authorized_keys` opens it.
    pub authorized_keys: bool,
    /// When it was asked for.
    pub created: Timestamp,
    /// Whether its host ever made it.
    pub made: bool,
    /// How it stands with its backups, as its host said last.
    pub backup: Option<Status>,
}

/// The state of a project, as the API shows it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProjectState {
    /// Being made on its host.
    Creating,
    /// Not running.
    Stopped,
    /// On its way up.
    Starting,
    /// Running.
    Running,
    /// On its way down.
    Stopping,
    /// On its way to another host.
    Moving,
    /// The last operation failed; `reason` says why. It can be tried again.
    Failed,
    /// Its host cannot tell now whether it runs; `reason` says why, and what to do. It
    /// is neither started nor moved nor deleted.
    Unknown,
    /// Gone.
    Deleted,
}

impl ProjectState {
    /// As in the database and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Moving => "moving",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
            Self::Deleted => "deleted",
        }
    }
}

impl fmt::Display for ProjectState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ProjectState {
    type Err = StateError;

    fn from_str(s: &str) -> Result<Self, StateError> {
        [
            Self::Creating,
            Self::Stopped,
            Self::Starting,
            Self::Running,
            Self::Stopping,
            Self::Moving,
            Self::Failed,
            Self::Unknown,
            Self::Deleted,
        ]
        .into_iter()
        .find(|state| state.as_str() == s)
        .ok_or(StateError)
    }
}

/// Says that a text is no state.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("not a state")]
pub struct StateError;

impl From<State> for ProjectState {
    fn from(state: State) -> Self {
        match state {
            State::Starting => Self::Starting,
            State::Running => Self::Running,
            State::Stopping => Self::Stopping,
            State::Stopped => Self::Stopped,
            // Also one that this program doesn't know.
            _ => Self::Unknown,
        }
    }
}

/// A project to be made.
#[derive(Clone, Debug)]
pub struct NewProject<'a> {
    /// Its id.
    pub id: ProjectId,
    /// Its name.
    pub name: &'a str,
    /// Who will own it.
    pub owner: AccountId,
    /// How it is made and run.
    pub config: &'a ProjectConfig,
    /// Where it is placed.
    pub host: HostId,
    /// The operation that makes it there, and fences it meanwhile.
    pub operation: OperationId,
    /// What that operation does.
    pub job: &'a Job,
}

/// What an operation does to a project is known while it is under way.
const COLUMNS: &str = "p.id, p.name, p.owner, p.config, p.host, p.epoch,
    iif(p.unknown IS NULL OR p.fence IS NOT NULL OR p.state IN ('creating', 'deleted'), p.state, 'unknown'),
    iif(p.unknown IS NULL OR p.fence IS NOT NULL OR p.state IN ('creating', 'deleted'), p.reason, p.unknown),
    p.phases, p.started, p.fence, p.acl_version, p.grace_ms, p.proxy_ssh, p.created, p.made, p.viewable_ports,
    p.authorized_keys, p.backup, p.state";

fn read(row: &Row<'_>) -> rusqlite::Result<Project> {
    Ok(Project {
        id: parsed(row, 0)?,
        name: row.get(1)?,
        owner: parsed(row, 2)?,
        config: json(row, 3)?,
        host: parsed(row, 4)?,
        epoch: read_epoch(row, 5)?,
        state: parsed(row, 6)?,
        reason: row.get(7)?,
        phases: json(row, 8)?,
        started: row.get::<_, Option<i64>>(9)?.map(Timestamp::from_millis),
        fence: parsed_opt(row, 10)?,
        acl_version: row.get(11)?,
        grace_ms: row.get(12)?,
        proxy_ssh: row.get(13)?,
        created: Timestamp::from_millis(row.get(14)?),
        made: row.get(15)?,
        viewable_ports: json(row, 16)?,
        authorized_keys: row.get(17)?,
        backup: match row.get_ref(18)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(json(row, 18)?),
        },
        known: parsed(row, 19)?,
    })
}

pub(super) fn read_epoch(row: &Row<'_>, column: usize) -> rusqlite::Result<Epoch> {
    let number: u64 = row.get(column)?;
    Epoch::new(number).ok_or_else(|| {
        let zero: Box<ParseIdError> = match "0".parse::<Epoch>() {
            Err(error) => Box::new(error),
            Ok(_) => return rusqlite::Error::InvalidQuery,
        };
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Integer, zero)
    })
}

/// The project, in a transaction; one that was deleted is not found.
pub(super) fn find(db: &Connection, id: ProjectId) -> Result<Project, Fault<Error>> {
    let sql = format!("SELECT {COLUMNS} FROM projects p WHERE p.id = ?1 AND p.state <> 'deleted'");
    db.prepare_cached(&sql)?
        .query_row([id.to_string()], read)
        .optional()?
        .ok_or(Fault::Refused(Error::NotFound { what: "project" }))
}

impl Store {
    /// Makes a project with its first owner, and the operation that creates it
    /// on its host. If there is one of this id already, with this owner, it is
    /// returned as it is, so that a repeated call makes no second one.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if the id is somebody else's, or the database failed.
    pub fn create_project(&self, new: &NewProject<'_>, now: Timestamp) -> Result<Project> {
        self.database.write("create a project", |db| {
            match find(db, new.id) {
                Ok(project) if project.owner == new.owner => return Ok(project),
                Ok(_) => return Err(Fault::Refused(Error::Exists { what: "a project of that id" })),
                Err(Fault::Refused(Error::NotFound { .. })) => {}
                Err(fault) => return Err(fault),
            }
            let (id, owner) = (new.id.to_string(), new.owner.to_string());
            let added = db.execute(
                "INSERT INTO projects (id, name, owner, config, host, epoch, state, fence, created)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'creating', ?7, ?8) ON CONFLICT DO NOTHING",
                params![
                    id,
                    new.name,
                    owner,
                    serde_json::to_string(new.config)?,
                    new.host.to_string(),
                    Epoch::FIRST.number(),
                    new.operation.to_string(),
                    now.millis()
                ],
            )?;
            if added == 0 {
                // It was deleted; an id is never given twice.
                return Err(Fault::Refused(Error::Exists { what: "a project of that id" }));
            }
            db.execute(
                "INSERT INTO members (project, account, role) VALUES (?1, ?2, 'owner')",
                params![id, owner],
            )?;
            super::operation::insert(db, new.operation, new.id, new.owner, new.job, now)?;
            find(db, new.id)
        })
    }

    /// The project.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn project(&self, id: ProjectId) -> Result<Project> {
        self.database.read("read a project", |db| find(db, id))
    }

    /// Changes how a project is made and run, unless an operation is under way
    /// that has begun with what was before.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], [`Error::Busy`], or the database failed.
    pub fn configure(
        &self,
        id: ProjectId,
        change: impl FnOnce(&mut ProjectConfig) + Send,
    ) -> Result<Project> {
        self.database.write("configure a project", |db| {
            let mut project = find(db, id)?;
            if let Some(operation) = project.fence {
                return Err(Fault::Refused(Error::Busy { operation }));
            }
            change(&mut project.config);
            let config = serde_json::to_string(&project.config)?;
            db.execute("UPDATE projects SET config = ?2 WHERE id = ?1", params![id.to_string(), config])?;
            Ok(project)
        })
    }

    /// The same, on behalf of the operation that is under way.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], [`Error::Busy`] with another operation, or the
    /// database failed.
    pub fn configure_within(
        &self,
        operation: OperationId,
        id: ProjectId,
        change: impl FnOnce(&mut ProjectConfig) + Send,
    ) -> Result<Project> {
        self.database.write("configure a project", |db| {
            let mut project = find(db, id)?;
            match project.fence {
                Some(fence) if fence == operation => {}
                Some(operation) => return Err(Fault::Refused(Error::Busy { operation })),
                None => return Err(Fault::Refused(Error::WrongState { state: project.state })),
            }
            change(&mut project.config);
            let config = serde_json::to_string(&project.config)?;
            db.execute("UPDATE projects SET config = ?2 WHERE id = ?1", params![id.to_string(), config])?;
            Ok(project)
        })
    }

    /// The projects of which `account` is a member, or all with `None`, in the
    /// order of their ids, at most `limit` after `after`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn projects(
        &self,
        account: Option<AccountId>,
        after: Option<ProjectId>,
        limit: usize,
    ) -> Result<Vec<Project>> {
        let after = after.map(|id| id.to_string()).unwrap_or_default();
        self.database.read("list projects", |db| {
            let list = match account {
                Some(account) => {
                    let sql = format!(
                        "SELECT {COLUMNS} FROM members m JOIN projects p ON p.id = m.project
                         WHERE m.account = ?1 AND m.project > ?2 AND p.state <> 'deleted'
                         ORDER BY m.project LIMIT ?3"
                    );
                    let values = params![account.to_string(), after, limit];
                    db.prepare_cached(&sql)?.query_map(values, read)?.collect::<Result<_, _>>()?
                }
                None => {
                    let sql = format!(
                        "SELECT {COLUMNS} FROM projects p WHERE p.id > ?1 AND p.state <> 'deleted'
                         ORDER BY p.id LIMIT ?2"
                    );
                    db.prepare_cached(&sql)?
                        .query_map(params![after, limit], read)?
                        .collect::<Result<_, _>>()?
                }
            };
            Ok(list)
        })
    }

    /// What `host` owns, in the order of their ids.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn projects_of_host(&self, host: HostId) -> Result<Vec<Project>> {
        self.database.read("list a host's projects", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM projects p WHERE p.host = ?1 AND p.state <> 'deleted' ORDER BY p.id"
            );
            let list =
                db.prepare_cached(&sql)?.query_map([host.to_string()], read)?.collect::<Result<_, _>>()?;
            Ok(list)
        })
    }

    /// How many projects each host owns.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn project_counts(&self) -> Result<Vec<(HostId, u64)>> {
        self.database.read("count projects", |db| {
            let sql =
                "SELECT host, count(*) FROM projects WHERE state <> 'deleted' GROUP BY host ORDER BY host";
            let counts = db
                .prepare_cached(sql)?
                .query_map([], |row| Ok((parsed(row, 0)?, row.get(1)?)))?
                .collect::<Result<_, _>>()?;
            Ok(counts)
        })
    }

    /// Owner and epoch of a project, deleted or not: what a host may be told
    /// about something it holds. `deleted` is the third.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn ownership(&self, id: ProjectId) -> Result<Option<(HostId, Epoch, bool)>> {
        self.database.read("read who owns a project", |db| {
            let sql = "SELECT host, epoch, state = 'deleted' FROM projects WHERE id = ?1";
            let found = db
                .prepare_cached(sql)?
                .query_row([id.to_string()], |row| Ok((parsed(row, 0)?, read_epoch(row, 1)?, row.get(2)?)))
                .optional()?;
            Ok(found)
        })
    }

    /// Takes a host's word for the state of a project, if it owns it in the
    /// epoch of the report and no operation is under way. `true` if the state
    /// is another now.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn observe(&self, host: HostId, report: &ProjectReport) -> Result<bool> {
        let Some(epoch) = report.epoch else { return Ok(false) };
        let state = ProjectState::from(report.status.state);
        if state == ProjectState::Unknown {
            return self.doubt(host, epoch, report);
        }
        self.database.write("record a project's state", |db| {
            let changed = db.execute(
                "UPDATE projects SET state = ?4, reason = ?5, phases = ?6, started = ?7, unknown = NULL
                 WHERE id = ?1 AND host = ?2 AND epoch = ?3 AND fence IS NULL
                   AND state NOT IN ('creating', 'deleted') AND (state <> ?4 OR unknown IS NOT NULL)",
                params![
                    report.project.to_string(),
                    host.to_string(),
                    epoch.number(),
                    state.as_str(),
                    report.status.reason,
                    serde_json::to_string(&report.phases)?,
                    report.status.started.map(Timestamp::millis)
                ],
            )?;
            Ok(changed == 1)
        })
    }

    /// The same of one of which its host cannot tell the state.
    fn doubt(&self, host: HostId, epoch: Epoch, report: &ProjectReport) -> Result<bool> {
        let reason = report.status.reason.as_deref().unwrap_or("its host cannot tell what it does");
        self.database.write("record a project's state", |db| {
            let changed = db.execute(
                "UPDATE projects SET unknown = ?4
                 WHERE id = ?1 AND host = ?2 AND epoch = ?3 AND fence IS NULL
                   AND state NOT IN ('creating', 'deleted') AND unknown IS NOT ?4",
                params![report.project.to_string(), host.to_string(), epoch.number(), reason],
            )?;
            Ok(changed == 1)
        })
    }
}
