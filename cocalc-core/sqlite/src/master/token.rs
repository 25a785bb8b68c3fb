//! Tokens of the API and for joining, of which only the hash is kept.

use std::{collections::BTreeSet, time::Duration};

use cocalc_auth::token::LoginTag;
use cocalc_ids::{AccountId, HostId, KeyId, ProjectId, Timestamp};
use rusqlite::{OptionalExtension, Row, params, types::ValueRef};
use serde::{Deserialize, Serialize};

use super::{Account, Error, Result, Store, account};
use crate::{
    database::{json, parsed},
    error::Fault,
};

/// How long it is remembered that a log-in has ended: longer than any browser
/// session lives (30 days) and the tokens that may still open one.
const ENDED_LOGIN_LIFE: Duration = Duration::from_secs(31 * 24 * 3600);
/// How many of them an account may have; the one after signs it out everywhere.
const ENDED_LOGINS_MAX: i64 = 256;

/// An API token, as it is listed: never the token itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiToken {
    /// Its id.
    pub id: KeyId,
    /// What people call it; may be empty.
    pub name: String,
    /// What it may; `None`: all that its account may.
    pub limits: Option<KeyLimits>,
    /// When it was made.
    pub created: Timestamp,
    /// When it ends.
    pub expires: Option<Timestamp>,
}

/// What a scoped API key may, at most. It never administers the federation.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLimits {
    /// Only these projects; `None`: any of its account's.
    pub projects: Option<BTreeSet<ProjectId>>,
    /// What it may do.
    pub verbs: BTreeSet<Verb>,
}

/// What a scoped API key may do.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Look at projects, their operations and hosts.
    Read,
    /// Get connect tokens: use what runs in projects.
    Connect,
    /// Start and stop projects, take and restore snapshots, move them.
    Operate,
    /// Change members and access, and delete projects.
    Manage,
    /// Make projects.
    Create,
    /// Change the account itself: its SSH keys. Not its API keys.
    Account,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Connect, Self::Operate, Self::Manage, Self::Create, Self::Account];
}

/// Who a bearer token speaks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bearer {
    /// The account, banned or not.
    pub account: Account,
    /// Which token; `None` if somebody else vouches.
    pub key: Option<KeyId>,
    /// What it may; `None`: all that its account may.
    pub limits: Option<KeyLimits>,
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

fn limits(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<KeyLimits>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        // What this program cannot read must not become all.
        _ => json(row, column).map(Some),
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
                "INSERT INTO api_tokens (hash, id, account, created, expires, name, limits)
                 SELECT ?1, ?2, id, ?4, ?5, ?6, ?7 FROM accounts WHERE id = ?3",
                params![
                    hash,
                    token.id.to_string(),
                    account.to_string(),
                    token.created.millis(),
                    token.expires.map(Timestamp::millis),
                    token.name,
                    token.limits.as_ref().map(serde_json::to_string).transpose()?
                ],
            )?;
            if added == 1 { Ok(()) } else { Err(Fault::Refused(Error::NotFound { what: "account" })) }
        })
    }

    /// Who an API token speaks for.
    ///
    /// # Errors
    ///
    /// [`Error::BadToken`] if there is none, or the database failed.
    pub fn bearer(&self, hash: &[u8; 32], now: Timestamp) -> Result<Bearer> {
        self.database.read("look an API token up", |db| {
            let sql = format!(
                "SELECT {}, t.id, t.limits FROM api_tokens t JOIN accounts a ON a.id = t.account
                 WHERE t.hash = ?1 AND (t.expires IS NULL OR t.expires > ?2)
                   AND (t.session_epoch IS NULL OR t.session_epoch = a.session_epoch)",
                account::COLUMNS
            );
            db.prepare_cached(&sql)?
                .query_row(params![hash, now.millis()], |row| {
                    Ok(Bearer {
                        account: account::read(row)?,
                        key: Some(parsed(row, account::WIDTH)?),
                        limits: limits(row, account::WIDTH + 1)?,
                    })
                })
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
            let sql = "SELECT id, created, expires, name, limits FROM api_tokens
                       WHERE account = ?1 ORDER BY created, id";
            let tokens = db
                .prepare_cached(sql)?
                .query_map([account.to_string()], |row| {
                    Ok(ApiToken {
                        id: parsed(row, 0)?,
                        name: row.get(3)?,
                        limits: limits(row, 4)?,
                        created: Timestamp::from_millis(row.get(1)?),
                        expires: row.get::<_, Option<i64>>(2)?.map(Timestamp::from_millis),
                    })
                })?
                .collect::<Result<_, _>>()?;
            Ok(tokens)
        })
    }

    /// Ends an API token, and notes for hosts that what was opened under it ends
    /// with it.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if the account has no such token, or the database
    /// failed.
    pub fn remove_api_token(&self, account: AccountId, token: KeyId, now: Timestamp) -> Result<()> {
        self.database.write("remove an API token", |db| {
            let sql = "DELETE FROM api_tokens WHERE id = ?1 AND account = ?2";
            if db.execute(sql, params![token.to_string(), account.to_string()])? != 1 {
                return Err(Fault::Refused(Error::NotFound { what: "API token" }));
            }
            let (id, tag) = (account.to_string(), LoginTag::of(token).to_string());
            let life = i64::try_from(ENDED_LOGIN_LIFE.as_millis()).unwrap_or(i64::MAX);
            let oldest = now.millis().saturating_sub(life);
            db.execute("DELETE FROM ended_logins WHERE account = ?1 AND ended < ?2", params![id, oldest])?;
            let add = "INSERT OR REPLACE INTO ended_logins (account, tag, ended) VALUES (?1, ?2, ?3)";
            db.execute(add, params![id, tag, now.millis()])?;
            let count = "SELECT count(*) FROM ended_logins WHERE account = ?1";
            if db.query_row(count, [&id], |row| row.get::<_, i64>(0))? > ENDED_LOGINS_MAX {
                // Rather one log-in too many ends than one that should have goes on.
                account::end_all_logins(db, &id)?;
                db.execute("DELETE FROM ended_logins WHERE account = ?1", [&id])?;
            }
            Ok(())
        })
    }

    /// Remembers the hash of a new join token, and forgets those that have
    /// ended. One for a `peer` gives that peer another key.
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
        peer: Option<[u8; 16]>,
    ) -> Result<()> {
        self.database.write("add a join token", |db| {
            db.execute("DELETE FROM join_tokens WHERE expires <= ?1", [now.millis()])?;
            db.execute(
                "INSERT INTO join_tokens (hash, kind, created, expires, peer) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    hash,
                    kind.as_str(),
                    now.millis(),
                    expires.millis(),
                    peer.map(|id| HostId::from_bytes(id).to_string())
                ],
            )?;
            Ok(())
        })
    }
}
