//! How people log in: local passwords, and identities that others vouch for.

use cocalc_ids::{AccountId, KeyId, Timestamp};
use rusqlite::{OptionalExtension, params};

use super::{Account, ApiToken, Error, Result, Store, account};
use crate::error::Fault;

impl Store {
    /// Sets the name and password with which an account logs in; `hash` is
    /// argon2id's.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without such an account, [`Error::Exists`] for a
    /// name that another has, or the database failed.
    pub fn set_password(&self, account: AccountId, login: &str, hash: &str, now: Timestamp) -> Result<()> {
        self.database.write("set a password", |db| {
            let taken = "SELECT 1 FROM passwords WHERE login = ?1 AND account <> ?2";
            if db.query_row(taken, params![login, account.to_string()], |_| Ok(())).optional()?.is_some() {
                return Err(Fault::Refused(Error::Exists { what: "an account of that name" }));
            }
            let set = db.execute(
                "INSERT INTO passwords (account, login, hash, changed)
                 SELECT id, ?2, ?3, ?4 FROM accounts WHERE id = ?1
                 ON CONFLICT (account) DO UPDATE SET login = ?2, hash = ?3, changed = ?4",
                params![account.to_string(), login, hash, now.millis()],
            )?;
            if set == 1 { Ok(()) } else { Err(Fault::Refused(Error::NotFound { what: "account" })) }
        })
    }

    /// The account that logs in with this name, and what verifies its password.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn password(&self, login: &str) -> Result<Option<(Account, String)>> {
        self.database.read("look a log-in up", |db| {
            let sql = format!(
                "SELECT {}, p.hash FROM passwords p JOIN accounts a ON a.id = p.account WHERE p.login = ?1",
                account::COLUMNS
            );
            let found = db
                .prepare_cached(&sql)?
                .query_row([login], |row| Ok((account::read(row)?, row.get(account::WIDTH)?)))
                .optional()?;
            Ok(found)
        })
    }

    /// The account for which `provider` vouches under the name `subject`; made
    /// with `name` at the first time, if `make` says so.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is none and none may be made, or the
    /// database failed.
    pub fn account_of_identity(
        &self,
        provider: &str,
        subject: &str,
        make: Option<(AccountId, &str)>,
        now: Timestamp,
    ) -> Result<Account> {
        self.database.write("find who logs in", |db| {
            let sql = format!(
                "SELECT {} FROM identities i JOIN accounts a ON a.id = i.account
                 WHERE i.provider = ?1 AND i.subject = ?2",
                account::COLUMNS
            );
            let find = || db.query_row(&sql, params![provider, subject], account::read).optional();
            if let Some(found) = find()? {
                return Ok(found);
            }
            let Some((id, name)) = make else {
                return Err(Fault::Refused(Error::NotFound { what: "account" }));
            };
            db.execute(
                "INSERT INTO accounts (id, name, admin, created) VALUES (?1, ?2, 0, ?3) ON CONFLICT DO NOTHING",
                params![id.to_string(), name, now.millis()],
            )?;
            db.execute(
                "INSERT INTO identities (provider, subject, account, created) VALUES (?1, ?2, ?3, ?4)",
                params![provider, subject, id.to_string(), now.millis()],
            )?;
            find()?.ok_or(Fault::Refused(Error::NotFound { what: "account" }))
        })
    }

    /// Remembers the hash of a log-in's token: it ends when the account signs
    /// out everywhere, and at `expires`. Ended ones are forgotten.
    ///
    /// # Errors
    ///
    /// [`Error::Stale`] if the account has signed out since it was read, or the
    /// database failed.
    pub fn add_login(&self, hash: &[u8; 32], account: &Account, token: &ApiToken) -> Result<()> {
        self.database.write("log in", |db| {
            db.execute("DELETE FROM api_tokens WHERE expires <= ?1", [token.created.millis()])?;
            let added = db.execute(
                "INSERT INTO api_tokens (hash, id, account, created, expires, name, session_epoch)
                 SELECT ?1, ?2, id, ?4, ?5, ?6, session_epoch FROM accounts
                 WHERE id = ?3 AND session_epoch = ?7 AND banned = 0",
                params![
                    hash,
                    token.id.to_string(),
                    account.id.to_string(),
                    token.created.millis(),
                    token.expires.map(Timestamp::millis),
                    token.name,
                    account.session_epoch
                ],
            )?;
            if added == 1 { Ok(()) } else { Err(Fault::Refused(Error::Stale { what: "account" })) }
        })
    }

    /// Ends a log-in or an API key by what it shows. One that has ended already
    /// is harmless.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn end_token(&self, hash: &[u8; 32]) -> Result<Option<KeyId>> {
        self.database.write("log out", |db| {
            let sql = "DELETE FROM api_tokens WHERE hash = ?1 RETURNING id";
            let ended = db.query_row(sql, [hash], |row| crate::database::parsed(row, 0)).optional()?;
            Ok(ended)
        })
    }
}
