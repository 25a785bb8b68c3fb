//! Hosts that an operator has said to be dead.

use cocalc_ids::{AccountId, HostId, Timestamp};
use rusqlite::{Row, params};

use super::{Host, Result, Store, peer::find_host};
use crate::database::{parsed, parsed_opt};

/// An operator's word that a host is dead.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fence {
    /// Since when it counts.
    pub at: Timestamp,
    /// Whose word it is.
    pub by: AccountId,
    /// Why, in that person's words.
    pub reason: String,
    /// When the host had been heard of last, if that was known.
    pub heard: Option<Timestamp>,
}

/// The fence in the four columns from `first` on.
pub(super) fn read(row: &Row<'_>, first: usize) -> rusqlite::Result<Option<Fence>> {
    let at = row.get::<_, Option<i64>>(first)?.map(Timestamp::from_millis);
    let by = parsed_opt(row, first + 1)?;
    let Some((at, by)) = at.zip(by) else { return Ok(None) };
    Ok(Some(Fence {
        at,
        by,
        reason: row.get::<_, Option<String>>(first + 2)?.unwrap_or_default(),
        heard: row.get::<_, Option<i64>>(first + 3)?.map(Timestamp::from_millis),
    }))
}

impl Store {
    /// Notes that a host is dead, on somebody's word. Saying so again changes
    /// nothing: the first word counts.
    ///
    /// # Errors
    ///
    /// [`NotFound`](super::Error::NotFound), or the database failed.
    pub fn fence(&self, id: HostId, fence: &Fence) -> Result<Host> {
        self.database.write("fence a host", |db| {
            db.execute(
                "UPDATE peers SET fenced = ?2, fenced_by = ?3, fence_reason = ?4, fence_heard = ?5
                 WHERE id = ?1 AND kind = 'host' AND fenced IS NULL",
                params![
                    id.to_string(),
                    fence.at.millis(),
                    fence.by.to_string(),
                    fence.reason,
                    fence.heard.map(Timestamp::millis)
                ],
            )?;
            find_host(db, id)
        })
    }

    /// Takes that back: the host may have a lease again. What has another owner
    /// since keeps it.
    ///
    /// # Errors
    ///
    /// [`NotFound`](super::Error::NotFound), or the database failed.
    pub fn unfence(&self, id: HostId) -> Result<Host> {
        self.database.write("unfence a host", |db| {
            db.execute(
                "UPDATE peers SET fenced = NULL, fenced_by = NULL, fence_reason = NULL, fence_heard = NULL
                 WHERE id = ?1 AND kind = 'host'",
                [id.to_string()],
            )?;
            find_host(db, id)
        })
    }

    /// The hosts that are fenced.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn fenced_hosts(&self) -> Result<Vec<HostId>> {
        self.database.read("list fenced hosts", |db| {
            let sql = "SELECT id FROM peers WHERE kind = 'host' AND fenced IS NOT NULL ORDER BY id";
            Ok(db.prepare_cached(sql)?.query_map([], |row| parsed(row, 0))?.collect::<Result<_, _>>()?)
        })
    }
}
