//! Who may use a project.

use cocalc_ids::{AccountId, ProjectId, Role};
use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::{Error, Result, Store, project};
use crate::{database::parsed, error::Fault};

/// The whole set travels in one frame to hosts, and so do the keys.
const MEMBERS_MAX: usize = 1_000;

/// A member of a project.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Member {
    /// The account.
    pub account: AccountId,
    /// What it is to the project.
    pub role: Role,
}

/// As in the database and in JSON.
fn role_name(role: Role) -> &'static str {
    match role {
        Role::Owner => "owner",
        Role::Collaborator => "collaborator",
        // A role of a later version gets the least.
        _ => "viewer",
    }
}

fn role_of(name: &str) -> Role {
    match name {
        "owner" => Role::Owner,
        "collaborator" => Role::Collaborator,
        _ => Role::Viewer,
    }
}

/// Every change of who may do what makes a new version of the ACL, in the same
/// transaction.
pub(super) fn bump(db: &Transaction<'_>, project: ProjectId) -> rusqlite::Result<u64> {
    db.query_row(
        "UPDATE projects SET acl_version = acl_version + 1 WHERE id = ?1 RETURNING acl_version",
        [project.to_string()],
        |row| row.get(0),
    )
}

pub(super) fn list(db: &Connection, project: ProjectId) -> rusqlite::Result<Vec<Member>> {
    db.prepare_cached("SELECT account, role FROM members WHERE project = ?1 ORDER BY account")?
        .query_map([project.to_string()], |row| {
            Ok(Member { account: parsed(row, 0)?, role: role_of(row.get_ref(1)?.as_str()?) })
        })?
        .collect()
}

impl Store {
    /// The members of a project, with the version of the set.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn members(&self, project: ProjectId) -> Result<(u64, Vec<Member>)> {
        self.database.read("list members", |db| {
            let version = project::find(db, project)?.acl_version;
            Ok((version, list(db, project)?))
        })
    }

    /// What `account` is to `project`; `None` if nothing.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn role(&self, project: ProjectId, account: AccountId) -> Result<Option<Role>> {
        self.database.read("read a member's role", |db| {
            let sql = "SELECT m.role FROM members m JOIN projects p ON p.id = m.project
                       WHERE m.project = ?1 AND m.account = ?2 AND p.state <> 'deleted'";
            let role = db
                .prepare_cached(sql)?
                .query_row(params![project.to_string(), account.to_string()], |row| {
                    Ok(role_of(row.get_ref(0)?.as_str()?))
                })
                .optional()?;
            Ok(role)
        })
    }

    /// Makes `account` a member, or changes its role, and returns the version
    /// of the set. The owner's own role cannot be changed.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without such a project or account;
    /// [`Error::Owner`] for its owner; or the database failed.
    pub fn add_member(&self, project: ProjectId, account: AccountId, role: Role) -> Result<u64> {
        self.database.write("add a member", |db| {
            let found = project::find(db, project)?;
            if found.owner == account {
                return Err(Fault::Refused(Error::Owner));
            }
            let known = "SELECT 1 FROM accounts WHERE id = ?1";
            if db.query_row(known, [account.to_string()], |_| Ok(())).optional()?.is_none() {
                return Err(Fault::Refused(Error::NotFound { what: "account" }));
            }
            let count = "SELECT count(*) FROM members WHERE project = ?1 AND account <> ?2";
            let others: usize =
                db.query_row(count, params![project.to_string(), account.to_string()], |row| row.get(0))?;
            if others >= MEMBERS_MAX {
                return Err(Fault::Refused(Error::TooMany { what: "members", limit: MEMBERS_MAX }));
            }
            let changed = db.execute(
                "INSERT INTO members (project, account, role) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET role = excluded.role WHERE role <> excluded.role",
                params![project.to_string(), account.to_string(), role_name(role)],
            )?;
            if changed == 0 { Ok(found.acl_version) } else { Ok(bump(db, project)?) }
        })
    }

    /// Ends a membership, with the SSH keys that the account gave the project,
    /// and returns the version of the set. Removing who is no member is
    /// harmless.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without such a project; [`Error::Owner`] for its
    /// owner, who stays; or the database failed.
    pub fn remove_member(&self, project: ProjectId, account: AccountId) -> Result<u64> {
        self.database.write("remove a member", |db| {
            let found = project::find(db, project)?;
            if found.owner == account {
                return Err(Fault::Refused(Error::Owner));
            }
            let who = params![project.to_string(), account.to_string()];
            let removed = db.execute("DELETE FROM members WHERE project = ?1 AND account = ?2", who)?;
            let keys = db.execute("DELETE FROM ssh_keys WHERE project = ?1 AND account = ?2", who)?;
            if removed + keys == 0 { Ok(found.acl_version) } else { Ok(bump(db, project)?) }
        })
    }
}
