//! Hosts and proxies.

use cocalc_core::{control::Capabilities, router::HostAddress};
use cocalc_ids::{HostId, HostName, ImageDigest, ProxyId, SessionId, Timestamp};
use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{Error, JoinKind, Result, Store};
use crate::{
    database::{json, parsed, parsed_opt},
    error::Fault,
};

/// A project-host.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// Its id.
    pub id: HostId,
    /// Its name.
    pub name: HostName,
    /// Where it listens, with the identity key it is pinned to.
    pub address: HostAddress,
    /// What it can do; `None` before it registered.
    pub capabilities: Option<Capabilities>,
    /// Its SSH host keys.
    pub ssh_host_keys: Vec<String>,
    /// The process that registered last.
    pub session: Option<SessionId>,
    /// When it registered last.
    pub last_seen: Option<Timestamp>,
    /// Whether it takes new projects no more.
    pub cordoned: bool,
    /// When it was withdrawn: it is let in no more.
    pub withdrawn: Option<Timestamp>,
    /// When it joined.
    pub created: Timestamp,
}

/// An enrolled proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct Proxy {
    /// Its id.
    pub id: ProxyId,
    /// Its name.
    pub name: HostName,
    /// Where it listens, with its identity key.
    pub address: HostAddress,
    /// Its SSH host keys.
    pub ssh_host_keys: Vec<String>,
    /// The process that registered last.
    pub session: Option<SessionId>,
    /// When it registered last.
    pub last_seen: Option<Timestamp>,
    /// When it was withdrawn: it is let in no more.
    pub withdrawn: Option<Timestamp>,
    /// When it joined.
    pub created: Timestamp,
}

/// Somebody who joins with a one-use token.
#[derive(Clone, Debug)]
pub struct Joining<'a> {
    /// SHA-256 of the join token.
    pub token: &'a [u8; 32],
    /// The kind that the token must be for.
    pub kind: JoinKind,
    /// Its name.
    pub name: &'a HostName,
    /// Where it listens; `identity` is its key.
    pub address: &'a HostAddress,
    /// The id it gets, unless it joined with this token before.
    pub id: [u8; 16],
}

/// What a peer says of itself when it connects.
#[derive(Clone, Debug)]
pub struct Registration<'a> {
    /// This start of its process.
    pub session: SessionId,
    /// The kernel's boot id.
    pub boot_id: &'a str,
    /// Where it listens. The identity key of the row stays what it was.
    pub address: &'a HostAddress,
    /// Its SSH host keys.
    pub ssh_host_keys: &'a [String],
    /// Hosts: what it can do.
    pub capabilities: Option<&'a Capabilities>,
}

const COLUMNS: &str = "id, name, address, capabilities, ssh_host_keys, session, last_seen, cordoned, created, identity, withdrawn";

fn read_host(row: &Row<'_>) -> rusqlite::Result<Host> {
    Ok(Host {
        id: parsed(row, 0)?,
        name: parsed(row, 1)?,
        address: read_address(row)?,
        capabilities: match row.get_ref(3)? {
            rusqlite::types::ValueRef::Null => None,
            _ => Some(json(row, 3)?),
        },
        ssh_host_keys: json(row, 4)?,
        session: parsed_opt(row, 5)?,
        last_seen: row.get::<_, Option<i64>>(6)?.map(Timestamp::from_millis),
        cordoned: row.get(7)?,
        created: Timestamp::from_millis(row.get(8)?),
        withdrawn: row.get::<_, Option<i64>>(10)?.map(Timestamp::from_millis),
    })
}

fn read_proxy(row: &Row<'_>) -> rusqlite::Result<Proxy> {
    Ok(Proxy {
        id: parsed(row, 0)?,
        name: parsed(row, 1)?,
        address: read_address(row)?,
        ssh_host_keys: json(row, 4)?,
        session: parsed_opt(row, 5)?,
        last_seen: row.get::<_, Option<i64>>(6)?.map(Timestamp::from_millis),
        created: Timestamp::from_millis(row.get(8)?),
        withdrawn: row.get::<_, Option<i64>>(10)?.map(Timestamp::from_millis),
    })
}

/// The key that was registered at the join is the one that counts, whatever
/// the address says.
fn read_address(row: &Row<'_>) -> rusqlite::Result<HostAddress> {
    Ok(HostAddress { identity: row.get(9)?, ..json(row, 2)? })
}

impl Store {
    /// Uses a join token up, and enrolls who holds it. The same peer with the
    /// same token gets the same id again, and may correct its name and address.
    ///
    /// A token that was made for a peer gives that peer the key of `joining`:
    /// the one it had is good for nothing from then on, and a peer that was
    /// withdrawn is let in again.
    ///
    /// # Errors
    ///
    /// [`Error::BadToken`] if the token is unknown, used by another, expired or
    /// of the other kind; [`Error::Exists`] for a name or identity that another
    /// peer has; or the database failed.
    pub fn join(&self, joining: &Joining<'_>, now: Timestamp) -> Result<[u8; 16]> {
        self.database.write("enroll a peer", |db| {
            let token = db
                .query_row(
                    "SELECT used_by, peer FROM join_tokens WHERE hash = ?1 AND kind = ?2 AND expires > ?3",
                    params![joining.token, joining.kind.as_str(), now.millis()],
                    |row| Ok((parsed_opt::<HostId>(row, 0)?, parsed_opt::<HostId>(row, 1)?)),
                )
                .optional()?;
            let id = match token {
                None => return Err(Fault::Refused(Error::BadToken)),
                Some((None, None)) => {
                    let id = HostId::from_random_bytes(joining.id);
                    refuse_taken(db, joining, id)?;
                    enroll(db, joining, id, now)?;
                    id
                }
                Some((None, Some(id))) => {
                    refuse_taken(db, joining, id)?;
                    let kept = "SELECT 1 FROM peers WHERE id = ?1 AND identity = ?2";
                    let known = params![id.to_string(), joining.address.identity];
                    if db.query_row(kept, known, |_| Ok(())).optional()?.is_some() {
                        // Another key is what it is for.
                        return Err(Fault::Refused(Error::Exists { what: "a peer with that identity key" }));
                    }
                    db.execute(
                        "UPDATE peers SET identity = ?2, withdrawn = NULL WHERE id = ?1",
                        params![id.to_string(), joining.address.identity],
                    )?;
                    update(db, joining, id)?;
                    use_up(db, joining, id)?;
                    id
                }
                Some((Some(id), _)) => {
                    let same = "SELECT 1 FROM peers WHERE id = ?1 AND identity = ?2 AND withdrawn IS NULL";
                    let known = params![id.to_string(), joining.address.identity];
                    if db.query_row(same, known, |_| Ok(())).optional()?.is_none() {
                        return Err(Fault::Refused(Error::BadToken));
                    }
                    refuse_taken(db, joining, id)?;
                    update(db, joining, id)?;
                    id
                }
            };
            Ok(*id.as_bytes())
        })
    }

    /// Withdraws a host or proxy: its key is good for nothing from now on. Its
    /// tokens to join with another key are ended.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn withdraw_peer(&self, kind: JoinKind, id: [u8; 16], now: Timestamp) -> Result<()> {
        let id = HostId::from_bytes(id).to_string();
        self.database.write("withdraw a peer", |db| {
            let changed = db.execute(
                "UPDATE peers SET withdrawn = ifnull(withdrawn, ?3), session = NULL WHERE id = ?1 AND kind = ?2",
                params![id, kind.as_str(), now.millis()],
            )?;
            db.execute("DELETE FROM join_tokens WHERE peer = ?1 AND used_by IS NULL", [&id])?;
            if changed == 1 { Ok(()) } else { Err(Fault::Refused(Error::NotFound { what: kind.as_str() })) }
        })
    }

    /// Records what a host or proxy says of itself.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn register(&self, id: [u8; 16], registration: &Registration<'_>, now: Timestamp) -> Result<()> {
        self.database.write("register a peer", |db| {
            let changed = db.execute(
                "UPDATE peers SET session = ?2, boot_id = ?3, address = ?4, ssh_host_keys = ?5,
                 capabilities = ?6, last_seen = ?7 WHERE id = ?1 AND withdrawn IS NULL",
                params![
                    HostId::from_bytes(id).to_string(),
                    registration.session.to_string(),
                    registration.boot_id,
                    serde_json::to_string(registration.address)?,
                    serde_json::to_string(registration.ssh_host_keys)?,
                    registration.capabilities.map(serde_json::to_string).transpose()?,
                    now.millis()
                ],
            )?;
            if changed == 1 { Ok(()) } else { Err(Fault::Refused(Error::NotFound { what: "peer" })) }
        })
    }

    /// So much space is free on a host's volume now. Harmless before it has
    /// registered.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn set_free_bytes(&self, id: HostId, free_bytes: u64) -> Result<()> {
        self.database.write("note a host's free space", |db| {
            // SQLite's integers are signed; no volume is that large.
            let free = i64::try_from(free_bytes).unwrap_or(i64::MAX);
            db.execute(
                "UPDATE peers SET capabilities = json_set(capabilities, '$.free_bytes', ?2)
                 WHERE id = ?1 AND kind = 'host' AND capabilities IS NOT NULL",
                params![id.to_string(), free],
            )?;
            Ok(())
        })
    }

    /// A host has these images now, the default first. Harmless before it has
    /// registered.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn set_images(&self, id: HostId, images: Vec<ImageDigest>) -> Result<()> {
        self.database.write("note a host's images", |db| {
            db.execute(
                "UPDATE peers SET capabilities = json_set(capabilities, '$.images', json(?2))
                 WHERE id = ?1 AND kind = 'host' AND capabilities IS NOT NULL",
                params![id.to_string(), serde_json::to_string(&images)?],
            )?;
            Ok(())
        })
    }

    /// The host, withdrawn or not.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn host(&self, id: HostId) -> Result<Host> {
        self.database.read("read a host", |db| {
            let sql = format!("SELECT {COLUMNS} FROM peers WHERE id = ?1 AND kind = 'host'");
            db.prepare_cached(&sql)?
                .query_row([id.to_string()], read_host)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "host" }))
        })
    }

    /// The host of that name.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn host_named(&self, name: &HostName) -> Result<Host> {
        self.database.read("read a host", |db| {
            let sql = format!("SELECT {COLUMNS} FROM peers WHERE name = ?1 AND kind = 'host'");
            db.query_row(&sql, [name.as_str()], read_host)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "host" }))
        })
    }

    /// All hosts that were not withdrawn, by name.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn hosts(&self) -> Result<Vec<Host>> {
        self.database.read("list hosts", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM peers WHERE kind = 'host' AND withdrawn IS NULL ORDER BY name"
            );
            Ok(db.prepare_cached(&sql)?.query_map([], read_host)?.collect::<Result<_, _>>()?)
        })
    }

    /// The hosts that were withdrawn, by name.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn withdrawn_hosts(&self) -> Result<Vec<Host>> {
        self.database.read("list withdrawn hosts", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM peers WHERE kind = 'host' AND withdrawn IS NOT NULL ORDER BY name"
            );
            Ok(db.prepare_cached(&sql)?.query_map([], read_host)?.collect::<Result<_, _>>()?)
        })
    }

    /// The proxy, withdrawn or not.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn proxy(&self, id: ProxyId) -> Result<Proxy> {
        self.database.read("read a proxy", |db| {
            let sql = format!("SELECT {COLUMNS} FROM peers WHERE id = ?1 AND kind = 'proxy'");
            db.prepare_cached(&sql)?
                .query_row([id.to_string()], read_proxy)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "proxy" }))
        })
    }

    /// All proxies that were not withdrawn, by name.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn proxies(&self) -> Result<Vec<Proxy>> {
        self.database.read("list proxies", |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM peers WHERE kind = 'proxy' AND withdrawn IS NULL ORDER BY name"
            );
            Ok(db.prepare_cached(&sql)?.query_map([], read_proxy)?.collect::<Result<_, _>>()?)
        })
    }

    /// Says whether a host takes new projects.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`], or the database failed.
    pub fn cordon(&self, id: HostId, cordoned: bool) -> Result<Host> {
        self.database.write("cordon a host", |db| {
            let sql = "UPDATE peers SET cordoned = ?2 WHERE id = ?1 AND kind = 'host'";
            db.execute(sql, params![id.to_string(), cordoned])?;
            let sql = format!("SELECT {COLUMNS} FROM peers WHERE id = ?1 AND kind = 'host'");
            db.query_row(&sql, [id.to_string()], read_host)
                .optional()?
                .ok_or(Fault::Refused(Error::NotFound { what: "host" }))
        })
    }
}

fn refuse_taken(db: &Transaction<'_>, joining: &Joining<'_>, id: HostId) -> Result<(), Fault<Error>> {
    let taken = |sql: &str, what: &str| {
        db.query_row(sql, params![what, joining.kind.as_str(), id.to_string()], |_| Ok(())).optional()
    };
    let by_name = "SELECT 1 FROM peers WHERE name = ?1 AND kind = ?2 AND id <> ?3";
    if taken(by_name, joining.name.as_str())?.is_some() {
        return Err(Fault::Refused(Error::Exists { what: "a peer of that name" }));
    }
    let by_key = "SELECT 1 FROM peers WHERE identity = ?1 AND ?2 <> '' AND id <> ?3";
    if taken(by_key, &joining.address.identity)?.is_some() {
        return Err(Fault::Refused(Error::Exists { what: "a peer with that identity key" }));
    }
    Ok(())
}

fn enroll(
    db: &Transaction<'_>,
    joining: &Joining<'_>,
    id: HostId,
    now: Timestamp,
) -> Result<(), Fault<Error>> {
    db.execute(
        "INSERT INTO peers (id, kind, name, identity, address, created) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            id.to_string(),
            joining.kind.as_str(),
            joining.name.as_str(),
            joining.address.identity,
            serde_json::to_string(joining.address)?,
            now.millis()
        ],
    )?;
    use_up(db, joining, id)
}

fn use_up(db: &Transaction<'_>, joining: &Joining<'_>, id: HostId) -> Result<(), Fault<Error>> {
    db.execute(
        "UPDATE join_tokens SET used_by = ?2 WHERE hash = ?1",
        params![joining.token, id.to_string()],
    )?;
    Ok(())
}

/// Notes its name and address.
fn update(db: &Transaction<'_>, joining: &Joining<'_>, id: HostId) -> Result<(), Fault<Error>> {
    db.execute(
        "UPDATE peers SET name = ?2, address = ?3 WHERE id = ?1",
        params![id.to_string(), joining.name.as_str(), serde_json::to_string(joining.address)?],
    )?;
    Ok(())
}
