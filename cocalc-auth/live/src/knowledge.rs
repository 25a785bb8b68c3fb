//! What a host or proxy knows of who may do what, shared by those who ask and
//! the driver that keeps it current.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_auth::{
    acl::{AclCache, Ask, ConnectionId, Refusal, Standing, Verdict},
    session::{SessionHash, SessionRecord},
    store::{AclStore, EndSessions, Position, Save, StoreError},
    stream::{Entry, Frame},
    token::{Claims, Expect, TokenError},
};
use cocalc_core::{
    auth::{Admission, Denial, Tier},
    clock::Clock,
    control::{KeepaliveReply, Registered, Settings},
    ids::{Epoch, ProjectId, Timestamp},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use crate::{denial, fetch::Fetches, tier, verified::Verified};

/// Master time is estimated from answers that took no longer.
const ROUND_TRIP_MAX: Duration = Duration::from_secs(5);
/// A wall clock that is off by more cannot be trusted with tokens.
const SKEW_MAX: Duration = Duration::from_secs(30);
/// From here on it is said in the log.
const SKEW_ALARM: Duration = Duration::from_secs(1);

/// A browser session ends after so long, whatever happens.
pub(crate) const SESSION_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// What is known of who may do what.
pub struct Knowledge {
    state: Mutex<State>,
    pub(crate) store: Arc<dyn AclStore>,
    pub(crate) clock: Arc<dyn Clock>,
    boot_id: String,
    mark: Option<PathBuf>,
    tier: watch::Sender<Tier>,
    /// Counts applied batches, so that a fetch sees when it may look again.
    pub(crate) applied: watch::Sender<u64>,
    closed: Notify,
    pub(crate) fetches: Fetches,
    verified: Verified,
}

struct State {
    cache: AclCache,
    senders: BTreeMap<ConnectionId, watch::Sender<Option<Denial>>>,
    /// Told to close, and not gone yet.
    closing: BTreeSet<ConnectionId>,
    kept: Kept,
    loaded: Vec<Entry>,
    /// What the store holds: a standing must not name more, or a crash between
    /// the two would look like a store that was restored.
    saved: Option<Position>,
    /// Up to here all is applied, on disk, and what it ended has gone.
    in_force: Option<Position>,
    alarmed: bool,
}

impl State {
    /// Whatever is on disk is in force as soon as nobody is left that was told
    /// to close.
    fn settle(&mut self) {
        if self.closing.is_empty() {
            self.in_force = self.saved;
        }
    }
}

/// What is kept beside the stream's entries.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Kept {
    standing: Standing,
    issuer: Option<String>,
    settings: Settings,
    /// Master time in milliseconds at a boot time in milliseconds.
    estimate: Option<(Timestamp, u64)>,
}

impl Knowledge {
    /// Continues from what the store holds. `mark` is a small file, kept apart
    /// from the store, best on a tmpfs such as `/run`: it remembers the highest
    /// position of this boot, and so betrays a store that was restored from a
    /// backup. Without it only a store that contradicts itself is noticed.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub fn open(
        store: Arc<dyn AclStore>,
        clock: Arc<dyn Clock>,
        mark: Option<PathBuf>,
    ) -> Result<Arc<Self>, Error> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default();
        Self::open_in_boot(store, clock, mark, boot_id)
    }

    /// As [`open`](Self::open), in a boot of the caller's naming.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub fn open_in_boot(
        store: Arc<dyn AclStore>,
        clock: Arc<dyn Clock>,
        mark: Option<PathBuf>,
        boot_id: String,
    ) -> Result<Arc<Self>, Error> {
        let saved = store.load()?;
        let kept: Option<Kept> = saved.standing.as_deref().and_then(|text| serde_json::from_str(text).ok());
        let settings = kept.as_ref().map(|kept| kept.settings).unwrap_or_default();
        let cache = AclCache::restore(
            &saved,
            kept.as_ref().map(|kept| &kept.standing),
            mark.as_deref().and_then(read_mark),
            &boot_id,
            Duration::from_millis(settings.grace_ms),
        );
        let now = clock.boot();
        let mut kept = kept.unwrap_or_else(|| Kept {
            standing: cache.lease().standing(&boot_id, saved.position),
            issuer: None,
            settings,
            estimate: None,
        });
        if kept.standing.boot_id != boot_id {
            kept.estimate = None;
        }
        let tier = watch::Sender::new(tier(cache.tier(now)));
        let state = State {
            cache,
            senders: BTreeMap::new(),
            closing: BTreeSet::new(),
            kept,
            loaded: saved.entries,
            saved: saved.position,
            in_force: saved.position,
            alarmed: false,
        };
        Ok(Arc::new(Self {
            state: Mutex::new(state),
            store,
            clock,
            boot_id,
            mark,
            tier,
            applied: watch::Sender::new(0),
            closed: Notify::new(),
            fetches: Fetches::default(),
            verified: Verified::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How well is known what is allowed; changes as time passes without the
    /// master.
    pub fn tier(&self) -> watch::Receiver<Tier> {
        self.tier.subscribe()
    }

    /// How well is known what is allowed in `project`, whose grace may differ.
    pub fn tier_of(&self, project: ProjectId) -> Tier {
        let now = self.clock.boot();
        tier(self.lock().cache.tier_of(project, now))
    }

    /// Master time, as the last answer of the master lets it be estimated; the
    /// wall clock before there was one.
    pub fn master_now(&self) -> Timestamp {
        let estimate = self.lock().kept.estimate;
        match estimate {
            Some((master, at)) => master.plus(self.clock.boot().saturating_sub(Duration::from_millis(at))),
            None => self.clock.wall(),
        }
    }

    /// How far this machine's wall clock is from master time.
    pub fn skew(&self) -> Duration {
        let (master, wall) = (self.master_now(), self.clock.wall());
        master.since(wall).max(wall.since(master))
    }

    /// Whether the wall clock is so far off that no token may be judged.
    pub(crate) fn skewed(&self) -> bool {
        self.skew() > SKEW_MAX
    }

    /// The master's URL, once it is known.
    pub fn issuer(&self) -> Option<String> {
        self.lock().kept.issuer.clone()
    }

    /// The master's timing.
    pub fn settings(&self) -> Settings {
        self.lock().kept.settings
    }

    /// Where the stream stands.
    pub fn position(&self) -> Option<Position> {
        self.lock().cache.position()
    }

    /// Whether the state is whole and frames come in order.
    pub fn is_live(&self) -> bool {
        self.lock().cache.is_live()
    }

    /// How many connections are registered.
    pub fn connections(&self) -> usize {
        self.lock().cache.connections()
    }

    /// Looks at the cache. `read` runs under a lock, and must be short.
    pub fn with<T>(&self, read: impl FnOnce(&AclCache) -> T) -> T {
        read(&self.lock().cache)
    }

    /// Verifies a token with the keys that are in force.
    pub(crate) fn verify(
        &self,
        token: &str,
        expect: &Expect<'_>,
        now: Timestamp,
    ) -> Result<Claims, TokenError> {
        let verifier = self.with(|cache| cache.verifier().clone());
        self.verified.verify(&verifier, token, expect, now)
    }

    /// How long ago what is known of `project` was known to be current, and its
    /// tier.
    pub(crate) fn freshness(&self, project: ProjectId) -> (Duration, Tier) {
        let now = self.clock.boot();
        let state = self.lock();
        let staleness = state.cache.lease().staleness(now).unwrap_or(Duration::MAX);
        (staleness, tier(state.cache.tier_of(project, now)))
    }

    pub(crate) fn decide(&self, ask: &Ask, held: Option<Epoch>) -> Verdict {
        let now = self.clock.boot();
        self.lock().cache.decide(ask, held, now)
    }

    pub(crate) fn admit(self: &Arc<Self>, ask: &Ask, held: Option<Epoch>) -> (Verdict, Option<Admission>) {
        let now = self.clock.boot();
        let mut state = self.lock();
        let (verdict, id) = state.cache.admit(ask, held, now);
        let admission = id.map(|id| {
            let (sender, receiver) = watch::channel(None);
            state.senders.insert(id, sender);
            Admission::new(receiver, Registration { knowledge: self.clone(), id })
        });
        (verdict, admission)
    }

    fn close(&self, state: &mut State, close: Vec<(ConnectionId, Refusal)>) {
        for (id, refusal) in close {
            if let Some(sender) = state.senders.remove(&id) {
                state.closing.insert(id);
                sender.send_replace(Some(denial(refusal)));
            }
        }
    }

    /// Waits until every connection that was told to close has gone, at most
    /// `limit`; whether they have. Cancel safe.
    pub async fn closed(&self, limit: Duration) -> bool {
        let gone = async {
            loop {
                let notified = self.closed.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                if self.lock().closing.is_empty() {
                    return;
                }
                notified.await;
            }
        };
        tokio::time::timeout(limit, gone).await.is_ok()
    }

    /// Ends a browser session, and what it opened.
    ///
    /// # Errors
    ///
    /// The store failed; the connections are closed nevertheless.
    pub fn end_session(&self, session: SessionHash) -> Result<(), Error> {
        let mut state = self.lock();
        let close = state.cache.end_session(session);
        self.close(&mut state, close);
        drop(state);
        self.store.end_sessions(&EndSessions::One(session))?;
        Ok(())
    }

    /// Closes every connection of a project that this host let go of, at once,
    /// without waiting for the master to say so. Its sessions stay until
    /// [`end_project_sessions`](Self::end_project_sessions): the redirect to
    /// the new address needs them.
    pub fn close_project(&self, project: ProjectId) {
        let mut state = self.lock();
        let close = state.cache.end_project(project);
        self.close(&mut state, close);
    }

    /// The browser sessions of a project, by hash, for its move.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn project_sessions(&self, project: ProjectId) -> Result<Vec<(SessionHash, SessionRecord)>, Error> {
        Ok(self.store.sessions_of(project)?)
    }

    /// Takes over the sessions of a project that has moved here. Those of other
    /// projects are ignored.
    ///
    /// # Errors
    ///
    /// The store failed; repeating the call is harmless.
    pub fn adopt_sessions(
        &self,
        project: ProjectId,
        sessions: &[(SessionHash, SessionRecord)],
    ) -> Result<(), Error> {
        for (hash, session) in sessions.iter().filter(|(_, session)| session.project == project) {
            self.store.insert_session(hash, session)?;
        }
        Ok(())
    }

    /// Forgets the browser sessions of a project that is gone.
    ///
    /// # Errors
    ///
    /// The store failed.
    pub fn end_project_sessions(&self, project: ProjectId) -> Result<usize, Error> {
        Ok(self.store.end_sessions(&EndSessions::Project(project))?)
    }

    // What follows is the driver's.

    /// Up to where the master may be told that all is in force: applied, on
    /// disk, and gone what it ended; `None` while the state is not whole.
    pub(crate) fn in_force(&self) -> Option<(u64, u64)> {
        let mut state = self.lock();
        state.settle();
        let at = state.in_force.filter(|at| state.cache.is_live() && Some(*at) <= state.cache.position());
        at.map(|at| (at.stream, at.seq))
    }

    /// What was applied up to here has had its time to close connections.
    pub(crate) fn acknowledged(&self, stream: u64, seq: u64) {
        let mut state = self.lock();
        state.in_force = state.in_force.max(Some(Position { stream, seq }));
    }

    pub(crate) fn take_loaded(&self) -> Vec<Entry> {
        std::mem::take(&mut self.lock().loaded)
    }

    pub(crate) fn begin_sync(&self) -> Option<(u64, u64)> {
        self.lock().cache.begin_sync().map(|at| (at.stream, at.seq))
    }

    pub(crate) fn registered(&self, reply: &Registered, sent: Duration) {
        let received = self.clock.boot();
        let mut state = self.lock();
        state.kept.issuer = Some(reply.issuer.clone());
        state.kept.settings = reply.settings;
        state.cache.set_grace(Duration::from_millis(reply.settings.grace_ms));
        self.estimate(&mut state, reply.now, sent, received);
    }

    /// Applies frames in order; tells `seen` those that were new; saves; and
    /// returns whether the stream must be asked for again.
    pub(crate) async fn apply(
        self: &Arc<Self>,
        frames: &[Frame],
        seen: impl Fn(&Entry),
    ) -> Result<bool, Error> {
        let mut save: Option<Save> = None;
        let (mut need_sync, mut end_sessions) = (false, false);
        {
            let mut state = self.lock();
            for frame in frames {
                let applied = state.cache.apply(frame);
                // At once, before anything is written: a revocation does not
                // wait for a disk.
                self.close(&mut state, applied.close);
                need_sync |= applied.need_sync;
                end_sessions |= applied.end_sessions;
                if let Some(next) = applied.save {
                    match &mut save {
                        Some(save) => save.merge(next),
                        None => save = Some(next),
                    }
                }
                if applied.accepted {
                    seen(&frame.entry);
                }
            }
        }
        self.update_tier();
        self.applied.send_modify(|count| *count += 1);
        if save.is_none() && !end_sessions {
            return Ok(need_sync);
        }
        let this = self.clone();
        let position = save.as_ref().and_then(|save| save.position);
        let saved = blocking(move || {
            if end_sessions {
                this.store.end_sessions(&EndSessions::All)?;
            }
            if let Some(save) = &save {
                this.store.save(save)?;
                if let (Some(mark), Some(position)) = (&this.mark, save.position) {
                    write_mark(mark, position);
                }
            }
            Ok(())
        })
        .await;
        if let Err(error) = saved {
            // Nothing was acknowledged: it comes again.
            self.lock().cache.lose_position();
            return Err(error);
        }
        if position.is_some() {
            self.lock().saved = position;
        }
        Ok(need_sync)
    }

    /// Takes over the master's answer to a keepalive; whether the stream must
    /// be asked for.
    pub(crate) fn renewed(
        &self,
        reply: &KeepaliveReply,
        sent: Duration,
        position_sent: Option<(u64, u64)>,
    ) -> bool {
        let received = self.clock.boot();
        let place = |(stream, seq)| Position { stream, seq };
        let mut state = self.lock();
        let behind = state.cache.renewed(
            sent,
            Duration::from_millis(reply.lease_ms),
            position_sent.map(place),
            place(reply.position),
        );
        self.estimate(&mut state, reply.now, sent, received);
        drop(state);
        self.update_tier();
        let skew = self.skew();
        let alarm = skew > SKEW_ALARM;
        if std::mem::replace(&mut self.lock().alarmed, alarm) != alarm {
            if alarm {
                tracing::warn!(skew_ms = skew.as_millis(), "the wall clock differs from the master's");
            } else {
                tracing::info!("the wall clock agrees with the master's again");
            }
        }
        behind
    }

    fn estimate(&self, state: &mut State, master: Timestamp, sent: Duration, received: Duration) {
        let round_trip = received.saturating_sub(sent);
        if round_trip <= ROUND_TRIP_MAX {
            let at = u64::try_from(received.as_millis()).unwrap_or(u64::MAX);
            state.kept.estimate = Some((master.plus(round_trip / 2), at));
        }
    }

    /// Saves the lease, so that a restart of the daemon keeps it.
    pub(crate) async fn save_standing(self: &Arc<Self>) -> Result<(), Error> {
        let kept = {
            let mut state = self.lock();
            state.kept.standing = state.cache.lease().standing(&self.boot_id, state.saved);
            serde_json::to_string(&state.kept)
        };
        let text = kept.map_err(|source| Error::Encode { source })?;
        let this = self.clone();
        blocking(move || Ok(this.store.save_standing(&text)?)).await
    }

    /// Closes what time alone has ended, and returns when to look again (boot
    /// time).
    pub(crate) fn expire(&self) -> Option<Duration> {
        let now = self.clock.boot();
        let mut state = self.lock();
        let close = state.cache.expire(now);
        self.close(&mut state, close);
        let next = state.cache.next_change(now);
        drop(state);
        self.update_tier();
        next
    }

    /// Forgets used tokens and sessions whose time is over.
    pub(crate) async fn tidy(self: &Arc<Self>) -> Result<(), Error> {
        let this = self.clone();
        let now = self.master_now();
        let oldest = now.millis().saturating_sub(i64::try_from(SESSION_LIFE.as_millis()).unwrap_or(i64::MAX));
        blocking(move || {
            this.store.forget_used(now)?;
            this.store.end_sessions(&EndSessions::Before(Timestamp::from_millis(oldest)))?;
            Ok(())
        })
        .await
    }

    fn update_tier(&self) {
        let now = self.clock.boot();
        let tier = tier(self.lock().cache.tier(now));
        self.tier.send_if_modified(|old| std::mem::replace(old, tier) != tier);
    }
}

impl fmt::Debug for Knowledge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Knowledge").field("position", &self.position()).finish_non_exhaustive()
    }
}

/// Dropped with its connection.
struct Registration {
    knowledge: Arc<Knowledge>,
    id: ConnectionId,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut state = self.knowledge.lock();
        state.cache.disconnected(self.id);
        state.senders.remove(&self.id);
        if state.closing.remove(&self.id) {
            drop(state);
            self.knowledge.closed.notify_waiters();
        }
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Stopped),
    }
}

fn read_mark(path: &Path) -> Option<Position> {
    let text = std::fs::read_to_string(path).ok()?;
    let (stream, seq) = text.trim().split_once(' ')?;
    Some(Position { stream: stream.parse().ok()?, seq: seq.parse().ok()? })
}

fn write_mark(path: &Path, position: Position) {
    let temporary = path.with_extension("new");
    let written = std::fs::write(&temporary, format!("{} {}\n", position.stream, position.seq))
        .and_then(|()| std::fs::rename(&temporary, path));
    if let Err(error) = written {
        // The mark only widens what is noticed; the stream goes on without it.
        tracing::warn!(path = %path.display(), %error, "cannot write the stream's mark");
    }
}

/// Why knowledge could not be loaded, or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store failed.
    #[error("what is known of access could not be kept")]
    Store(#[from] StoreError),
    /// It cannot be written as JSON.
    #[error("the standing with the master could not be written down")]
    Encode {
        /// Why.
        source: serde_json::Error,
    },
    /// The program is ending.
    #[error("the program is ending")]
    Stopped,
}

#[cfg(test)]
mod tests {
    use cocalc_auth::{
        acl::Proof,
        store::MemoryStore,
        stream::{AccountState, ProjectAcl},
    };
    use cocalc_core::{
        clock::SystemClock,
        ids::{AccountId, Action, Role, Scope},
    };

    use super::*;

    #[tokio::test]
    async fn a_change_is_in_force_when_what_it_ended_has_gone() {
        let store = Arc::new(MemoryStore::default());
        let clock = Arc::new(SystemClock);
        let knowledge = Knowledge::open_in_boot(store, clock, None, "this".to_owned()).unwrap();
        let (account, project) = (AccountId::from_bytes([1; 16]), ProjectId::from_bytes([2; 16]));
        let acl = |version, members| {
            Entry::Project(ProjectAcl {
                project,
                version,
                epoch: Epoch::FIRST,
                members,
                keys: vec![],
                grace_ms: None,
                proxy_ssh: false,
                authorized_keys: false,
                viewable_ports: vec![],
            })
        };
        let state =
            AccountState { account, session_epoch: 0, ended_logins: vec![], banned: false, keys: vec![] };
        let entries =
            [Entry::Reset, Entry::Account(state), acl(1, vec![(account, Role::Owner)]), Entry::Live];
        let frames: Vec<Frame> =
            (1..).zip(entries).map(|(seq, entry)| Frame { stream: 7, seq, entry }).collect();
        knowledge.begin_sync();
        assert_eq!(knowledge.in_force(), None);
        assert!(!knowledge.apply(&frames, |_| {}).await.unwrap());
        assert_eq!(knowledge.in_force(), Some((7, 4)));
        let reply = KeepaliveReply { lease_ms: 60_000, position: (7, 4), now: Timestamp::now() };
        assert!(!knowledge.renewed(&reply, knowledge.clock.boot(), None));
        let ask = Ask {
            account,
            project,
            action: Action::Use(Scope::Ws),
            epoch: None,
            session_epoch: Some(0),
            login: None,
            acl: 0,
            proof: Proof::Token,
        };
        let (_, admission) = knowledge.admit(&ask, Some(Epoch::FIRST));
        let admission = admission.unwrap();
        let removal = [Frame { stream: 7, seq: 5, entry: acl(2, vec![]) }];
        knowledge.apply(&removal, |_| {}).await.unwrap();
        // Told to close, and still there.
        assert_eq!(
            (knowledge.position(), knowledge.in_force()),
            (Some(Position { stream: 7, seq: 5 }), Some((7, 4)))
        );
        drop(admission);
        assert_eq!(knowledge.in_force(), Some((7, 5)));
    }
}
