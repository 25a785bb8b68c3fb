//! How a project may be reached, besides who may.

use cocalc_ids::ProjectId;
use rusqlite::params;

use super::{Result, Store, member, project};

/// How a project may be reached.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProjectAccess {
    /// The ports whose apps viewers may see, in order, each once.
    pub viewable_ports: Vec<u16>,
    /// How long cached rights go on after the lease; `None` is the default.
    pub grace_ms: Option<u64>,
    /// Whether a proxy that terminates SSH may attest for it.
    pub proxy_ssh: bool,
    /// Whether the project's own `~/.ssh/authorized_keys` opens it.
    pub authorized_keys: bool,
}

impl Store {
    /// How the project may be reached, with the version of its ACL.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`](super::Error::NotFound), or the database failed.
    pub fn project_access(&self, id: ProjectId) -> Result<(u64, ProjectAccess)> {
        self.database.read("read how a project may be reached", |db| {
            let found = project::find(db, id)?;
            Ok((found.acl_version, of(&found)))
        })
    }

    /// Changes how the project may be reached, and returns the version of the
    /// ACL that says so. Its host may go on with a longer grace of before,
    /// until [`grace_is_known`](Self::grace_is_known).
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`](super::Error::NotFound), or the database failed.
    pub fn change_access(
        &self,
        id: ProjectId,
        default_grace_ms: u64,
        change: impl FnOnce(&mut ProjectAccess),
    ) -> Result<(u64, ProjectAccess)> {
        self.database.write("change how a project may be reached", |db| {
            let found = project::find(db, id)?;
            let before = of(&found);
            let mut after = before.clone();
            change(&mut after);
            if after == before {
                return Ok((found.acl_version, after));
            }
            db.execute(
                "UPDATE projects SET viewable_ports = ?2, grace_ms = ?3, proxy_ssh = ?4, authorized_keys = ?6,
                   grace_known_ms = max(ifnull(grace_known_ms, 0), ?5) WHERE id = ?1",
                params![
                    id.to_string(),
                    serde_json::to_string(&after.viewable_ports)?,
                    after.grace_ms,
                    after.proxy_ssh,
                    before.grace_ms.unwrap_or(default_grace_ms),
                    after.authorized_keys,
                ],
            )?;
            Ok((member::bump(db, id)?, after))
        })
    }

    /// Its host has the ACL of `version`, and with it the present grace.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn grace_is_known(&self, id: ProjectId, version: u64) -> Result<()> {
        self.database.write("note a grace", |db| {
            db.execute(
                "UPDATE projects SET grace_known_ms = NULL WHERE id = ?1 AND acl_version = ?2",
                params![id.to_string(), version],
            )?;
            Ok(())
        })
    }
}

fn of(project: &project::Project) -> ProjectAccess {
    ProjectAccess {
        viewable_ports: project.viewable_ports.clone(),
        grace_ms: project.grace_ms,
        proxy_ssh: project.proxy_ssh,
        authorized_keys: project.authorized_keys,
    }
}
