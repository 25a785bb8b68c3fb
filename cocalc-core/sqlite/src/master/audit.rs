//! Heads of audit chains.

use cocalc_ids::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Error, Result, Store};
use crate::error::Fault;

/// For how many days a head is kept.
pub const AUDIT_DAYS_MAX: i64 = 400;

/// The head of a chain, as a host or proxy signed it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AuditHead {
    /// How many lines.
    pub count: u64,
    /// The hash of the last, in hexadecimal.
    pub hash: String,
    /// When, by the peer's clock.
    pub time: Timestamp,
    /// When it came, by the master's.
    pub received: Timestamp,
    /// The key that signed it, which the peer had then.
    pub identity: String,
    /// Its signature.
    pub signature: String,
}

/// What is known of a peer's chain.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AuditHeads {
    /// The last head of each day, oldest first.
    pub heads: Vec<AuditHead>,
    /// The first that contradicted them: the chain was cut, or written anew.
    pub contradiction: Option<AuditHead>,
}

const COLUMNS: &str = "count, hash, time, received, identity, signature";

fn read(row: &Row<'_>) -> rusqlite::Result<AuditHead> {
    Ok(AuditHead {
        count: row.get(0)?,
        hash: row.get(1)?,
        time: Timestamp::from_millis(row.get(2)?),
        received: Timestamp::from_millis(row.get(3)?),
        identity: row.get(4)?,
        signature: row.get(5)?,
    })
}

fn last(db: &Connection, peer: &str) -> rusqlite::Result<Option<AuditHead>> {
    let sql = format!("SELECT {COLUMNS} FROM audit_heads WHERE peer = ?1 ORDER BY day DESC LIMIT 1");
    db.prepare_cached(&sql)?.query_row([peer], read).optional()
}

impl Store {
    /// Keeps the head of a peer's chain (`host:<id>`, `proxy:<id>`) as the last
    /// of its day, for [`AUDIT_DAYS_MAX`] days. One that contradicts the last
    /// one of the same key is kept aside if it is the first that does, and
    /// `false`: fewer lines than before, or as many with another hash.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn keep_audit_head(&self, peer: &str, head: &AuditHead) -> Result<bool> {
        self.database.write("keep an audit head", |db| {
            let last = last(db, peer)?;
            // Who joined anew has another key, and began anew.
            let contradicts = last.filter(|last| last.identity == head.identity).is_some_and(|last| {
                head.count < last.count || (head.count == last.count && head.hash != last.hash)
            });
            let (time, received) = (head.time.millis(), head.received.millis());
            let AuditHead { count, hash, identity, signature, .. } = head;
            if contradicts {
                let sql = format!(
                    "INSERT OR IGNORE INTO audit_contradictions (peer, {COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"
                );
                db.execute(&sql, params![peer, count, hash, time, received, identity, signature])?;
                return Ok(false);
            }
            let day = head.received.secs().div_euclid(86_400);
            let sql = format!(
                "INSERT OR REPLACE INTO audit_heads (peer, day, {COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"
            );
            db.execute(&sql, params![peer, day, count, hash, time, received, identity, signature])?;
            db.execute(
                "DELETE FROM audit_heads WHERE peer = ?1 AND day <= ?2",
                params![peer, day - AUDIT_DAYS_MAX],
            )?;
            Ok(true)
        })
    }

    /// What is known of a peer's chain.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn audit_heads(&self, peer: &str) -> Result<AuditHeads> {
        self.database.read("read audit heads", |db| {
            let sql = format!("SELECT {COLUMNS} FROM audit_heads WHERE peer = ?1 ORDER BY day");
            let heads = db.prepare_cached(&sql)?.query_map([peer], read)?.collect::<Result<_, _>>()?;
            let sql = format!("SELECT {COLUMNS} FROM audit_contradictions WHERE peer = ?1");
            let contradiction = db.prepare_cached(&sql)?.query_row([peer], read).optional()?;
            Ok::<_, Fault<Error>>(AuditHeads { heads, contradiction })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    fn head(count: u64, hash: &str, at: i64) -> AuditHead {
        let (time, received) = (Timestamp::from_secs(at - 1), Timestamp::from_secs(at));
        AuditHead { count, hash: hash.into(), time, received, identity: "key".into(), signature: "s".into() }
    }

    #[test]
    fn the_last_of_each_day_is_kept_and_what_contradicts_it_is_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("master.db")).unwrap();
        for (count, hash, at, kept) in [
            (5, "a", 10, true),
            (9, "b", 20, true),
            // Nothing new, the next day.
            (9, "b", DAY + 1, true),
            (8, "c", DAY + 2, false),
            (9, "d", DAY + 3, false),
            (12, "e", DAY + 4, true),
        ] {
            assert_eq!(
                store.keep_audit_head("host:x", &head(count, hash, at)).unwrap(),
                kept,
                "{count} {hash}"
            );
        }
        let found = store.audit_heads("host:x").unwrap();
        assert_eq!(found.heads, [head(9, "b", 20), head(12, "e", DAY + 4)]);
        assert_eq!(found.contradiction, Some(head(8, "c", DAY + 2)), "the first");
        // Another key is another chain.
        let anew = AuditHead { identity: "other".into(), ..head(1, "z", DAY + 5) };
        assert!(store.keep_audit_head("host:x", &anew).unwrap());
        assert!(store.keep_audit_head("host:x", &head(12, "e", DAY + 6)).unwrap());
        assert_eq!(store.audit_heads("host:y").unwrap(), AuditHeads::default());
        for day in 2..AUDIT_DAYS_MAX + 50 {
            assert!(store.keep_audit_head("host:x", &head(12, "e", day * DAY)).unwrap());
        }
        assert_eq!(store.audit_heads("host:x").unwrap().heads.len() as i64, AUDIT_DAYS_MAX);
    }
}
