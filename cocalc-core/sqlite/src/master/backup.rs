//! Repositories of backups: keys, and what is known of each.

use cocalc_core::backups::Status;
use cocalc_ids::{HostId, ProjectId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Error, Result, Store};
use crate::{
    database::{json, parsed},
    error::Fault,
};

/// The repository of a project's backups.
#[derive(Clone, Debug, PartialEq)]
pub struct BackupRepository {
    /// Whose.
    pub project: ProjectId,
    /// Its key, wrapped: text that only the master can open.
    pub wrapped: String,
    /// When the key was made.
    pub created: Timestamp,
    /// Whether a host ever got it to add backups.
    pub used: bool,
    /// When it was last tidied up.
    pub pruned: Option<Timestamp>,
    /// When it was last checked.
    pub checked: Option<Timestamp>,
    /// When a backup of it was last tried out.
    pub drilled: Option<Timestamp>,
    /// What the last check found, if it found damage.
    pub damage: Option<Vec<String>>,
    /// When it is to be erased.
    pub erase_at: Option<Timestamp>,
}

/// What is done to repositories now and then.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Tending {
    /// Tidied up: what the policy does not keep, and what nothing needs.
    Pruned,
    /// Checked for damage.
    Checked,
    /// A backup of it is tried out.
    Drilled,
}

impl Tending {
    fn column(self) -> &'static str {
        match self {
            Self::Pruned => "pruned",
            Self::Checked => "checked",
            Self::Drilled => "drilled",
        }
    }
}

const COLUMNS: &str = "project, wrapped, created, used, pruned, checked, drilled, damage, erase_at";

fn read(row: &Row<'_>) -> rusqlite::Result<BackupRepository> {
    let time =
        |column| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(Timestamp::from_millis));
    Ok(BackupRepository {
        project: parsed(row, 0)?,
        wrapped: row.get(1)?,
        created: Timestamp::from_millis(row.get(2)?),
        used: row.get(3)?,
        pruned: time(4)?,
        checked: time(5)?,
        drilled: time(6)?,
        damage: match row.get_ref(7)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(json(row, 7)?),
        },
        erase_at: time(8)?,
    })
}

fn find(db: &Connection, project: ProjectId) -> Result<Option<BackupRepository>, Fault<Error>> {
    let sql = format!("SELECT {COLUMNS} FROM backup_repositories WHERE project = ?1");
    Ok(db.prepare_cached(&sql)?.query_row([project.to_string()], read).optional()?)
}

impl Store {
    /// The repository of a project, if it has one.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn backup_repository(&self, project: ProjectId) -> Result<Option<BackupRepository>> {
        self.database.read("read a repository of backups", |db| find(db, project))
    }

    /// Makes the repository of a project, with this wrapped key, unless it has
    /// one: that is returned as it is.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn make_backup_repository(
        &self,
        project: ProjectId,
        wrapped: &str,
        now: Timestamp,
    ) -> Result<BackupRepository> {
        self.database.write("make a repository of backups", |db| {
            db.execute(
                "INSERT INTO backup_repositories (project, wrapped, created) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO NOTHING",
                params![project.to_string(), wrapped, now.millis()],
            )?;
            find(db, project)?.ok_or(Fault::Refused(Error::NotFound { what: "repository" }))
        })
    }

    /// All repositories, in the order of their projects, at most `limit` after
    /// `after`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn backup_repositories(
        &self,
        after: Option<ProjectId>,
        limit: usize,
    ) -> Result<Vec<BackupRepository>> {
        let after = after.map(|id| id.to_string()).unwrap_or_default();
        self.database.read("list repositories of backups", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM backup_repositories WHERE project > ?1 ORDER BY project LIMIT ?2"
            );
            let list =
                db.prepare_cached(&sql)?.query_map(params![after, limit], read)?.collect::<Result<_, _>>()?;
            Ok(list)
        })
    }

    /// Puts another wrapping of the same key in the place of `before`; whether
    /// that was still there.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn rewrap_backup_key(&self, project: ProjectId, before: &str, wrapped: &str) -> Result<bool> {
        self.database.write("wrap the key of a repository anew", |db| {
            let sql = "UPDATE backup_repositories SET wrapped = ?3 WHERE project = ?1 AND wrapped = ?2";
            Ok(db.execute(sql, params![project.to_string(), before, wrapped])? == 1)
        })
    }

    /// A host gets the key to add backups.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn use_backup_repository(&self, project: ProjectId) -> Result<()> {
        self.database.write("use a repository of backups", |db| {
            let sql = "UPDATE backup_repositories SET used = 1 WHERE project = ?1 AND used = 0";
            db.execute(sql, [project.to_string()])?;
            Ok(())
        })
    }

    /// The repositories in use of which this was not done since `before`, the
    /// longest ago first, at most `limit`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn backup_repositories_due(
        &self,
        tending: Tending,
        before: Timestamp,
        limit: usize,
    ) -> Result<Vec<BackupRepository>> {
        self.database.read("list repositories that are due", |db| {
            let column = tending.column();
            let sql = format!(
                "SELECT {COLUMNS} FROM backup_repositories
                 WHERE used = 1 AND erase_at IS NULL AND ifnull({column}, created) < ?1
                 ORDER BY ifnull({column}, created), project LIMIT ?2"
            );
            let list = db
                .prepare_cached(&sql)?
                .query_map(params![before.millis(), limit], read)?
                .collect::<Result<_, _>>()?;
            Ok(list)
        })
    }

    /// Notes that this was done.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn tended_backups(&self, project: ProjectId, tending: Tending, now: Timestamp) -> Result<()> {
        self.database.write("note what was done to a repository", |db| {
            let column = tending.column();
            let sql = format!("UPDATE backup_repositories SET {column} = ?2 WHERE project = ?1");
            db.execute(&sql, params![project.to_string(), now.millis()])?;
            Ok(())
        })
    }

    /// Notes what a check found; `None` if nothing is damaged.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn set_backup_damage(&self, project: ProjectId, damage: Option<&[String]>) -> Result<()> {
        let damage = damage.map(|damage| serde_json::json!(damage).to_string());
        self.database.write("note damage of a repository", |db| {
            let sql = "UPDATE backup_repositories SET damage = ?2 WHERE project = ?1";
            db.execute(sql, params![project.to_string(), damage])?;
            Ok(())
        })
    }

    /// How many repositories there are, and how many are damaged.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn count_backup_repositories(&self) -> Result<(u64, u64)> {
        self.database.read("count repositories", |db| {
            let sql = "SELECT count(*), count(damage) FROM backup_repositories WHERE used = 1";
            Ok(db.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
        })
    }

    /// Says when repositories of deleted projects are to be erased, of those of
    /// which nobody has said it yet.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn schedule_erasures(&self, at: Timestamp) -> Result<usize> {
        self.database.write("schedule erasures", |db| {
            let sql = "UPDATE backup_repositories SET erase_at = ?1 WHERE erase_at IS NULL AND project IN
                       (SELECT id FROM projects WHERE state = 'deleted')";
            Ok(db.execute(sql, [at.millis()])?)
        })
    }

    /// The repositories that are to be erased by `now`, at most `limit`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn erasures_due(&self, now: Timestamp, limit: usize) -> Result<Vec<BackupRepository>> {
        self.database.read("list erasures that are due", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM backup_repositories WHERE erase_at <= ?1 ORDER BY erase_at, project LIMIT ?2"
            );
            let list = db
                .prepare_cached(&sql)?
                .query_map(params![now.millis(), limit], read)?
                .collect::<Result<_, _>>()?;
            Ok(list)
        })
    }

    /// The repository is erased: its key is, too. Repeating it is harmless.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn forget_backup_repository(&self, project: ProjectId) -> Result<()> {
        self.database.write("forget a repository", |db| {
            db.execute("DELETE FROM backup_repositories WHERE project = ?1", [project.to_string()])?;
            Ok(())
        })
    }

    /// Takes a host's word for how a project stands with its backups, if it
    /// owns it in that epoch; whether it does.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn set_backup_status(&self, host: HostId, status: &Status) -> Result<bool> {
        let text = serde_json::json!(status).to_string();
        self.database.write("record how backups stand", |db| {
            let changed = db.execute(
                "UPDATE projects SET backup = ?4
                 WHERE id = ?1 AND host = ?2 AND epoch = ?3 AND state <> 'deleted'",
                params![status.project.to_string(), host.to_string(), status.epoch.number(), text],
            )?;
            Ok(changed == 1)
        })
    }
}
