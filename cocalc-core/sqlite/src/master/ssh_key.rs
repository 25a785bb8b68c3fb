//! Public SSH keys of accounts and projects.

use cocalc_auth::stream::{AccountState, ProjectAcl, SshKey};
use cocalc_ids::{AccountId, KeyId, ProjectId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Account, Error, Result, Store, member, project};
use crate::{
    database::{parsed, parsed_opt},
    error::Fault,
};

/// A public SSH key in an account's list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredSshKey {
    /// Its place in the list.
    pub id: KeyId,
    /// As whom it acts.
    pub account: AccountId,
    /// The only project it opens; `None` opens all of the account's.
    pub project: Option<ProjectId>,
    /// OpenSSH text `algorithm base64`.
    pub key: String,
    /// What stands in front of it in `authorized_keys`; empty for nothing.
    pub options: String,
    /// What its owner calls it.
    pub comment: String,
    /// When it was added.
    pub created: Timestamp,
}

/// All keys of an account, or of a project, travel in one frame to hosts.
const KEYS_MAX: usize = 100;

const COLUMNS: &str = "id, account, project, key, comment, created, options";

fn read(row: &Row<'_>) -> rusqlite::Result<StoredSshKey> {
    Ok(StoredSshKey {
        id: parsed(row, 0)?,
        account: parsed(row, 1)?,
        project: parsed_opt(row, 2)?,
        key: row.get(3)?,
        comment: row.get(4)?,
        created: Timestamp::from_millis(row.get(5)?),
        options: row.get(6)?,
    })
}

fn list(db: &Connection, condition: &'static str, id: &str) -> rusqlite::Result<Vec<StoredSshKey>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM ssh_keys WHERE {condition} ORDER BY created, id"))?
        .query_map([id], read)?
        .collect()
}

fn on_stream(key: StoredSshKey) -> SshKey {
    SshKey { id: key.id, account: key.account, key: key.key, options: key.options }
}

impl Store {
    /// Adds a key. The same key for the same account and project stays as it
    /// is, but for its options, which become these.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if `project` is none of the account's, or the
    /// database failed.
    pub fn add_ssh_key(&self, key: &StoredSshKey) -> Result<StoredSshKey> {
        self.database.write("add an SSH key", |db| {
            let account = key.account.to_string();
            if let Some(project) = key.project {
                let member = "SELECT 1 FROM members WHERE project = ?1 AND account = ?2";
                let who = params![project.to_string(), account];
                if db.query_row(member, who, |_| Ok(())).optional()?.is_none() {
                    return Err(Fault::Refused(Error::NotFound { what: "project" }));
                }
            }
            let project = key.project.map(|id| id.to_string());
            let count = match project {
                Some(_) => "SELECT count(*) FROM ssh_keys WHERE project = ?1",
                None => "SELECT count(*) FROM ssh_keys WHERE account = ?1 AND project IS NULL",
            };
            let present: usize =
                db.query_row(count, [project.as_ref().unwrap_or(&account)], |row| row.get(0))?;
            if present >= KEYS_MAX {
                return Err(Fault::Refused(Error::TooMany { what: "SSH keys", limit: KEYS_MAX }));
            }
            let added = db.execute(
                "INSERT INTO ssh_keys (id, account, project, key, comment, created, options)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (account, key, ifnull(project, '')) DO UPDATE SET options = excluded.options
                 WHERE options <> excluded.options",
                params![
                    key.id.to_string(),
                    account,
                    project,
                    key.key,
                    key.comment,
                    key.created.millis(),
                    key.options
                ],
            )?;
            if let (1, Some(project)) = (added, key.project) {
                member::bump(db, project)?;
            }
            let sql =
                format!("SELECT {COLUMNS} FROM ssh_keys WHERE account = ?1 AND key = ?2 AND project IS ?3");
            Ok(db.query_row(&sql, params![account, key.key, project], read)?)
        })
    }

    /// The account's keys, oldest first.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn ssh_keys(&self, account: AccountId) -> Result<Vec<StoredSshKey>> {
        self.database.read("list SSH keys", |db| Ok(list(db, "account = ?1", &account.to_string())?))
    }

    /// Removes a key of the account, and returns what it was.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if the account has no such key, or the database
    /// failed.
    pub fn remove_ssh_key(&self, account: AccountId, id: KeyId) -> Result<StoredSshKey> {
        self.database.write("remove an SSH key", |db| {
            let sql = format!("DELETE FROM ssh_keys WHERE id = ?1 AND account = ?2 RETURNING {COLUMNS}");
            let removed = db
                .query_row(&sql, params![id.to_string(), account.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "SSH key" }))?;
            if let Some(project) = removed.project {
                member::bump(db, project)?;
            }
            Ok(removed)
        })
    }

    /// The whole ACL of a project, as hosts get it.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn project_acl(&self, id: ProjectId) -> Result<ProjectAcl> {
        self.database.read("read an ACL", |db| {
            let project = project::find(db, id)?;
            let members = member::list(db, id)?;
            let keys = list(db, "project = ?1", &id.to_string())?;
            Ok(ProjectAcl {
                project: id,
                version: project.acl_version,
                epoch: project.epoch,
                members: members.into_iter().map(|member| (member.account, member.role)).collect(),
                keys: keys.into_iter().map(on_stream).collect(),
                grace_ms: project.grace_ms,
                proxy_ssh: project.proxy_ssh,
                viewable_ports: project.viewable_ports,
                authorized_keys: project.authorized_keys,
            })
        })
    }

    /// What hosts get of an account.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn account_state(&self, id: AccountId) -> Result<AccountState> {
        let Account { session_epoch, banned, .. } = self.account(id)?;
        let keys = self.database.read::<_, Error>("list SSH keys", |db| {
            Ok(list(db, "account = ?1 AND project IS NULL", &id.to_string())?)
        })?;
        let ended_logins = self.database.read::<_, Error>("list ended log-ins", |db| {
            let sql = "SELECT tag FROM ended_logins WHERE account = ?1 ORDER BY ended, tag";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([id.to_string()], |row| parsed(row, 0))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })?;
        Ok(AccountState {
            account: id,
            session_epoch,
            ended_logins,
            banned,
            keys: keys.into_iter().map(on_stream).collect(),
        })
    }
}
