//! How people log in: local passwords, and identities that others vouch for.

use cocalc_ids::{AccountId, Timestamp};
use rusqlite::{OptionalExtension, params};

use super::{Account, ApiToken, Error, Result, Store, account};
use crate::error::Fault;

/// How many identities one account may have.
const IDENTITIES_MAX: usize = 20;

/// Whom an account is at somebody else's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// Who vouches: an OpenID provider's issuer, or an integrator's accounts.
    pub provider: String,
    /// Their name for the person, which never changes.
    pub subject: String,
    /// Since when.
    pub created: Timestamp,
}

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

    /// What verifies an account's password, if it has one.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn password_of(&self, account: AccountId) -> Result<Option<String>> {
        self.database.read("look a password up", |db| {
            let sql = "SELECT hash FROM passwords WHERE account = ?1";
            Ok(db.prepare_cached(sql)?.query_row([account.to_string()], |row| row.get(0)).optional()?)
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
        let sql = format!(
            "SELECT {} FROM identities i JOIN accounts a ON a.id = i.account
             WHERE i.provider = ?1 AND i.subject = ?2",
            account::COLUMNS
        );
        // As a rule they are known, and the writer is not waited for.
        let known: Result<Option<Account>> = self.database.read("find who logs in", |db| {
            Ok(db.prepare_cached(&sql)?.query_row(params![provider, subject], account::read).optional()?)
        });
        if let Some(known) = known? {
            return Ok(known);
        }
        self.database.write("find who logs in", |db| {
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

    /// The identities of an account, oldest first.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn identities(&self, account: AccountId) -> Result<Vec<Identity>> {
        self.database.read("list identities", |db| {
            let sql = "SELECT provider, subject, created FROM identities
                       WHERE account = ?1 ORDER BY created, provider, subject";
            let read = |row: &rusqlite::Row<'_>| {
                Ok(Identity {
                    provider: row.get(0)?,
                    subject: row.get(1)?,
                    created: Timestamp::from_millis(row.get(2)?),
                })
            };
            let found =
                db.prepare_cached(sql)?.query_map([account.to_string()], read)?.collect::<Result<_, _>>()?;
            Ok(found)
        })
    }

    /// Lets `provider` vouch for the account under the name `subject`. Doing it
    /// twice is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if that is another account's, [`Error::TooMany`],
    /// [`Error::NotFound`] without such an account, or the database failed.
    pub fn link_identity(
        &self,
        account: AccountId,
        provider: &str,
        subject: &str,
        now: Timestamp,
    ) -> Result<()> {
        self.database.write("link an identity", |db| {
            let sql = "SELECT account FROM identities WHERE provider = ?1 AND subject = ?2";
            let whose: Option<String> =
                db.query_row(sql, params![provider, subject], |row| row.get(0)).optional()?;
            match whose {
                Some(whose) if whose == account.to_string() => return Ok(()),
                Some(_) => {
                    return Err(Fault::Refused(Error::Exists { what: "an account with that identity" }));
                }
                None => {}
            }
            let sql = "SELECT count(*) FROM identities WHERE account = ?1";
            let count: usize = db.query_row(sql, [account.to_string()], |row| row.get(0))?;
            if count >= IDENTITIES_MAX {
                return Err(Fault::Refused(Error::TooMany { what: "identities", limit: IDENTITIES_MAX }));
            }
            let linked = db.execute(
                "INSERT INTO identities (provider, subject, account, created)
                 SELECT ?1, ?2, id, ?4 FROM accounts WHERE id = ?3",
                params![provider, subject, account.to_string(), now.millis()],
            )?;
            if linked == 1 { Ok(()) } else { Err(Fault::Refused(Error::NotFound { what: "account" })) }
        })
    }

    /// Takes an identity from an account. What stays must include a way to log
    /// in: a password, or an identity of a provider that is one of `usable`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if the account has no such identity,
    /// [`Error::LastWayIn`], or the database failed.
    pub fn unlink_identity(
        &self,
        account: AccountId,
        provider: &str,
        subject: &str,
        usable: &[String],
    ) -> Result<()> {
        self.database.write("unlink an identity", |db| {
            let account = account.to_string();
            let removed = db.execute(
                "DELETE FROM identities WHERE account = ?1 AND provider = ?2 AND subject = ?3",
                params![account, provider, subject],
            )?;
            if removed == 0 {
                return Err(Fault::Refused(Error::NotFound { what: "identity" }));
            }
            let sql = "SELECT EXISTS (SELECT 1 FROM passwords WHERE account = ?1)";
            let password: bool = db.query_row(sql, [&account], |row| row.get(0))?;
            let mut others = db.prepare_cached("SELECT provider FROM identities WHERE account = ?1")?;
            let others =
                others.query_map([&account], |row| row.get(0))?.collect::<Result<Vec<String>, _>>()?;
            // Refused, it is undone with the transaction.
            if password || others.iter().any(|other| usable.contains(other)) {
                Ok(())
            } else {
                Err(Fault::Refused(Error::LastWayIn))
            }
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
}
