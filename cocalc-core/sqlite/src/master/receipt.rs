//! Receipts of revocations: where a change is in force.

pub use cocalc_auth::receipt::Settled;
use cocalc_core::connector::Peer;
use cocalc_ids::{AccountId, HostId, ProjectId, ProxyId, ReceiptId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Error, Result, Store};
use crate::{database::parsed, error::Fault};

/// Receipts are forgotten after so long.
const KEPT_MS: i64 = 30 * 24 * 3600 * 1000;

/// A revocation, and who held what was revoked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StoredReceipt {
    /// Its id.
    pub id: ReceiptId,
    /// Who asked for the change.
    pub account: AccountId,
    /// What was changed, for instance `collaborator.remove`.
    pub change: String,
    /// Of what: a project, an account or a key.
    pub subject: String,
    /// When.
    pub created: Timestamp,
    /// Everybody who held it then.
    pub holders: Vec<StoredHolder>,
}

/// One host or proxy of a receipt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StoredHolder {
    /// Who.
    pub peer: Peer,
    /// The longest lease and grace that it may know, in milliseconds.
    pub hold_ms: u64,
    /// What became of it, and after how many milliseconds.
    pub settled: Option<(Settled, u64)>,
}

fn parts(peer: Peer) -> (&'static str, String) {
    match peer {
        Peer::Host(id) => ("host", id.to_string()),
        Peer::Proxy(id) => ("proxy", id.to_string()),
    }
}

fn read_holder(row: &Row<'_>) -> rusqlite::Result<StoredHolder> {
    let peer = match row.get_ref(0)?.as_str()? {
        "host" => Peer::Host(parsed::<HostId>(row, 1)?),
        _ => Peer::Proxy(parsed::<ProxyId>(row, 1)?),
    };
    let outcome = row.get_ref(3)?.as_str_or_null()?;
    let settled = match outcome {
        None => None,
        Some("acknowledged") => Some((Settled::Acknowledged, row.get(4)?)),
        Some(_) => Some((Settled::Expired, row.get(4)?)),
    };
    Ok(StoredHolder { peer, hold_ms: row.get(2)?, settled })
}

fn holders(db: &Connection, id: ReceiptId) -> rusqlite::Result<Vec<StoredHolder>> {
    db.prepare_cached(
        "SELECT kind, peer, hold_ms, outcome, millis FROM receipt_holders WHERE receipt = ?1 ORDER BY kind, peer",
    )?
    .query_map([id.to_string()], read_holder)?
    .collect()
}

fn read(row: &Row<'_>) -> rusqlite::Result<StoredReceipt> {
    Ok(StoredReceipt {
        id: parsed(row, 0)?,
        account: parsed(row, 1)?,
        change: row.get(2)?,
        subject: row.get(3)?,
        created: Timestamp::from_millis(row.get(4)?),
        holders: Vec::new(),
    })
}

const COLUMNS: &str = "id, account, change, subject, created";

impl Store {
    /// Keeps a new receipt, and forgets those of long ago.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn add_receipt(&self, receipt: &StoredReceipt) -> Result<()> {
        self.database.write("keep a receipt", |db| {
            db.execute(
                "DELETE FROM receipt_holders WHERE receipt IN (SELECT id FROM receipts WHERE created < ?1)",
                [receipt.created.millis() - KEPT_MS],
            )?;
            db.execute("DELETE FROM receipts WHERE created < ?1", [receipt.created.millis() - KEPT_MS])?;
            db.execute(
                "INSERT INTO receipts (id, account, change, subject, created) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    receipt.id.to_string(),
                    receipt.account.to_string(),
                    receipt.change,
                    receipt.subject,
                    receipt.created.millis()
                ],
            )?;
            for holder in &receipt.holders {
                let (kind, peer) = parts(holder.peer);
                db.execute(
                    "INSERT INTO receipt_holders (receipt, kind, peer, hold_ms) VALUES (?1, ?2, ?3, ?4)",
                    params![receipt.id.to_string(), kind, peer, holder.hold_ms],
                )?;
            }
            Ok(())
        })
    }

    /// Notes what became of a revocation at a holder, after so many
    /// milliseconds. What was noted first stays.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn settle_receipt(&self, id: ReceiptId, peer: Peer, settled: Settled, millis: u64) -> Result<()> {
        self.database.write("settle a receipt", |db| {
            let (kind, peer) = parts(peer);
            db.execute(
                "UPDATE receipt_holders SET outcome = ?4, millis = ?5
                 WHERE receipt = ?1 AND kind = ?2 AND peer = ?3 AND outcome IS NULL",
                params![id.to_string(), kind, peer, settled.as_str(), millis],
            )?;
            Ok(())
        })
    }

    /// The receipt.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn receipt(&self, id: ReceiptId) -> Result<StoredReceipt> {
        self.database.read("read a receipt", |db| {
            let sql = format!("SELECT {COLUMNS} FROM receipts WHERE id = ?1");
            let mut receipt = db
                .prepare_cached(&sql)?
                .query_row([id.to_string()], read)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "receipt" }))?;
            receipt.holders = holders(db, id)?;
            Ok(receipt)
        })
    }

    /// The receipts that are not settled everywhere, oldest first.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn open_receipts(&self) -> Result<Vec<StoredReceipt>> {
        self.database.read("list open receipts", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM receipts WHERE id IN
                   (SELECT receipt FROM receipt_holders WHERE outcome IS NULL) ORDER BY created, id"
            );
            let mut receipts =
                db.prepare_cached(&sql)?.query_map([], read)?.collect::<rusqlite::Result<Vec<_>>>()?;
            for receipt in &mut receipts {
                receipt.holders = holders(db, receipt.id)?;
            }
            Ok(receipts)
        })
    }

    /// The longest grace that the host may know of a project: of this one, or
    /// of any on `host`. `default_ms` is the federation's.
    ///
    /// What concerns an account concerns every project: the host may still take
    /// it for a member of one that it was removed from a moment ago.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn longest_grace(&self, host: HostId, project: Option<ProjectId>, default_ms: u64) -> Result<u64> {
        self.database.read("find a grace", |db| {
            let sql = "SELECT max(max(ifnull(p.grace_ms, ?3), ifnull(p.grace_known_ms, 0))) FROM projects p
                       WHERE p.host = ?1 AND p.state <> 'deleted' AND (?2 IS NULL OR p.id = ?2)";
            let longest: Option<u64> = db.prepare_cached(sql)?.query_row(
                params![host.to_string(), project.map(|id| id.to_string()), default_ms],
                |row| row.get(0),
            )?;
            Ok(longest.unwrap_or(default_ms))
        })
    }
}
