//! The secrets of projects, which this file cannot open.

use cocalc_ids::{ProjectId, Timestamp};
use rusqlite::params;

use super::{Error, Result, Store, project};
use crate::error::Fault;

/// How many secrets a project may have.
const SECRETS_MAX: usize = 64;

/// A secret, as it is kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredSecret {
    /// Its name.
    pub name: String,
    /// Its value, wrapped.
    pub wrapped: String,
    /// When it was set.
    pub updated: Timestamp,
}

impl Store {
    /// Sets a secret of a project.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], [`Error::TooMany`], or the database failed.
    pub fn set_secret(&self, id: ProjectId, secret: &StoredSecret) -> Result<()> {
        self.database.write("set a secret", |db| {
            project::find(db, id)?;
            let others: usize = db.query_row(
                "SELECT count(*) FROM project_secrets WHERE project = ?1 AND name <> ?2",
                params![id.to_string(), secret.name],
                |row| row.get(0),
            )?;
            if others >= SECRETS_MAX {
                return Err(Fault::Refused(Error::TooMany { what: "secrets", limit: SECRETS_MAX }));
            }
            db.execute(
                "INSERT OR REPLACE INTO project_secrets (project, name, wrapped, updated)
                 VALUES (?1, ?2, ?3, ?4)",
                params![id.to_string(), secret.name, secret.wrapped, secret.updated.millis()],
            )?;
            Ok(())
        })
    }

    /// Removes a secret; whether there was one.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn remove_secret(&self, id: ProjectId, name: &str) -> Result<bool> {
        self.database.write("remove a secret", |db| {
            let sql = "DELETE FROM project_secrets WHERE project = ?1 AND name = ?2";
            Ok(db.execute(sql, params![id.to_string(), name])? == 1)
        })
    }

    /// Removes all secrets of a project.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn remove_secrets(&self, id: ProjectId) -> Result<()> {
        self.database.write("remove the secrets of a project", |db| {
            db.execute("DELETE FROM project_secrets WHERE project = ?1", [id.to_string()])?;
            Ok(())
        })
    }

    /// The secrets of a project, in the order of their names.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn secrets(&self, id: ProjectId) -> Result<Vec<StoredSecret>> {
        self.database.read("list secrets", |db| {
            let sql = "SELECT name, wrapped, updated FROM project_secrets WHERE project = ?1 ORDER BY name";
            let list = db
                .prepare_cached(sql)?
                .query_map([id.to_string()], |row| {
                    Ok(StoredSecret {
                        name: row.get(0)?,
                        wrapped: row.get(1)?,
                        updated: Timestamp::from_millis(row.get(2)?),
                    })
                })?
                .collect::<Result<_, _>>()?;
            Ok(list)
        })
    }
}
