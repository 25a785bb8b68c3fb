//! Accounts.

use cocalc_ids::{AccountId, HostId, Timestamp};
use rusqlite::{OptionalExtension, Row, params};

use super::{ApiToken, Error, Result, Store};
use crate::{database::parsed, error::Fault};

/// A person's or a service's account.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Account {
    /// Its id.
    pub id: AccountId,
    /// Its name, for people.
    pub name: String,
    /// Whether it administers the federation.
    pub admin: bool,
    /// Grows when the account signs out everywhere.
    pub session_epoch: u64,
    /// A banned account may do nothing.
    pub banned: bool,
    /// When it was made.
    pub created: Timestamp,
}

/// The next session epoch. It never falls below the time in seconds: after a
/// backup was restored it would otherwise be counted anew, and a session of the
/// days that were lost, signed out since, would be good again.
macro_rules! later_epoch {
    () => {
        "max(session_epoch + 1, unixepoch())"
    };
}

pub(super) const COLUMNS: &str = "a.id, a.name, a.admin, a.session_epoch, a.banned, a.created";
/// How many they are.
pub(super) const WIDTH: usize = 6;

/// Signs the account out everywhere, inside a transaction.
pub(super) fn end_all_logins(db: &rusqlite::Connection, account: &str) -> rusqlite::Result<()> {
    let sql = concat!("UPDATE accounts SET session_epoch = ", later_epoch!(), " WHERE id = ?1");
    db.execute(sql, [account]).map(drop)
}

pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Account> {
    Ok(Account {
        id: parsed(row, 0)?,
        name: row.get(1)?,
        admin: row.get(2)?,
        session_epoch: row.get(3)?,
        banned: row.get(4)?,
        created: Timestamp::from_millis(row.get(5)?),
    })
}

impl Store {
    /// Makes an account. One of this id is returned as it is, so that a
    /// repeated call makes no second one.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn create_account(&self, id: AccountId, name: &str, admin: bool, now: Timestamp) -> Result<Account> {
        self.database.write("create an account", |db| {
            db.execute(
                "INSERT INTO accounts (id, name, admin, created) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING",
                params![id.to_string(), name, admin, now.millis()],
            )?;
            let sql = format!("SELECT {COLUMNS} FROM accounts a WHERE a.id = ?1");
            Ok(db.query_row(&sql, [id.to_string()], read)?)
        })
    }

    /// The account.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn account(&self, id: AccountId) -> Result<Account> {
        self.database.read("read an account", |db| {
            let sql = format!("SELECT {COLUMNS} FROM accounts a WHERE a.id = ?1");
            db.prepare_cached(&sql)?
                .query_row([id.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "account" }))
        })
    }

    /// All accounts, by name, at most `limit` after `after`.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn accounts(&self, after: Option<AccountId>, limit: usize) -> Result<Vec<Account>> {
        self.database.read("list accounts", |db| {
            let sql = format!("SELECT {COLUMNS} FROM accounts a WHERE a.id > ?1 ORDER BY a.id LIMIT ?2");
            let after = after.map(|id| id.to_string()).unwrap_or_default();
            let accounts =
                db.prepare_cached(&sql)?.query_map(params![after, limit], read)?.collect::<Result<_, _>>()?;
            Ok(accounts)
        })
    }

    /// Whether any account administers the federation.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn has_admin(&self) -> Result<bool> {
        self.database.read("look for an administrator", |db| {
            Ok(db.query_row("SELECT EXISTS (SELECT 1 FROM accounts WHERE admin)", [], |row| row.get(0))?)
        })
    }

    /// Makes the first administrator with an API token, unless there is an
    /// administrator: both or none.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn create_first_admin(&self, id: AccountId, hash: &[u8; 32], token: &ApiToken) -> Result<bool> {
        self.database.write("make the first administrator", |db| {
            let made = db.execute(
                "INSERT INTO accounts (id, name, admin, created) SELECT ?1, 'admin', 1, ?2
                 WHERE NOT EXISTS (SELECT 1 FROM accounts WHERE admin)",
                params![id.to_string(), token.created.millis()],
            )?;
            if made == 1 {
                db.execute(
                    "INSERT INTO api_tokens (hash, id, account, created) VALUES (?1, ?2, ?3, ?4)",
                    params![hash, token.id.to_string(), id.to_string(), token.created.millis()],
                )?;
            }
            Ok(made == 1)
        })
    }

    /// Signs the account out everywhere: tokens and sessions of before end.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn sign_out(&self, id: AccountId) -> Result<Account> {
        self.change_account(id, "sign an account out", concat!("session_epoch = ", later_epoch!()))
    }

    /// Bans the account, which also signs it out, or lifts the ban.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn ban(&self, id: AccountId, banned: bool) -> Result<Account> {
        let change =
            if banned { concat!("banned = 1, session_epoch = ", later_epoch!()) } else { "banned = 0" };
        self.change_account(id, "ban an account", change)
    }

    fn change_account(
        &self,
        id: AccountId,
        operation: &'static str,
        change: &'static str,
    ) -> Result<Account> {
        self.database.write(operation, |db| {
            db.execute(&format!("UPDATE accounts SET {change} WHERE id = ?1"), [id.to_string()])?;
            let sql = format!("SELECT {COLUMNS} FROM accounts a WHERE a.id = ?1");
            db.query_row(&sql, [id.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "account" }))
        })
    }

    /// The hosts that hold a project of which the account is a member.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn hosts_of_account(&self, id: AccountId) -> Result<Vec<HostId>> {
        self.database.read("find an account's hosts", |db| {
            let sql = "SELECT DISTINCT p.host FROM members m JOIN projects p ON p.id = m.project
                       WHERE m.account = ?1 AND p.state <> 'deleted' ORDER BY p.host";
            let hosts = db
                .prepare_cached(sql)?
                .query_map([id.to_string()], |row| parsed(row, 0))?
                .collect::<Result<_, _>>()?;
            Ok(hosts)
        })
    }

    /// The members of any project that `host` holds.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn accounts_of_host(&self, host: HostId) -> Result<Vec<Account>> {
        self.database.read("find a host's accounts", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM accounts a WHERE a.id IN
                   (SELECT m.account FROM projects p JOIN members m ON m.project = p.id
                    WHERE p.host = ?1 AND p.state <> 'deleted') ORDER BY a.id"
            );
            let accounts =
                db.prepare_cached(&sql)?.query_map([host.to_string()], read)?.collect::<Result<_, _>>()?;
            Ok(accounts)
        })
    }
}
