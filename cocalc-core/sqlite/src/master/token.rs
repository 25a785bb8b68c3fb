//! Tokens of the API and for joining, of which only the hash is kept.

use cocalc_ids::{AccountId, KeyId, Timestamp};
use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::{Account, Error, Result, Store, account};
use crate::{database::parsed, error::Fault};

/// An API token, as it is listed: never the token itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiToken {
    /// Its name.
    pub id: KeyId,
    /// When it was made.
    pub created: Timestamp,
    /// When it ends.
    pub expires: Option<Timestamp>,
}

/// What a join token admits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JoinKind {
    /// A host.
    Host,
    /// A proxy.
    Proxy,
}

impl JoinKind {
    /// As in the database and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Proxy => "proxy",
        }
    }
}

impl Store {
    /// Remembers the hash of a new API token.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] without such an account, or the database failed.
    pub fn add_api_token(&self, hash: &[u8; 32], account: AccountId, token: &ApiToken) -> Result<()> {
        self.database.write("add an API token", |db| {
            let added = db.execute(
                "INSERT INTO api_tokens (hash, id, account, created, expires)
                 SELECT ?1, ?2, id, ?4, ?5 FROM accounts WHERE id = ?3",
                params![
                    hash,
                    token.id.to_string(),
                    account.to_string(),
                    token.created.millis(),
                    token.expires.map(Timestamp::millis)
                ],
            )?;
            if added == 1 { Ok(()) } else { Err(Fault::Refused(Error::NotFound { what: "account" })) }
        })
    }

    /// The account that an API token speaks for, banned or not.
    ///
    /// # Errors
    ///
    /// [`Error::BadToken`] if there is none, or the database failed.
    pub fn account_of_token(&self, hash: &[u8; 32], now: Timestamp) -> Result<Account> {
        self.database.read("look an API token up", |db| {
            let sql = format!(
                "SELECT {} FROM api_tokens t JOIN accounts a ON a.id = t.account
                 WHERE t.hash = ?1 AND (t.expires IS NULL OR t.expires > ?2)",
                account::COLUMNS
            );
            db.prepare_cached(&sql)?
                .query_row(params![hash, now.millis()], account::read)
                .optional()?
                .ok_or(Fault::Refused(Error::BadToken))
        })
    }

    /// The account's API tokens, oldest first.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn api_tokens(&self, account: AccountId) -> Result<Vec<ApiToken>> {
        self.database.read("list API tokens", |db| {
            let sql = "SELECT id, created, expires FROM api_tokens WHERE account = ?1 ORDER BY created, id";
            let tokens = db
                .prepare_cached(sql)?
                .query_map([account.to_string()], |row| {
                    Ok(ApiToken {
                        id: parsed(row, 0)?,
                        created: Timestamp::from_millis(row.get(1)?),
                        expires: row.get::<_, Option<i64>>(2)?.map(Timestamp::from_millis),
                    })
                })?
                .collect::<Result<_, _>>()?;
            Ok(tokens)
        })
    }

    /// Ends an API token.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if the account has no such token, or the database
    /// failed.
    pub fn remove_api_token(&self, account: AccountId, token: KeyId) -> Result<()> {
        self.database.write("remove an API token", |db| {
            let sql = "DELETE FROM api_tokens WHERE id = ?1 AND account = ?2";
            match db.execute(sql, params![token.to_string(), account.to_string()])? {
                1 => Ok(()),
                _ => Err(Fault::Refused(Error::NotFound { what: "API token" })),
            }
        })
    }

    /// Remembers the hash of a new join token, and forgets those that have
    /// ended.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn add_join_token(
        &self,
        hash: &[u8; 32],
        kind: JoinKind,
        now: Timestamp,
        expires: Timestamp,
    ) -> Result<()> {
        self.database.write("add a join token", |db| {
            db.execute("DELETE FROM join_tokens WHERE expires <= ?1", [now.millis()])?;
            db.execute(
                "INSERT INTO join_tokens (hash, kind, created, expires) VALUES (?1, ?2, ?3, ?4)",
                params![hash, kind.as_str(), now.millis(), expires.millis()],
            )?;
            Ok(())
        })
    }
}
