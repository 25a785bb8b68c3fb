//! What of a host's knowledge outlives its process.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cocalc_ids::{ProjectId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    session::{SessionHash, SessionRecord},
    stream::Entry,
    token::TokenId,
};

/// A place in the ordered stream. Later ones are greater.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Position {
    /// The stream's epoch.
    pub stream: u64,
    /// The sequence number in it.
    pub seq: u64,
}

/// Keeps what a host or proxy knows, so that a restart continues from there.
/// Calls block; they are short.
///
/// # Contract
///
/// - [`save`](Self::save) is all or nothing, and durable on return, power cuts
///   included: the master is told afterwards that it was applied.
/// - [`insert_used`](Self::insert_used) and sessions survive a kill of the
///   process; a power cut may lose the last of them.
pub trait AclStore: fmt::Debug + Send + Sync + 'static {
    /// All that was saved.
    fn load(&self) -> Result<Saved, StoreError>;

    /// Applies changes together with the position that they lead to.
    fn save(&self, save: &Save) -> Result<(), StoreError>;

    /// Replaces the standing with the master (a lease, settings), which is
    /// opaque text here.
    fn save_standing(&self, standing: &str) -> Result<(), StoreError>;

    /// Marks a one-use token as used until `expires`; `false` if it was.
    fn insert_used(&self, id: &TokenId, expires: Timestamp) -> Result<bool, StoreError>;

    /// Forgets used tokens that ended before `now`.
    fn forget_used(&self, now: Timestamp) -> Result<usize, StoreError>;

    /// Keeps a browser session, by its hash.
    fn insert_session(&self, hash: &SessionHash, session: &SessionRecord) -> Result<(), StoreError>;

    /// The browser session of that hash.
    fn session(&self, hash: &SessionHash) -> Result<Option<SessionRecord>, StoreError>;

    /// Every session of a project, for its move.
    fn sessions_of(&self, project: ProjectId) -> Result<Vec<(SessionHash, SessionRecord)>, StoreError>;

    /// Ends sessions; returns how many.
    fn end_sessions(&self, which: &EndSessions) -> Result<usize, StoreError>;
}

/// Which sessions end.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EndSessions {
    /// One.
    One(SessionHash),
    /// Those of a project, which has left.
    Project(ProjectId),
    /// Those made before this time.
    Before(Timestamp),
    /// All of them: a signing key was withdrawn.
    All,
}

/// What [`AclStore::load`] returns.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// How far the stream was applied.
    pub position: Option<Position>,
    /// What it had said, in no order.
    pub entries: Vec<Entry>,
    /// The standing, as it was saved.
    pub standing: Option<String>,
}

/// A change of what is saved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Save {
    /// Whether everything else is forgotten first.
    pub clear: bool,
    /// Entries by name; `None` deletes.
    pub entries: BTreeMap<String, Option<Entry>>,
    /// The position that this leads to.
    pub position: Option<Position>,
}

impl Save {
    /// Appends `later`, so that saving the sum is saving one after the other.
    pub fn merge(&mut self, later: Self) {
        if later.clear {
            *self = later;
        } else {
            self.entries.extend(later.entries);
            self.position = later.position;
        }
    }
}

/// The name under which an entry is kept; a later entry of that name replaces
/// it. `Reset` and `Live` are not kept.
pub fn entry_name(entry: &Entry) -> Option<String> {
    Some(match entry {
        Entry::Reset | Entry::Live => return None,
        Entry::Project(acl) => format!("project/{}", acl.project),
        Entry::ProjectGone { project } => format!("project/{project}"),
        Entry::Account(account) => format!("account/{}", account.account),
        Entry::KeyRing(_) => "ring".to_owned(),
        Entry::SshAuthorities(_) => "ssh-authorities".to_owned(),
        Entry::Host { host, .. } => format!("host/{host}"),
        Entry::Proxy { proxy, .. } => format!("proxy/{proxy}"),
        Entry::Route { project, .. } => format!("route/{project}"),
    })
}

/// The store failed. What it was asked to keep may or may not be kept.
#[derive(Debug, thiserror::Error)]
#[error("the access store could not {operation}")]
pub struct StoreError {
    /// What was being done.
    pub operation: &'static str,
    /// Why not.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Keeps everything in memory: for tests, and for proxies that may forget.
#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<Memory>);

#[derive(Debug, Default)]
struct Memory {
    position: Option<Position>,
    entries: BTreeMap<String, Entry>,
    standing: Option<String>,
    used: BTreeMap<TokenId, Timestamp>,
    sessions: BTreeMap<SessionHash, SessionRecord>,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AclStore for MemoryStore {
    fn load(&self) -> Result<Saved, StoreError> {
        let memory = self.lock();
        Ok(Saved {
            position: memory.position,
            entries: memory.entries.values().cloned().collect(),
            standing: memory.standing.clone(),
        })
    }

    fn save(&self, save: &Save) -> Result<(), StoreError> {
        let mut memory = self.lock();
        if save.clear {
            memory.entries.clear();
        }
        for (name, entry) in &save.entries {
            match entry {
                Some(entry) => memory.entries.insert(name.clone(), entry.clone()),
                None => memory.entries.remove(name),
            };
        }
        memory.position = save.position;
        Ok(())
    }

    fn save_standing(&self, standing: &str) -> Result<(), StoreError> {
        self.lock().standing = Some(standing.to_owned());
        Ok(())
    }

    fn insert_used(&self, id: &TokenId, expires: Timestamp) -> Result<bool, StoreError> {
        use std::collections::btree_map::Entry;
        match self.lock().used.entry(*id) {
            Entry::Vacant(vacant) => {
                vacant.insert(expires);
                Ok(true)
            }
            Entry::Occupied(_) => Ok(false),
        }
    }

    fn forget_used(&self, now: Timestamp) -> Result<usize, StoreError> {
        let mut memory = self.lock();
        let before = memory.used.len();
        memory.used.retain(|_, expires| *expires >= now);
        Ok(before - memory.used.len())
    }

    fn insert_session(&self, hash: &SessionHash, session: &SessionRecord) -> Result<(), StoreError> {
        self.lock().sessions.insert(*hash, session.clone());
        Ok(())
    }

    fn session(&self, hash: &SessionHash) -> Result<Option<SessionRecord>, StoreError> {
        Ok(self.lock().sessions.get(hash).cloned())
    }

    fn sessions_of(&self, project: ProjectId) -> Result<Vec<(SessionHash, SessionRecord)>, StoreError> {
        let memory = self.lock();
        let of = memory.sessions.iter().filter(|(_, session)| session.project == project);
        Ok(of.map(|(hash, session)| (*hash, session.clone())).collect())
    }

    fn end_sessions(&self, which: &EndSessions) -> Result<usize, StoreError> {
        let mut memory = self.lock();
        let before = memory.sessions.len();
        memory.sessions.retain(|hash, session| match which {
            EndSessions::One(one) => hash != one,
            EndSessions::Project(project) => session.project != *project,
            EndSessions::Before(time) => session.created >= *time,
            EndSessions::All => false,
        });
        Ok(before - memory.sessions.len())
    }
}
