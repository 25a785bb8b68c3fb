//! What a host knows of who may do what, across restarts.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cocalc_auth::{
    session::{SessionHash, SessionRecord},
    store::{AclStore, EndSessions, Position, Save, Saved, StoreError},
    stream::Entry,
    token::TokenId,
};
use cocalc_ids::{ProjectId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::{Database, Durability, Error, error::Fault};

const ACL: &[&str] = &["
CREATE TABLE entry (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE position (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    stream INTEGER NOT NULL,
    seq INTEGER NOT NULL
) STRICT;
"];

const SESSIONS: &[&str] = &["
CREATE TABLE standing (one INTEGER PRIMARY KEY CHECK (one = 1), value TEXT NOT NULL) STRICT;
CREATE TABLE used (id BLOB PRIMARY KEY, expires INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX used_by_end ON used (expires);
CREATE TABLE session (
    hash BLOB PRIMARY KEY,
    project TEXT NOT NULL,
    created INTEGER NOT NULL,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX session_by_project ON session (project);
CREATE INDEX session_by_age ON session (created);
"];

/// The [`AclStore`] of a host or proxy, in two files of one folder: `acl.db`
/// survives power cuts, since the master is told what it holds; `sessions.db`
/// survives a kill, which is enough for sessions and used tokens, and keeps
/// the disk's flush out of every sign-in.
///
/// A session that was looked up is known from then on without reading the file
/// again: only one of these may have the folder open.
#[derive(Debug)]
pub struct HostAcl {
    acl: Database,
    sessions: Database,
    known: Mutex<Known>,
}

/// Sessions that are known without a look into the file: every request of a browser
/// shows one.
#[derive(Debug, Default)]
struct Known {
    sessions: BTreeMap<SessionHash, SessionRecord>,
    /// How often any session was made or ended: what was read before that says
    /// nothing of now.
    changes: u64,
}

/// Beyond, all are looked up again; each takes less than a kilobyte.
const KNOWN_MAX: usize = 16_384;

impl HostAcl {
    /// Opens the files in `folder`, which exists, or creates them.
    ///
    /// # Errors
    ///
    /// As [`Database::open`].
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Ok(Self {
            acl: Database::open(&folder.join("acl.db"), Durability::Full, ACL)?,
            sessions: Database::open(&folder.join("sessions.db"), Durability::Normal, SESSIONS)?,
            known: Mutex::default(),
        })
    }

    /// Checks that both files are sound.
    ///
    /// # Errors
    ///
    /// As [`Database::check`].
    pub fn check(&self) -> Result<(), Error> {
        self.acl.check()?;
        self.sessions.check()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was changed in the file: forgets that session, or all.
    fn forget(&self, which: Option<&SessionHash>) {
        let mut known = self.known();
        known.changes += 1;
        match which {
            Some(hash) => drop(known.sessions.remove(hash)),
            None => known.sessions.clear(),
        }
    }
}

fn refused(operation: &'static str) -> impl FnOnce(Error) -> StoreError {
    move |error| StoreError { operation, source: error.into() }
}

impl AclStore for HostAcl {
    fn load(&self) -> Result<Saved, StoreError> {
        let operation = "load what is known of access";
        let (position, entries) = self
            .acl
            .read(operation, |connection| {
                let position = connection
                    .query_row("SELECT stream, seq FROM position", [], |row| {
                        Ok(Position { stream: row.get(0)?, seq: row.get(1)? })
                    })
                    .optional()?;
                let mut statement = connection.prepare("SELECT value FROM entry")?;
                let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
                let mut entries = Vec::new();
                for row in rows {
                    entries.push(serde_json::from_str::<Entry>(&row?)?);
                }
                Ok::<_, Fault>((position, entries))
            })
            .map_err(refused(operation))?;
        let standing = self
            .sessions
            .read(operation, |connection| {
                let standing = connection.query_row("SELECT value FROM standing", [], |row| row.get(0));
                Ok::<_, Fault>(standing.optional()?)
            })
            .map_err(refused(operation))?;
        Ok(Saved { position, entries, standing })
    }

    fn save(&self, save: &Save) -> Result<(), StoreError> {
        let operation = "save what is known of access";
        self.acl
            .write(operation, |transaction| {
                if save.clear {
                    transaction.execute("DELETE FROM entry", [])?;
                }
                let mut put = transaction
                    .prepare_cached("INSERT OR REPLACE INTO entry (name, value) VALUES (?1, ?2)")?;
                let mut delete = transaction.prepare_cached("DELETE FROM entry WHERE name = ?1")?;
                for (name, entry) in &save.entries {
                    match entry {
                        Some(entry) => put.execute(params![name, serde_json::to_string(entry)?])?,
                        None => delete.execute([name])?,
                    };
                }
                match save.position {
                    Some(at) => transaction.execute(
                        "INSERT OR REPLACE INTO position (one, stream, seq) VALUES (1, ?1, ?2)",
                        params![at.stream, at.seq],
                    )?,
                    None => transaction.execute("DELETE FROM position", [])?,
                };
                Ok::<_, Fault>(())
            })
            .map_err(refused(operation))
    }

    fn save_standing(&self, standing: &str) -> Result<(), StoreError> {
        let operation = "save the lease";
        self.sessions
            .write(operation, |transaction| {
                transaction
                    .execute("INSERT OR REPLACE INTO standing (one, value) VALUES (1, ?1)", [standing])?;
                Ok::<_, Fault>(())
            })
            .map_err(refused(operation))
    }

    fn insert_used(&self, id: &TokenId, expires: Timestamp) -> Result<bool, StoreError> {
        let operation = "use up a token";
        self.sessions
            .write(operation, |transaction| {
                let inserted = transaction.execute(
                    "INSERT OR IGNORE INTO used (id, expires) VALUES (?1, ?2)",
                    params![id.as_bytes().as_slice(), expires.millis()],
                )?;
                Ok::<_, Fault>(inserted == 1)
            })
            .map_err(refused(operation))
    }

    fn forget_used(&self, now: Timestamp) -> Result<usize, StoreError> {
        let operation = "forget used tokens";
        self.sessions
            .write(operation, |transaction| {
                Ok::<_, Fault>(transaction.execute("DELETE FROM used WHERE expires < ?1", [now.millis()])?)
            })
            .map_err(refused(operation))
    }

    fn insert_session(&self, hash: &SessionHash, session: &SessionRecord) -> Result<(), StoreError> {
        let operation = "keep a session";
        let kept = self
            .sessions
            .write(operation, |transaction| {
                transaction.execute(
                    "INSERT OR REPLACE INTO session (hash, project, created, value) VALUES (?1, ?2, ?3, ?4)",
                    params![
                        hash.as_bytes().as_slice(),
                        session.project.to_string(),
                        session.created.millis(),
                        serde_json::to_string(session)?
                    ],
                )?;
                Ok::<_, Fault>(())
            })
            .map_err(refused(operation));
        self.forget(Some(hash));
        kept
    }

    fn session(&self, hash: &SessionHash) -> Result<Option<SessionRecord>, StoreError> {
        let operation = "look up a session";
        let changes = {
            let known = self.known();
            if let Some(session) = known.sessions.get(hash) {
                return Ok(Some(session.clone()));
            }
            known.changes
        };
        let found = self
            .sessions
            .read(operation, |connection| {
                let found = connection
                    .prepare_cached("SELECT hash, value FROM session WHERE hash = ?1")?
                    .query_row([hash.as_bytes().as_slice()], read_session)
                    .optional()?;
                found.map(parse_session).transpose().map(|found| found.map(|(_, session)| session))
            })
            .map_err(refused(operation))?;
        if let Some(session) = &found {
            let mut known = self.known();
            // It may have ended since it was read.
            if known.changes == changes {
                if known.sessions.len() >= KNOWN_MAX {
                    known.sessions.clear();
                }
                known.sessions.insert(*hash, session.clone());
            }
        }
        Ok(found)
    }

    fn sessions_of(&self, project: ProjectId) -> Result<Vec<(SessionHash, SessionRecord)>, StoreError> {
        let operation = "list the sessions of a project";
        self.sessions
            .read(operation, |connection: &Connection| {
                let mut statement =
                    connection.prepare("SELECT hash, value FROM session WHERE project = ?1")?;
                let rows = statement.query_map([project.to_string()], read_session)?;
                rows.map(|row| parse_session(row?)).collect()
            })
            .map_err(refused(operation))
    }

    fn end_sessions(&self, which: &EndSessions) -> Result<usize, StoreError> {
        let operation = "end sessions";
        let ended = self
            .sessions
            .write(operation, |transaction| {
                let ended = match which {
                    EndSessions::One(hash) => transaction
                        .execute("DELETE FROM session WHERE hash = ?1", [hash.as_bytes().as_slice()])?,
                    EndSessions::Project(project) => transaction
                        .execute("DELETE FROM session WHERE project = ?1", [project.to_string()])?,
                    EndSessions::Before(time) => {
                        transaction.execute("DELETE FROM session WHERE created < ?1", [time.millis()])?
                    }
                    EndSessions::All => transaction.execute("DELETE FROM session", [])?,
                };
                Ok::<_, Fault>(ended)
            })
            .map_err(refused(operation));
        // Also when that failed: what the file has counts. The old ones are looked for
        // every now and then, and mostly there are none.
        if !matches!(ended, Ok(0)) {
            self.forget(match which {
                EndSessions::One(hash) => Some(hash),
                EndSessions::Project(_) | EndSessions::Before(_) | EndSessions::All => None,
            });
        }
        ended
    }
}

fn read_session(row: &Row<'_>) -> rusqlite::Result<([u8; 32], String)> {
    Ok((row.get(0)?, row.get(1)?))
}

fn parse_session((hash, value): ([u8; 32], String)) -> Result<(SessionHash, SessionRecord), Fault> {
    Ok((SessionHash::from_bytes(hash), serde_json::from_str(&value)?))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cocalc_auth::{
        store::{MemoryStore, entry_name},
        stream::{AccountState, PublicRing},
        token::LoginTag,
    };
    use cocalc_ids::{AccountId, KeyId, Scope};
    use proptest::prelude::*;

    use super::*;

    fn session(project: u8, created: i64) -> SessionRecord {
        SessionRecord {
            account: AccountId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([project; 16]),
            scopes: [Scope::Http].into(),
            session_epoch: 3,
            acl: u64::MAX >> 1,
            embed_origin: Some("https://page.example".to_owned()),
            created: Timestamp::from_secs(created),
            login: Some(LoginTag::of(KeyId::from_bytes([project; 16]))),
        }
    }

    fn account(id: u8, session_epoch: u64) -> Entry {
        Entry::Account(AccountState {
            account: AccountId::from_bytes([id; 16]),
            session_epoch,
            ended_logins: vec![LoginTag::of(KeyId::from_bytes([id; 16]))],
            banned: false,
            keys: Vec::new(),
        })
    }

    #[derive(Clone, Debug)]
    enum Step {
        Save { clear: bool, accounts: Vec<(u8, Option<u64>)>, position: Option<(u64, u64)> },
        Use(u8, i64),
        ForgetUsed(i64),
        Insert(u8, u8, i64),
        End(EndSessions),
        Reopen,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let end = prop_oneof![
            (0u8..4).prop_map(|hash| EndSessions::One(SessionHash::from_bytes([hash; 32]))),
            (0u8..3).prop_map(|project| EndSessions::Project(ProjectId::from_bytes([project; 16]))),
            (0i64..9).prop_map(|time| EndSessions::Before(Timestamp::from_secs(time))),
            Just(EndSessions::All),
        ];
        let accounts = prop::collection::vec((0u8..4, prop::option::of(0u64..9)), 0..4);
        let position = prop::option::of((0u64..1 << 60, 0u64..1 << 60));
        let step = prop_oneof![
            4 => (any::<bool>(), accounts, position)
                .prop_map(|(clear, accounts, position)| Step::Save { clear, accounts, position }),
            3 => (0u8..4, 0i64..9).prop_map(|(id, end)| Step::Use(id, end)),
            1 => (0i64..9).prop_map(Step::ForgetUsed),
            3 => (0u8..4, 0u8..3, 0i64..9).prop_map(|(hash, project, at)| Step::Insert(hash, project, at)),
            1 => end.prop_map(Step::End),
            1 => Just(Step::Reopen),
        ];
        prop::collection::vec(step, 1..40)
    }

    fn sorted(saved: Saved) -> (Option<Position>, BTreeMap<String, Entry>, Option<String>) {
        let entries = saved.entries.into_iter().filter_map(|entry| Some((entry_name(&entry)?, entry)));
        (saved.position, entries.collect(), saved.standing)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// The store does what the one in memory does, across restarts.
        #[test]
        fn agrees_with_memory(steps in steps()) {
            let dir = tempfile::tempdir().unwrap();
            let mut store = HostAcl::open(dir.path()).unwrap();
            let model = MemoryStore::default();
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Save { clear, accounts, position } => {
                        let entries = accounts.into_iter().map(|(id, epoch)| {
                            let entry = account(id, epoch.unwrap_or(0));
                            (entry_name(&entry).unwrap(), epoch.map(|_| entry))
                        });
                        let position = position.map(|(stream, seq)| Position { stream, seq });
                        let save = Save { clear, entries: entries.collect(), position };
                        store.save(&save).unwrap();
                        model.save(&save).unwrap();
                        store.save_standing(&number.to_string()).unwrap();
                        model.save_standing(&number.to_string()).unwrap();
                    }
                    Step::Use(id, end) => {
                        let (id, end) = (TokenId::from_bytes([id; 16]), Timestamp::from_secs(end));
                        prop_assert_eq!(store.insert_used(&id, end).unwrap(), model.insert_used(&id, end).unwrap());
                    }
                    Step::ForgetUsed(now) => {
                        let now = Timestamp::from_secs(now);
                        prop_assert_eq!(store.forget_used(now).unwrap(), model.forget_used(now).unwrap());
                    }
                    Step::Insert(hash, project, at) => {
                        let hash = SessionHash::from_bytes([hash; 32]);
                        store.insert_session(&hash, &session(project, at)).unwrap();
                        model.insert_session(&hash, &session(project, at)).unwrap();
                    }
                    Step::End(which) => {
                        prop_assert_eq!(store.end_sessions(&which).unwrap(), model.end_sessions(&which).unwrap());
                    }
                    Step::Reopen => {
                        drop(store);
                        store = HostAcl::open(dir.path()).unwrap();
                    }
                }
                prop_assert_eq!(sorted(store.load().unwrap()), sorted(model.load().unwrap()));
                for hash in 0..4 {
                    let hash = SessionHash::from_bytes([hash; 32]);
                    prop_assert_eq!(store.session(&hash).unwrap(), model.session(&hash).unwrap());
                }
                for project in 0..3 {
                    let project = ProjectId::from_bytes([project; 16]);
                    prop_assert_eq!(store.sessions_of(project).unwrap(), model.sessions_of(project).unwrap());
                }
            }
            store.check().unwrap();
        }
    }

    #[test]
    fn of_many_who_use_a_token_at_the_same_instant_one_wins() {
        const THREADS: usize = 8;
        let dir = tempfile::tempdir().unwrap();
        let expires = Timestamp::from_secs(1_000);
        // Two handles, as of two connections to the database.
        let stores = [HostAcl::open(dir.path()).unwrap(), HostAcl::open(dir.path()).unwrap()];
        let start = std::sync::Barrier::new(THREADS);
        for round in 0..50 {
            let id = TokenId::from_bytes([round; 16]);
            let wins = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS)
                    .map(|thread| {
                        let (store, start) = (&stores[thread % 2], &start);
                        scope.spawn(move || {
                            start.wait();
                            store.insert_used(&id, expires).unwrap()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).filter(|won| *won).count()
            });
            assert_eq!(wins, 1, "round {round}");
        }
        // Nor is one used again after a restart.
        drop(stores);
        let store = HostAcl::open(dir.path()).unwrap();
        assert!(!store.insert_used(&TokenId::from_bytes([0; 16]), expires).unwrap());
    }

    #[test]
    fn a_session_that_has_ended_is_unknown_to_whoever_asks_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = HostAcl::open(dir.path()).unwrap();
        let done = std::sync::atomic::AtomicU8::new(0);
        // Looked at when the threads have ended: they would outlive a panic here.
        let mut known = Vec::new();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    loop {
                        let round = done.load(std::sync::atomic::Ordering::Acquire);
                        if round == u8::MAX {
                            break;
                        }
                        // Reads it from the file while it ends.
                        let _ = store.session(&SessionHash::from_bytes([round; 32])).unwrap();
                    }
                });
            }
            for round in 0..200 {
                let hash = SessionHash::from_bytes([round; 32]);
                store.insert_session(&hash, &session(round % 3, 1)).unwrap();
                done.store(round, std::sync::atomic::Ordering::Release);
                let which = match round % 4 {
                    0 => EndSessions::One(hash),
                    1 => EndSessions::Project(ProjectId::from_bytes([round % 3; 16])),
                    2 => EndSessions::Before(Timestamp::from_secs(2)),
                    _ => EndSessions::All,
                };
                let ended = store.end_sessions(&which).ok();
                let seen = (0..10).any(|_| !matches!(store.session(&hash), Ok(None)));
                if ended != Some(1) || seen {
                    known.push((round, ended, seen));
                }
            }
            done.store(u8::MAX, std::sync::atomic::Ordering::Release);
        });
        assert_eq!(known, []);
    }

    #[test]
    fn what_is_known_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let store = HostAcl::open(dir.path()).unwrap();
        let hash = |number: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            SessionHash::from_bytes(bytes)
        };
        store.insert_session(&hash(0), &session(1, 1)).unwrap();
        for number in 1..KNOWN_MAX {
            store.known().sessions.insert(hash(number), session(1, 1));
        }
        assert!(store.session(&hash(0)).unwrap().is_some());
        store.insert_session(&hash(KNOWN_MAX), &session(1, 1)).unwrap();
        assert!(store.session(&hash(KNOWN_MAX)).unwrap().is_some());
        assert_eq!(store.known().sessions.len(), 1);
    }

    #[test]
    fn a_damaged_entry_is_an_error_not_a_gap() {
        let dir = tempfile::tempdir().unwrap();
        let store = HostAcl::open(dir.path()).unwrap();
        let ring = Entry::KeyRing(PublicRing::default());
        let entries = BTreeMap::from([("ring".to_owned(), Some(ring))]);
        store.save(&Save { clear: false, entries, position: None }).unwrap();
        store
            .acl
            .write("damage it", |transaction| {
                transaction.execute("UPDATE entry SET value = '{\"entry\":\"key_ring\"}'", [])?;
                Ok::<_, Fault>(())
            })
            .unwrap();
        assert!(store.load().is_err());
    }
}
