//! What was answered to calls that may be repeated.

use std::time::Duration;

use cocalc_ids::{AccountId, Timestamp};
use rusqlite::{OptionalExtension, params};

use super::{Result, Store};

/// How long an answer is remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(24 * 3600);

/// What is known of a call with an idempotency key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Remembered {
    /// It is new, and now remembered as under way.
    New,
    /// It is under way.
    UnderWay,
    /// The key was used for something else.
    Other,
    /// It was answered.
    Answered {
        /// The HTTP status.
        status: u16,
        /// The body.
        body: Vec<u8>,
    },
}

impl Store {
    /// Looks a call up, and marks it as under way if it is new.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn recall(
        &self,
        account: AccountId,
        key: &str,
        request: &[u8; 32],
        now: Timestamp,
    ) -> Result<Remembered> {
        self.database.write("look a repeated call up", |db| {
            let old =
                now.millis().saturating_sub(i64::try_from(REMEMBERED_FOR.as_millis()).unwrap_or(i64::MAX));
            db.execute("DELETE FROM idempotency WHERE created < ?1", [old])?;
            type Row = ([u8; 32], Option<u16>, Option<Vec<u8>>);
            let found: Option<Row> = db
                .query_row(
                    "SELECT request, status, body FROM idempotency WHERE account = ?1 AND key = ?2",
                    params![account.to_string(), key],
                    |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
                )
                .optional()?;
            Ok(match found {
                Some((known, ..)) if known != *request => Remembered::Other,
                Some((_, Some(status), body)) => {
                    Remembered::Answered { status, body: body.unwrap_or_default() }
                }
                Some(_) => Remembered::UnderWay,
                None => {
                    db.execute(
                        "INSERT INTO idempotency (account, key, request, created) VALUES (?1, ?2, ?3, ?4)",
                        params![account.to_string(), key, request, now.millis()],
                    )?;
                    Remembered::New
                }
            })
        })
    }

    /// Remembers the answer to a call.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn remember(&self, account: AccountId, key: &str, status: u16, body: &[u8]) -> Result<()> {
        self.database.write("remember an answer", |db| {
            let sql = "UPDATE idempotency SET status = ?3, body = ?4 WHERE account = ?1 AND key = ?2";
            db.execute(sql, params![account.to_string(), key, status, body])?;
            Ok(())
        })
    }

    /// Forgets a call that came to nothing, so that it may be tried again.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn forget(&self, account: AccountId, key: &str) -> Result<()> {
        self.database.write("forget a call", |db| {
            let sql = "DELETE FROM idempotency WHERE account = ?1 AND key = ?2 AND status IS NULL";
            db.execute(sql, params![account.to_string(), key])?;
            Ok(())
        })
    }

    /// Forgets the calls that an earlier process did not answer. Repeating
    /// them is harmless, because what they make is named by their key.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn forget_unanswered(&self) -> Result<()> {
        self.database.write("forget unanswered calls", |db| {
            db.execute("DELETE FROM idempotency WHERE status IS NULL", [])?;
            Ok(())
        })
    }
}
