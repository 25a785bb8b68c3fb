//! Other names of projects.

use cocalc_ids::{ProjectAlias, ProjectId};
use rusqlite::{OptionalExtension as _, params};

use super::{Error, Project, Result, Store, project};
use crate::{database::parsed, error::Fault};

impl Store {
    /// Gives a project another name, in the place of the one it had, or takes
    /// it away.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], [`Error::Busy`], [`Error::Exists`] if another project
    /// has it, or the database failed.
    pub fn set_alias(&self, id: ProjectId, alias: Option<ProjectAlias>) -> Result<Project> {
        self.database.write("name a project", |db| {
            let mut project = project::find(db, id)?;
            if let Some(operation) = project.fence {
                return Err(Fault::Refused(Error::Busy { operation }));
            }
            db.execute("DELETE FROM project_aliases WHERE project = ?1", [id.to_string()])?;
            if let Some(alias) = &alias {
                let sql = "DELETE FROM project_aliases WHERE alias = ?1
                           AND (SELECT state FROM projects WHERE id = project) = 'deleted'";
                db.execute(sql, [alias.as_str()])?;
                let sql = "INSERT OR IGNORE INTO project_aliases (alias, project) VALUES (?1, ?2)";
                if db.execute(sql, params![alias.as_str(), id.to_string()])? == 0 {
                    return Err(Fault::Refused(Error::Exists { what: "a project of this name" }));
                }
            }
            project.config.alias = alias;
            let config = serde_json::to_string(&project.config)?;
            db.execute("UPDATE projects SET config = ?2 WHERE id = ?1", params![id.to_string(), config])?;
            Ok(project)
        })
    }

    /// The project that has this other name, if one has.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn project_of_alias(&self, alias: &ProjectAlias) -> Result<Option<ProjectId>> {
        self.database.read("find a project by its name", |db| {
            let sql = "SELECT a.project FROM project_aliases a JOIN projects p ON p.id = a.project
                       WHERE a.alias = ?1 AND p.state <> 'deleted'";
            Ok(db.prepare_cached(sql)?.query_row([alias.as_str()], |row| parsed(row, 0)).optional()?)
        })
    }
}
