//! Repositories of backups: keys, and what is known of each.

use cocalc_core::backups::Status;
use cocalc_ids::{AccountId, HostId, ProjectId, Timestamp};
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
    /// In which repository, by its name.
    pub name: String,
    /// Since when.
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

/// The key of a repository.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackupKey {
    /// The repository's name.
    pub name: String,
    /// Text that only the master can open; empty until there is a key.
    pub wrapped: String,
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

const COLUMNS: &str = "project, name, created, used, pruned, checked, drilled, damage, erase_at";

fn read(row: &Row<'_>) -> rusqlite::Result<BackupRepository> {
    let time =
        |column| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(Timestamp::from_millis));
    Ok(BackupRepository {
        project: parsed(row, 0)?,
        name: row.get(1)?,
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

fn read_key(row: &Row<'_>) -> rusqlite::Result<BackupKey> {
    Ok(BackupKey { name: row.get(0)?, wrapped: row.get(1)? })
}

fn find(db: &Connection, project: ProjectId) -> Result<Option<BackupRepository>, Fault<Error>> {
    let sql = format!("SELECT {COLUMNS} FROM backup_repositories WHERE project = ?1");
    Ok(db.prepare_cached(&sql)?.query_row([project.to_string()], read).optional()?)
}

impl Store {
    /// The repository of a project and its key, if it has one.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn backup_repository(&self, project: ProjectId) -> Result<Option<(BackupRepository, BackupKey)>> {
        self.database.read("read a repository of backups", |db| {
            let Some(found) = find(db, project)? else { return Ok(None) };
            let sql = "SELECT name, wrapped FROM backup_keys WHERE name = ?1";
            let key = db.prepare_cached(sql)?.query_row([&found.name], read_key)?;
            Ok(Some((found, key)))
        })
    }

    /// Makes the repository of a project unless it has one: its own, or, with
    /// `per_shard`, one that so many projects share at most.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn make_backup_repository(
        &self,
        project: ProjectId,
        per_shard: Option<u32>,
        now: Timestamp,
    ) -> Result<()> {
        self.database.write("make a repository of backups", |db| {
            if find(db, project)?.is_some() {
                return Ok(());
            }
            let name = match per_shard {
                None => project.to_string(),
                Some(most) => {
                    let open = "SELECT name FROM backup_keys WHERE name LIKE 'shard-%' AND projects < ?1
                                ORDER BY created, name LIMIT 1";
                    let open: Option<String> = db.query_row(open, [most], |row| row.get(0)).optional()?;
                    // A number is never given twice: keys of shards stay.
                    let count = "SELECT count(*) FROM backup_keys WHERE name LIKE 'shard-%'";
                    let count: u64 = db.query_row(count, [], |row| row.get(0))?;
                    open.unwrap_or_else(|| format!("shard-{count}"))
                }
            };
            db.execute(
                "INSERT INTO backup_keys (name, wrapped, projects, created) VALUES (?1, '', 1, ?2)
                 ON CONFLICT (name) DO UPDATE SET projects = projects + 1",
                params![name, now.millis()],
            )?;
            db.execute(
                "INSERT INTO backup_repositories (project, name, created) VALUES (?1, ?2, ?3)",
                params![project.to_string(), name, now.millis()],
            )?;
            Ok(())
        })
    }

    /// All keys, in the order of their names, at most `limit` after `after`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn backup_keys(&self, after: &str, limit: usize) -> Result<Vec<BackupKey>> {
        self.database.read("list keys of repositories", |db| {
            let sql = "SELECT name, wrapped FROM backup_keys WHERE name > ?1 AND wrapped <> ''
                       ORDER BY name LIMIT ?2";
            let list = db
                .prepare_cached(sql)?
                .query_map(params![after, limit], read_key)?
                .collect::<Result<_, _>>()?;
            Ok(list)
        })
    }

    /// Puts another wrapping, or the first, in the place of `before`; whether
    /// that was still there.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn rewrap_backup_key(&self, before: &BackupKey, wrapped: &str) -> Result<bool> {
        self.database.write("wrap the key of a repository", |db| {
            let sql = "UPDATE backup_keys SET wrapped = ?3 WHERE name = ?1 AND wrapped = ?2";
            Ok(db.execute(sql, params![before.name, before.wrapped, wrapped])? == 1)
        })
    }

    /// The repositories that are damaged, at most `limit`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn damaged_backups(&self, limit: usize) -> Result<Vec<BackupRepository>> {
        self.database.read("list damaged repositories", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM backup_repositories WHERE damage IS NOT NULL ORDER BY project LIMIT ?1"
            );
            Ok(db.prepare_cached(&sql)?.query_map([limit], read)?.collect::<Result<_, _>>()?)
        })
    }

    /// How many projects wait for a backup, and of how many the last one
    /// failed, as their hosts say.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn count_pending_backups(&self) -> Result<(u64, u64)> {
        self.database.read("count pending backups", |db| {
            let sql = "SELECT count(json_extract(backup, '$.pending_since')), count(json_extract(backup, '$.failure'))
                       FROM projects WHERE backup IS NOT NULL AND state <> 'deleted'";
            Ok(db.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
        })
    }

    /// Who owns a project, or owned it.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn owner_ever(&self, project: ProjectId) -> Result<AccountId> {
        self.database.read("read a project's owner", |db| {
            let sql = "SELECT owner FROM projects WHERE id = ?1";
            db.query_row(sql, [project.to_string()], |row| parsed(row, 0))
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "project" }))
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

    /// Says when the backups of deleted projects are to be erased, where nobody
    /// has said it yet: of this project, or of all.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn schedule_erasures(&self, project: Option<ProjectId>, at: Timestamp) -> Result<usize> {
        let project = project.map(|id| id.to_string());
        self.database.write("schedule erasures", |db| {
            let sql = "UPDATE backup_repositories SET erase_at = ?1
                       WHERE erase_at IS NULL AND (?2 IS NULL OR project = ?2)
                         AND (SELECT state FROM projects WHERE id = project) = 'deleted'";
            Ok(db.execute(sql, params![at.millis(), project])?)
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

    /// Whether the backups of a project are being erased.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn erases_backups(&self, project: ProjectId) -> Result<bool> {
        self.database.read("ask whether backups are being erased", |db| {
            let sql = "SELECT EXISTS (SELECT 1 FROM operations WHERE project = ?1 AND state = 'running'
                       AND json_extract(job, '$.kind') = 'erase_backups')";
            Ok(db.query_row(sql, [project.to_string()], |row| row.get(0))?)
        })
    }

    /// The repository is erased: its key is, too. Repeating it is harmless.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn forget_backup_repository(&self, project: ProjectId) -> Result<()> {
        self.database.write("forget a repository", |db| {
            let id = project.to_string();
            db.execute("DELETE FROM backup_repositories WHERE project = ?1", [&id])?;
            // The key of a shard is the others', too.
            db.execute("DELETE FROM backup_keys WHERE name = ?1", [&id])?;
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
